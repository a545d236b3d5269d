"""The `lineardit` entry of a converted model's config, which a plain save_pretrained carries to `from_pretrained`."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..methods import config_to_dict
from ..seam.conversion import conversion_of, overlays_of
from ..weights.low_rank import LORA_NAME
from ..weights.overlays import Overlay
from .grouping import grouped
from .manifest import Entry

logger = logging.getLogger(__name__)

CONFIG_KEY = "lineardit"


@contextmanager
def suppress_loading_warnings() -> Iterator[None]:
    """Context manager that keeps diffusers from warning about the entry and the tensors of a saved conversion.

    Diffusers calls both unexpected; `from_pretrained` reads them afterwards.
    """
    filters = {"diffusers.configuration_utils": _is_unrelated, "diffusers.models.modeling_utils": _is_of_base}
    for name, keep in filters.items():
        logging.getLogger(name).addFilter(keep)
    try:
        yield
    finally:
        for name, keep in filters.items():
            logging.getLogger(name).removeFilter(keep)


def _is_unrelated(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(f"The config attributes {{'{CONFIG_KEY}': ")


def _is_of_base(record: logging.LogRecord) -> bool:
    """False for "Some weights ... were not used ...: ['a, b']" if all of them belong to a conversion."""
    message = record.getMessage()
    if not message.startswith("Some weights of the model checkpoint"):
        return True
    names = message.rpartition("[")[2].strip("']\n ").split(", ")
    return not all(is_conversion_tensor(name) for name in names)


def is_conversion_tensor(name: str) -> bool:
    """Whether a saved tensor belongs to the conversion or its LoRA."""
    return ".linear_kernel." in name or f".{LORA_NAME}." in name


class _ConfigEntry(dict[str, Any]):
    """The entry; diffusers calls `to_dict` when it saves."""

    def to_dict(self) -> dict[str, Any]:
        logger.warning(
            "saving a converted model with save_pretrained: plain diffusers loads it with its full attention; "
            "lineardit.from_pretrained restores the conversion (unload a LoRA of your own before), and "
            "lineardit.save_adapter is the smaller way"
        )
        return dict(self)


def write_entry_(model: Any) -> None:
    """Record in a converted model's config how it was converted and what was trained: call it after each change."""
    conversion = conversion_of(model)
    if conversion is None or not hasattr(model, "register_to_config"):
        return
    changed = [name for overlay in overlays_of(model).items for name in overlay.changed()]
    entry = _ConfigEntry(entry_of(model, changed=changed).to_dict())
    model._internal_dict = _config({**model.config, CONFIG_KEY: entry}, model.config)


def entry_of(model: nn.Module, *, changed: Sequence[str]) -> Entry:
    """How a model was converted and what was trained.

    Args:
        model: A converted denoiser.
        changed: Names of the base's parameters whose values differ from the base's.
    """
    conversion = conversion_of(model)
    assert conversion is not None, "only a converted model has an entry"
    trained = [overlay.describe() for overlay in overlays_of(model).items if not _is_fused(overlay)]
    names = [name for name, _ in model.named_parameters()]
    return Entry(
        methods={pattern: config_to_dict(config) for pattern, config in conversion.patterns.items()},
        dense_below=conversion.dense_below,
        trained=tuple(dict.fromkeys(trained)),
        changed=tuple(grouped(dict.fromkeys(changed, 0), names)),
    )


def _is_fused(overlay: Overlay) -> bool:
    """Whether an overlay is LoRA that was added into the weights, so that no term is left."""
    return overlay.describe().kind == "lora" and bool(overlay.changed())


def remove_entry_(model: Any) -> None:
    """Remove the entry from the config."""
    if CONFIG_KEY in getattr(model, "_internal_dict", {}):
        entries = {key: value for key, value in model.config.items() if key != CONFIG_KEY}
        model._internal_dict = _config(entries, model.config)


def _config(entries: dict[str, Any], previous: FrozenDict) -> FrozenDict:
    """A config with these entries, and with the values that diffusers' loaders set only as attributes."""
    config = FrozenDict(entries)
    vars(config).update({name: value for name, value in vars(previous).items() if name != CONFIG_KEY})
    return config
