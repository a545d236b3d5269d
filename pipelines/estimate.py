"""Rough cost of a stage before it runs: operations and memory of a forward, counted at the model's shape.

The denoiser runs on the meta device at the stage's size. Seconds are operations divided by half the rate that matrix
products reach on this device. Memory is the weights plus the peak of a forward, counted tensor by tensor; of attention
only the tensors made outside of its operators, of the original one its output alone.
"""

import inspect
import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, cast

import torch
from torch import nn

from ..linearize.adapters.base import Base, Source, build_on_meta
from ..linearize.convert import swapped
from ..linearize.describe import dense_below_of
from ..linearize.families import FAMILIES
from ..linearize.measures.flops import Step, count_step
from ..linearize.measures.peak_bytes import peak_with
from ..linearize.measures.step_inputs import can_make_inputs, token_side
from ..linearize.networks import denoiser
from ..linearize.weights.quantized import stored_tensors
from .placement import recorded_placement
from .plan import Plan, Stage
from .positions import table_side
from .token_chunks import in_token_chunks
from .vae import pixels_per_latent

GIB = 2**30
LONG_SECONDS = 0.02  # of the smallest product; if slower, stop: some CPUs take 40 s for the next one in bfloat16
ENOUGH_SECONDS = 0.002  # of the others; launch overhead is small against it
CHUNK_TOKENS = 8192  # large enough for matrix products to run at full speed
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_TOKENS = 2**24  # of a stage whose cost is counted: positions are not on the meta device and take a second by then
_MAX_CHUNKS = 64  # counted at most
_CLIP_TOKENS = 77
# Pipelines whose guidance calls the model once with the prompt and once without; others give it both at once.
_SEQUENTIAL_GUIDANCE = (
    *("ChromaPipeline", "OvisImagePipeline", "CogView4Pipeline", "Krea2Pipeline", "Lumina2Pipeline"),
    "Flux2KleinPipeline",
)


class Estimator:
    """Cost of the stages of one pipeline in its current state."""

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether the inputs of a forward can be made from the model's config."""
        return type(model).__name__ in FAMILIES and can_make_inputs(model)

    def __init__(self, pipe: Any, text_len: int | None, batch: int) -> None:
        _, self.model = denoiser(pipe)
        self.text_len, self.scale = _text_len(pipe, text_len), pixels_per_latent(pipe.vae)
        self.forwards, copies = forwards_of(pipe)
        self.batch = batch * copies
        self.weights = weights_on_device(pipe)
        placement = recorded_placement(pipe)
        device = pipe._execution_device if placement is None else placement.device
        dtype = cast(Any, self.model).dtype
        self.dtype = dtype if dtype in _COMPUTE_DTYPES else torch.bfloat16  # weights that are cast layer by layer
        self.speed = half_peak_flops(device, self.dtype)
        self.limit = free_gib(device)

    def with_costs(self, plan: Plan, *, chunks: bool) -> Plan:
        """The plan with seconds and GiB for each stage, and advice if they exceed the GPU's free memory.

        Args:
            chunks: Whether the model can run in chunks of tokens, which stages that exceed the memory then do.
        """
        try:
            stages = [self._with_cost(stage, chunks) for stage in plan.stages]
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            note = f"time and memory are unknown: a forward could not be counted ({type(error).__name__}: {error})"
            return replace(plan, notes=(*plan.notes, note))
        if self._tokens(plan.stages[-1]) > _MAX_TOKENS:
            note = f"time and memory are estimated only up to {_MAX_TOKENS:,} image tokens"
            plan = replace(plan, notes=(*plan.notes, note))
        peak = max(stage.gib or 0 for stage in stages)
        if self.limit is None or peak <= self.limit:
            return replace(plan, stages=tuple(stages))
        note = (
            f"about {peak:.1f} GiB needed, but {self.limit:.1f} are free: offload (enable_model_cpu_offload or "
            "enable_group_offload; --offload), quantize the model, or make a smaller picture"
        )
        return replace(plan, stages=tuple(stages), notes=(*plan.notes, note))

    def _with_cost(self, stage: Stage, chunks: bool) -> Stage:
        if self._tokens(stage) > _MAX_TOKENS:
            return stage
        shape = self._shape(stage)
        step = forward(shape)
        if step is None:  # beyond the model's positions; such a plan is rejected
            return stage
        kernels = swapped(self.model) if stage.attention == "converted" else {}
        configs = {name: cast(Any, module).linear_kernel.config for name, module in kernels.items()}
        flops = step.flops(configs, dense_below=dense_below_of(self.model))
        operations = stage.steps * self.forwards * self.batch * flops.after
        used_configs = set(configs.values())
        counted = step if stage.chunk_tokens is None else step_in_chunks(shape, stage.chunk_tokens)
        gib = self._gib(peak_with(counted, used_configs, self.dtype))
        too_large = self.limit is not None and gib > self.limit
        if too_large and chunks and stage.chunk_tokens is None and prod(step.grid) > CHUNK_TOKENS:
            stage, counted = replace(stage, chunk_tokens=CHUNK_TOKENS), step_in_chunks(shape, CHUNK_TOKENS)
            gib = self._gib(peak_with(counted, used_configs, self.dtype))
        return replace(stage, seconds=operations / self.speed, gib=gib)

    def _tokens(self, stage: Stage) -> int:
        """Image tokens of a stage; for a UNet, latents."""
        pixels = self.scale * token_side(self.model)
        return (stage.height // pixels) * (stage.width // pixels)

    def _gib(self, peak: int) -> float:
        """GiB of the weights and of the activations at a forward's peak, which is in bytes for one picture."""
        return (self.weights + self.batch * peak) / GIB

    def _shape(self, stage: Stage) -> "Shape":
        config = {name: one for name, one in cast(Any, self.model).config.items() if not name.startswith("_")}
        latents = (stage.height // self.scale, stage.width // self.scale)
        side, table = max(latents) // token_side(self.model), table_side(self.model)
        if table is not None and side > table:  # the table is then stretched
            config["pos_embed_max_size"] = side if config["pos_embed_max_size"] == table else side**2
        return Shape(
            model_class=type(self.model).__name__,
            config=json.dumps(config, default=str),
            dtype=self.dtype,
            latents=latents,
            text_len=self.text_len,
        )


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one forward computes, for one picture.

    Attributes:
        config: The model's, as JSON.
        latents: (height, width) of the picture in the VAE's latents.
        text_len: As in `count_step`.
    """

    model_class: str
    config: str
    dtype: torch.dtype
    latents: tuple[int, int]
    text_len: int | None

    def model(self, **overrides: int) -> nn.Module:
        """The model on the meta device; `overrides` replace values of its config."""
        config = json.loads(self.config) | overrides
        base = Base(source=Source(name="the pipeline"), model_class=self.model_class, config=config)
        return build_on_meta(base, dtype=self.dtype)

    def step(self, model: nn.Module) -> Step | None:
        return count_step(model, self.latents, f"{self.latents[1]}x{self.latents[0]} latents", text_len=self.text_len)


@lru_cache(maxsize=64)
def forward(shape: Shape) -> Step | None:
    """The operations of one forward; None beyond the model's positions."""
    return shape.step(shape.model())


@lru_cache(maxsize=64)
def step_in_chunks(shape: Shape, chunk_tokens: int) -> Step:
    """A forward of FLUX.1 with one block of each kind, its token-wise layers on `chunk_tokens` tokens at a time."""
    model = shape.model(num_layers=1, num_single_layers=1)  # more blocks do not raise the peak
    least = prod(shape.latents) // token_side(model) ** 2 // _MAX_CHUNKS  # smaller ones save little, and take long
    with in_token_chunks(model, max(chunk_tokens, least)):
        return cast(Step, shape.step(model))


def forwards_of(pipe: Any) -> tuple[int, int]:
    """Default (forwards per step, copies of each picture in them); one of them is 2 for classifier-free guidance."""
    stock, parameters = pipe.stock.__name__, inspect.signature(pipe.stock.__call__).parameters
    if (guider := getattr(pipe, "guider", None)) is not None:  # HunyuanImage
        return guider.num_conditions, 1
    scale = parameters["guidance_scale"].default if "guidance_scale" in parameters else None
    # where there is a true_cfg_scale as well, guidance_scale is an input of the model
    guided = "true_cfg_scale" not in parameters and isinstance(scale, int | float) and scale > 1
    if stock.startswith("Flux2"):
        guided = stock == "Flux2KleinPipeline" and not pipe.config.is_distilled
    return (1, 1) if not guided else (2, 1) if stock in _SEQUENTIAL_GUIDANCE else (1, 2)


def _text_len(pipe: Any, text_len: int | None) -> int | None:
    """Text tokens that the pipeline passes to the model; None: unknown."""
    parameters = inspect.signature(pipe.stock.__call__).parameters
    if text_len is None and "max_sequence_length" in parameters:
        text_len = parameters["max_sequence_length"].default
    if text_len is not None and "Diffusion3" in pipe.stock.__name__:
        text_len += _CLIP_TOKENS  # before those of T5
    return text_len


@lru_cache
def half_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Half the operations per second of matrix products, of a few milliseconds or the smallest one if slow."""
    side = 2048
    right = torch.randn(side, side, device=device, dtype=dtype)
    for rows, repeats, long_enough in (
        (8, 1, LONG_SECONDS),
        (512, 1, ENOUGH_SECONDS),
        (4096, 8, ENOUGH_SECONDS),
        (4096, 64, 0),
    ):
        left = torch.randn(rows, side, device=device, dtype=dtype)
        seconds = min(_seconds(left, right, repeats) for _ in range(3))
        if seconds > long_enough:
            break
    return 0.5 * 2 * rows * side * side * repeats / seconds


def _seconds(left: torch.Tensor, right: torch.Tensor, repeats: int) -> float:
    """Duration of `times` matrix products, one after the other."""
    began = time.perf_counter()
    for _ in range(repeats):
        product = left @ right
    float(product[0, 0])  # waits for the device
    return time.perf_counter() - began


def free_gib(device: torch.device) -> float | None:
    """GiB of GPU memory that this process has reserved or can get; None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) / GIB


def weights_on_device(pipe: Any) -> int:
    """Bytes of a pipeline's weights that are on its device at once."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    placement, model = recorded_placement(pipe), denoiser(pipe)[1]
    bits = None if placement is None or placement.quantization is None else placement.quantization.bits
    sizes = [_bytes(part, None, bits=bits if part is model else None) for part in parts]
    # offloading keeps one part on the device, or a few layers
    if getattr(pipe, "_all_hooks", None) or (placement is not None and placement.offload == "model"):
        return max(sizes)
    if placement is not None:
        return sum(sizes) if placement.offload == "none" else 0
    return sum(_bytes(part, pipe._execution_device) for part in parts)


def _bytes(part: nn.Module, device: torch.device | None, *, bits: float | None = None) -> int:
    """Bytes of a part's weights on a device (None: any), with `bits` per Linear weight (None: as they are)."""
    tensors = (*part.parameters(), *part.buffers())
    on_device = [weight for weight in tensors if device is None or weight.device.type == device.type]
    total = sum(stored.nbytes for weight in on_device for stored in stored_tensors(weight))
    if bits is None:
        return total
    linear = [layer.weight for layer in part.modules() if isinstance(layer, nn.Linear)]
    return total - sum(weight.nbytes - round(weight.numel() * bits / 8) for weight in linear)
