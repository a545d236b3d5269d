"""Rough cost of a stage before it runs: operations and memory of a forward, counted in the model's shape.

The denoiser runs without numbers (meta device) at the stage's size. Seconds are operations over half of what a matrix
product reaches on this device. Memory is the weights and the most that a forward holds at once, counted tensor by
tensor; attention stands for any that holds its output alone.
"""

import inspect
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch
from torch import nn

from ..linearize.base import Base, Source, build_on_meta
from ..linearize.convert import denoiser, swapped
from ..linearize.families import FAMILIES
from ..linearize.flops import Step, count_step
from ..linearize.record import CONFIG_KEY
from ..linearize.step_inputs import can_make_inputs
from .plan import Plan, Stage
from .token_chunks import in_token_chunks
from .vae import pixels_per_latent

GIB = 2**30
LONG_SECONDS = 0.02  # of a product; some CPUs take 40 s for the larger one in bfloat16
CHUNK_TOKENS = 8192  # large enough for matrix products to run at full speed
ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1}  # of FLUX.1's blocks; more of them hold no more


class Estimator:
    """Cost of the stages of one pipeline, as it stands now."""

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether a forward of such a model can be made up from its config."""
        return type(model).__name__ in FAMILIES and can_make_inputs(model)

    def __init__(self, pipe: Any, text_len: int, batch: int) -> None:
        _, self.model = denoiser(pipe)
        self.text_len, self.scale = text_len, pixels_per_latent(pipe.vae)
        self.batch = batch * (2 if is_guided(pipe) else 1)
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        device = pipe._execution_device
        # offloading keeps one part on the device, or a few layers
        offloads = bool(getattr(pipe, "_all_hooks", None))
        sizes = [_bytes(part, None if offloads else device) for part in parts]
        self.weights = max(sizes) if offloads else sum(sizes)
        self.speed = half_of_peak(device, self.model.dtype)
        self.limit = free_gib(device)

    def with_costs(self, plan: Plan, *, chunks: bool) -> Plan:
        """The plan with seconds and GiB beside each stage, and what to do where that is more than the GPU's memory.

        Args:
            chunks: The model can run in chunks of tokens, which such a stage gets.
        """
        stages = [self._with_cost(stage, chunks) for stage in plan.stages]
        most = max(stage.gib or 0 for stage in stages)
        if self.limit is None or most <= self.limit:
            return replace(plan, stages=tuple(stages))
        note = (
            f"about {most:.1f} GiB where {self.limit:.1f} are free: offload (enable_model_cpu_offload or "
            "enable_group_offload; --offload), quantize the model, or make a smaller picture"
        )
        return replace(plan, stages=tuple(stages), notes=(*plan.notes, note))

    def _with_cost(self, stage: Stage, chunks: bool) -> Stage:
        step = self._step(stage, None)
        if step is None:  # beyond the model's table of positions, which a plan is refused for
            return stage
        kernels = swapped(self.model) if stage.attention == "converted" else {}
        configs = {name: cast(Any, module).linear_kernel.config for name, module in kernels.items()}
        seconds = stage.steps * self.batch * step.flops(configs).after / self.speed
        gib = self._gib(stage, stage.chunk_tokens)
        too_large = self.limit is not None and gib > self.limit
        if too_large and chunks and stage.chunk_tokens is None and prod(step.grid) > CHUNK_TOKENS:
            stage, gib = replace(stage, chunk_tokens=CHUNK_TOKENS), self._gib(stage, CHUNK_TOKENS)
        return replace(stage, seconds=seconds, gib=gib)

    def _gib(self, stage: Stage, chunk_tokens: int | None) -> float:
        """Weights and activations at the peak of a forward."""
        step = self._step(stage, chunk_tokens)
        return (self.weights + self.batch * (step.peak if step else 0)) / GIB

    def _step(self, stage: Stage, chunk_tokens: int | None) -> Step | None:
        config: Mapping[str, Any] = cast(Any, self.model).config
        config = {name: value for name, value in config.items() if name != CONFIG_KEY and not name.startswith("_")}
        latents = (stage.height // self.scale, stage.width // self.scale)
        kind, dtype = type(self.model).__name__, self.model.dtype
        return forward(kind, json.dumps(config, default=str), dtype, latents, self.text_len, chunk_tokens)


@lru_cache(maxsize=64)
def forward(
    model_class: str,
    config: str,
    dtype: torch.dtype,
    latents: tuple[int, int],
    text_len: int,
    chunk_tokens: int | None,
) -> Step | None:
    """What one forward does for one picture; None beyond the model's table of positions.

    Args:
        config: The model's, as JSON.
        latents: (height, width) of the picture in the VAE's latents.
        chunk_tokens: Of token-wise layers; the step's peak holds then, and its operations are of two blocks alone.
    """
    model = _shape(model_class, config, dtype, chunk_tokens is not None)
    chunks = nullcontext() if chunk_tokens is None else in_token_chunks(model, chunk_tokens)
    with chunks:
        return count_step(model, latents, f"{latents[1]}x{latents[0]} latents", text_len=text_len)


@lru_cache(maxsize=4)
def _shape(model_class: str, config: str, dtype: torch.dtype, one_of_each: bool) -> nn.Module:
    entries = json.loads(config) | (ONE_OF_EACH if one_of_each else {})
    return build_on_meta(Base(source=Source(name="the pipeline"), model_class=model_class, config=entries), dtype=dtype)


def is_guided(pipe: Any) -> bool:
    """Whether each step is two forwards by default, with the prompt and without: classifier-free guidance."""
    own = inspect.signature(pipe.stock.__call__).parameters
    scale = own["guidance_scale"].default if "guidance_scale" in own else None
    # where there is a true_cfg_scale as well, guidance_scale is an input of the model
    return "negative_prompt" in own and "true_cfg_scale" not in own and isinstance(scale, int | float) and scale > 1


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
