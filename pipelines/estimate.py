"""Rough cost of a stage before it runs: operations counted from the model's shape, memory from its width.

Seconds are operations over half of what a matrix product reaches on this device. Memory counts weights and, in copies
of all tokens at the model's width, what a block of FLUX.1 holds at its peak. Counted on FLUX.1-dev's shape, tensor by
tensor (`benchmarks/forward_memory.py`): 17.2 to 17.3 copies, where queries are turned in float32 beside the single
block's hidden layer; in chunks of 8192 8.4 at 4K and 8.2 at 8K, which 8 copies and as many of one chunk cover.
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
COPIES = 17.5
COPIES_IN_CHUNKS = 8
LONG_SECONDS = 0.02  # of a product; some CPUs take 40 s for the larger one in bfloat16
CHUNK_TOKENS = 8192  # large enough for matrix products to run at full speed


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
    """Operations a second, from a matrix product of a few milliseconds; a small one where that takes long already."""
    side = 2048
    right = torch.randn(side, side, device=device, dtype=dtype)
    for rows in (8, 512):
        left = torch.randn(rows, side, device=device, dtype=dtype)
        seconds = min(_seconds(left, right) for _ in range(3))
        if seconds > LONG_SECONDS:
            break
    return 0.5 * 2 * rows * side * side / seconds


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of one product."""
    began = time.perf_counter()
    float((left @ right).float().sum())  # waits for the device
    return time.perf_counter() - began


class Estimator:
    """Cost of the stages of one pipeline, as it stands now."""

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether it was measured for such a model: FLUX.1's."""
        return type(model).__name__ == "FluxTransformer2DModel"

    def __init__(self, pipe: Any) -> None:
        _, self.model = denoiser(pipe)
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        device = pipe._execution_device
        # offloading keeps one part on the device, or a few layers
        offloads = bool(getattr(pipe, "_all_hooks", None))
        sizes = [_bytes(part, None if offloads else device) for part in parts]
        self.weights = max(sizes) if offloads else sum(sizes)
        self.speed = half_of_peak(device, self.model.dtype)
        self.limit = free_gib(device)

    def with_costs(self, plan: Plan, token: int, text_len: int, batch: int) -> Plan:
        """The plan with seconds and GiB beside each stage, in chunks of tokens where these are too many for the GPU.

        Args:
            token: Its side in pixels.
        """
        stages = [self._with_cost(stage, token, text_len, batch) for stage in plan.stages]
        most = max(stage.gib or 0 for stage in stages)
        if self.limit is None or most <= self.limit:
            return replace(plan, stages=tuple(stages))
        note = (
            f"about {most:.1f} GiB where {self.limit:.1f} are free: offload (enable_model_cpu_offload or "
            "enable_group_offload; --offload), quantize the model, or make a smaller picture"
        )
        return replace(plan, stages=tuple(stages), notes=(*plan.notes, note))

    def _with_cost(self, stage: Stage, token: int, text_len: int, batch: int) -> Stage:
        grid = (stage.height // token, stage.width // token)
        flops = batch * step_flops(self.model, grid, text_len, converted=stage.attention == "converted")
        num_tokens = math.prod(grid) + text_len
        gib = self._gib(num_tokens, batch, stage.chunk_tokens)
        if stage.chunk_tokens is None and num_tokens > CHUNK_TOKENS and self.limit is not None and gib > self.limit:
            stage = replace(stage, chunk_tokens=CHUNK_TOKENS)
            gib = self._gib(num_tokens, batch, CHUNK_TOKENS)
        return replace(stage, seconds=stage.steps * flops / self.speed, gib=gib)

    def _gib(self, num_tokens: int, batch: int, chunk_tokens: int | None) -> float:
        """Weights and activations at the peak of a forward."""
        config: Any = self.model.config
        width = config.num_attention_heads * config.attention_head_dim
        copies = COPIES * num_tokens
        if chunk_tokens is not None:
            copies = COPIES_IN_CHUNKS * (num_tokens + min(chunk_tokens, num_tokens))
        return (self.weights + copies * batch * width * self.model.dtype.itemsize) / GIB


def free_gib(device: torch.device) -> float | None:
    """Memory of a GPU that this process has or can get; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB


def _bytes(part: nn.Module, device: torch.device | None) -> int:
    """Of the weights on a device, of all of them for None."""
    there = (weight for weight in part.parameters() if device is None or weight.device.type == device.type)
    return sum(weight.numel() * weight.element_size() for weight in there)
