"""The `lineardit` entry of a converted model's config, which a plain save_pretrained carries to `from_pretrained`."""

import logging
from dataclasses import asdict
from typing import Any

from diffusers.configuration_utils import FrozenDict

from .grouping import grouped
from .manifest import Entry, Trained
from .methods import config_to_dict
from .overlays import overlays_of
from .seam import state_of

logger = logging.getLogger(__name__)

CONFIG_KEY = "lineardit"


class _Saved(dict[str, Any]):
    """The entry; diffusers calls `to_dict` at the moment of saving."""

    def to_dict(self) -> dict[str, Any]:
        logger.warning(
            "saving a converted model with save_pretrained: plain diffusers loads it with its full attention; "
            "lineardit.from_pretrained restores the conversion, and lineardit.save_adapter is the smaller way"
        )
        return dict(self)


def record_(model: Any) -> None:
    """Notes in the config of a converted model how it was converted and what was trained: call it after each change."""
    state = state_of(model)
    if state is None or not hasattr(model, "register_to_config"):
        return
    overlays = overlays_of(model).items
    changed = [name for overlay in overlays if overlay.describe()["kind"] == "full" for name in overlay.tensors()]
    names = [name for name, _ in model.named_parameters()]
    entry = Entry(
        methods={pattern: config_to_dict(config) for pattern, config in state.patterns.items()},
        trained=tuple(dict.fromkeys(Trained(**overlay.describe()) for overlay in overlays)),
        changed=tuple(grouped(dict.fromkeys(changed, 0), names)),
    )
    model.register_to_config(**{CONFIG_KEY: _Saved(asdict(entry))})


def forget_(model: Any) -> None:
    """Takes the entry out of the config."""
    if CONFIG_KEY in getattr(model, "_internal_dict", {}):
        model._internal_dict = FrozenDict({key: value for key, value in model.config.items() if key != CONFIG_KEY})
