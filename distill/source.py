"""A model that is judged by its name, and loaded when its turn comes."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..linearize.adapters.adapter import adapter_file
from ..linearize.adapters.place import find_place
from ..linearize.adapters.quantization import Quantization
from ..pipelines.placement import check_offload, place_
from .cost import open_named


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model by its name, as `open_named` takes it, the device it runs on, and how it is offloaded (`place_`)."""

    name: str
    base: str | None = None
    dtype: str = "float32"
    impl: str = "auto"
    offline: bool = False
    device: str = "cpu"
    offload: str = "none"
    quantization: Quantization | None = None

    def opening(self) -> dict[str, Any]:
        """Arguments of `open_named`."""
        return {key: value for key, value in asdict(self).items() if key not in ("device", "offload")}


def check_place(source: Any) -> None:
    """Raise what opening a `Source` would, where there is nothing of that name, or it cannot be offloaded so."""
    if isinstance(source, Source):
        check_offload(torch.device(source.device), source.offload, source.quantization)
        adapter_file(find_place(source.name, offline=source.offline))


def opened(source: Any) -> Any:
    """The pipeline of a `Source` in its place, or what was handed over in memory."""
    if not isinstance(source, Source):
        return source
    pipe = open_named(source.opening())
    place_(pipe, torch.device(source.device), source.offload)
    return pipe
