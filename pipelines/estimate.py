"""Rough cost of a stage before it runs: operations counted from the model's shape, memory from its width.

Seconds are operations over half of what a matrix product reaches on this device. Memory counts weights and twenty
activations of the model's width, about what a single block of FLUX holds at once.
"""

import math
import time
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from ..linearize.convert import denoiser, swapped
from ..linearize.families import family_of
from ..linearize.layout import Grid
from ..linearize.matching import attention_modules, head_shape
from ..linearize.methods import METHODS
from .plan import Plan, Stage

GIB = 2**30
ACTIVATIONS = 20


def step_flops(model: nn.Module, grid: Grid, text_len: int, *, converted: bool) -> int:
    """Operations of one forward for one picture; projections of single numbers per picture do not count."""
    num_image = math.prod(grid)
    total = 0
    for name, weight in model.named_parameters():
        if weight.ndim != 2 or "norm" in name or "embed" in name:
            continue
        seen_by = text_len if "context" in name or "add_" in name else num_image + text_len
        total += 2 * weight.numel() * seen_by
    kernels = swapped(model) if converted else {}
    for name, module in attention_modules(model, family_of(model))[0].items():
        num_heads, head_dim = head_shape(module)
        pairs = (num_image + text_len) ** 2
        if name in kernels:
            config = cast(Any, kernels[name]).linear_kernel.config
            pairs = METHODS[type(config)].pairs(config, grid, text_len, num_heads=num_heads, head_dim=head_dim)
        total += 4 * pairs * num_heads * head_dim
    return total


@lru_cache
def half_of_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second, from a matrix product of a few milliseconds."""
    left, right = (
        torch.randn(512, 2048, device=device, dtype=dtype),
        torch.randn(2048, 2048, device=device, dtype=dtype),
    )
    times = []
    for _ in range(3):
        began = time.perf_counter()
        float((left @ right).float().sum())  # waits for the device
        times.append(time.perf_counter() - began)
    return 0.5 * 2 * 512 * 2048 * 2048 / min(times)


class Estimator:
    """Cost of the stages of one pipeline, as it stands now."""

    def __init__(self, pipe: Any) -> None:
        _, self.model = denoiser(pipe)
        sizes = [_bytes(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
        # offloading keeps one part on the device, or less
        self.weights = max(sizes) if getattr(pipe, "_all_hooks", None) else sum(sizes)
        self.speed = half_of_peak(pipe._execution_device, self.model.dtype)

    def with_costs(self, plan: Plan, token: int, text_len: int, batch: int) -> Plan:
        """The plan with seconds and GiB beside each stage; `token`: its side in pixels."""
        return replace(plan, stages=tuple(self._with_cost(stage, token, text_len, batch) for stage in plan.stages))

    def _with_cost(self, stage: Stage, token: int, text_len: int, batch: int) -> Stage:
        grid = (stage.height // token, stage.width // token)
        flops = batch * step_flops(self.model, grid, text_len, converted=stage.attention == "converted")
        config: Any = self.model.config
        width = config.num_attention_heads * config.attention_head_dim
        numbers = ACTIVATIONS * batch * (math.prod(grid) + text_len) * width
        gib = (self.weights + numbers * self.model.dtype.itemsize) / GIB
        return replace(stage, seconds=stage.steps * flops / self.speed, gib=gib)


def _bytes(part: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in part.parameters())
