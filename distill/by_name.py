"""Models to evaluate that are given by name, and loaded when needed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..linearize.adapters.adapter import find_adapter
from ..linearize.adapters.quantization import Quantization
from ..pipelines.placement import check_offload, place_
from .cost import open_named


@dataclass(frozen=True, kw_only=True)
class ByName:
    """The name and options of a model for `open_named`, the device it runs on, and how it is offloaded (`place_`)."""

    name: str
    base: str | None = None
    dtype: str = "float32"
    impl: str = "auto"
    offline: bool = False
    device: str = "cpu"
    offload: str = "none"
    quantization: Quantization | None = None

    def open_arguments(self) -> dict[str, Any]:
        """Arguments of `open_named`."""
        return {key: value for key, value in asdict(self).items() if key not in ("device", "offload")}


def check_model(model: Any) -> None:
    """Raise what opening a `ByName` would raise for an unknown name or an offload mode that is not possible."""
    if isinstance(model, ByName):
        check_offload(torch.device(model.device), model.offload, model.quantization)
        find_adapter(model.name, offline=model.offline)


def open_model(model: Any) -> Any:
    """The pipeline of a `ByName`, opened and placed; a pipeline in memory is returned as it is."""
    if not isinstance(model, ByName):
        return model
    pipe = open_named(model.open_arguments())
    place_(pipe, torch.device(model.device), model.offload)
    return pipe
