"""Group norms of tiles with the statistics of the whole picture, so that tiles agree in colour.

A group norm takes mean and variance over all positions of a picture; in a tile, over those of the tile. Here each norm
uses the statistics of one run on the whole picture, downsampled to the size of a tile (nearest neighbours preserve the
variance), as in the fast mode of Tiled VAE (github.com/pkuliyi2015/multidiffusion-upscaler-for-automatic1111).

B pictures, C channels, G groups.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..linearize.seam.intercept import change_class


@contextmanager
def whole_statistics(module: nn.Module, run: Callable[[], object]) -> Iterator[None]:
    """Inside, group norms of a module that were called in `run` use the mean and variance recorded there.

    Other threads and pipelines with the same module would use these statistics too: none may run it meanwhile.
    """
    recorded: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def record(norm: Any, inputs: tuple[Tensor]) -> None:
        groups = inputs[0].unflatten(1, (norm.num_groups, -1)).flatten(2)  # [B, G, places]
        variance, mean = torch.var_mean(groups.float(), dim=-1, correction=0)
        recorded[norm] = mean, variance

    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(record) for norm in norms]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    original_classes: list[tuple[Any, Any]] = [(norm, type(norm)) for norm in recorded]
    try:
        for norm, original in original_classes:
            norm.whole_statistics = recorded[norm]
            change_class(norm, _fixed_statistics_class(original))
        yield
    finally:
        for norm, original in original_classes:
            change_class(norm, original)
            del norm.whole_statistics


class _FixedStatistics:
    """Mixed in before a group norm's own class."""

    num_groups: int
    eps: float
    weight: Tensor  # [C]
    bias: Tensor
    whole_statistics: tuple[Tensor, Tensor]  # mean and variance [B, G]

    def forward(self, x: Tensor) -> Tensor:  # [B, C, ...] -> [B, C, ...]
        mean, variance = self.whole_statistics
        weight, bias = (values.float().unflatten(0, (self.num_groups, -1)) for values in (self.weight, self.bias))
        scale = torch.rsqrt(variance + self.eps)[..., None] * weight  # [B, G, C / G]
        shift = bias - mean[..., None] * scale
        per_channel = (*x.shape[:2], *(1,) * (x.ndim - 2))
        return torch.addcmul(shift.reshape(per_channel), x, scale.reshape(per_channel)).to(x.dtype)


@cache
def _fixed_statistics_class(norm_class: Any) -> type[nn.Module]:
    return type(f"{norm_class.__name__}OfTheWhole", (_FixedStatistics, norm_class), {})
