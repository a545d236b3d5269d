"""How long one denoising step takes on this machine before and after conversion: what `lineardit bench` does.

The denoiser stands alone, in its true shape and with random weights: what a step takes does not depend on their values.
So configs and adapters are all that is read, and neither text encoders nor a VAE take memory. The original and the
conversion run in turn, on one copy of the weights, so that both meet the same load of the machine.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Self, cast

import diffusers
import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from .adapter import adapter_file, mount_adapter_, read_adapter
from .base import Base, build_on_meta, default_dtype, find_place, read_base
from .compiling import compile_
from .convert import check_impl, dense, linearize_
from .families import family_of
from .flops import Step, StepFlops, count_step
from .inspection import named_base
from .manifest import Manifest, read_entry
from .matching import attention_modules, choose
from .record import CONFIG_KEY
from .step_inputs import can_make_inputs, step_inputs, token_side

GIB = 2**30
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One size.

    Attributes:
        height, width: In pixels.
        tokens: Of the image.
        flops: Operations before and after.
        runs: Implementations that the converted modules pick, as "tiled" or "reference, tiled".
        original, converted: Seconds of each forward in turn; None: it did not fit into memory.
        original_gib, converted_gib: Peak memory, weights included; None where the device does not count it.
    """

    height: int
    width: int
    tokens: int
    flops: StepFlops
    runs: str
    original: tuple[float, ...] | None
    converted: tuple[float, ...] | None
    original_gib: float | None
    converted_gib: float | None

    @property
    def speedup(self) -> float | None:
        """The median over pairs of the original's seconds to the converted model's; None without both."""
        if self.original is None or self.converted is None:
            return None
        return median(one / other for one, other in zip(self.original, self.converted, strict=True))


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """An adapter or a saved converted pipeline, and the shape of its base; nothing of the base's weights.

    Attributes:
        name: As it was given.
        base: What the base's config files say.
        configs: {pattern: config}.
        adapter: Its manifest and tensors; None: a saved pipeline.
    """

    name: str
    base: Base
    configs: dict[str, Any]
    adapter: tuple[Manifest, dict[str, Tensor]] | None

    @classmethod
    def read(cls, name: str | Path, *, offline: bool = False) -> Self:
        """
        Raises:
            ValueError: missing, damaged, not converted, or of a model whose inputs are not known by name.
        """
        place = find_place(name, offline=offline)
        if adapter_file(place) is None:
            base, adapter = read_base(name, offline=offline), None
            if CONFIG_KEY not in base.config:
                raise ValueError(f"{name} is not converted: `lineardit convert {name} --method ...` makes an adapter")
            configs = read_entry(base.config[CONFIG_KEY]).configs()
        else:
            adapter = read_adapter(name, offline=offline)
            base, configs = named_base(adapter[0], place.name, offline=offline), adapter[0].configs()
        model = build_on_meta(base)
        if not can_make_inputs(model):
            raise ValueError(
                f"the inputs of a {base.model_class} cannot be made up: `lineardit evaluate` times whole pictures"
            )
        return cls(name=str(name), base=base, configs=configs, adapter=adapter)

    def check(self, sizes: Sequence[Size], impl: str = "auto") -> None:
        """Raise a ValueError for a size that the model cannot make, or an implementation that there is not."""
        for config in self.configs.values():
            check_impl(impl, type(config))
        model = build_on_meta(self.base)
        multiple = self.base.vae_scale * token_side(model)
        for height, width in sizes:
            if height % multiple or width % multiple:
                raise ValueError(f"sides must be multiples of {multiple} pixels for this model, got {width}x{height}")
            self._step(model, (height, width))

    def mount(self, model: nn.Module, impl: str) -> None:
        """Convert a model of the base's shape, in place."""
        if self.adapter is None:
            linearize_(model, self.configs, impl=impl)
        else:
            mount_adapter_(model, *self.adapter, keep_original=True, impl=impl)

    def counted(self, size: Size, text_len: int | None, impl: str, device: torch.device) -> tuple[int, StepFlops, str]:
        """Image tokens, operations, and what runs, for one size."""
        model = build_on_meta(self.base)
        step = self._step(model, size, text_len)
        modules, _ = attention_modules(model, family_of(model))
        configs = choose(list(modules), self.configs, None)
        picked = {step.picked(name, config, device.type) for name, config in configs.items()}
        return prod(step.grid), step.flops(configs), ", ".join(sorted(picked)) if impl == "auto" else impl

    def latents(self, size: Size) -> Size:
        """(height, width) in the VAE's latents."""
        return size[0] // self.base.vae_scale, size[1] // self.base.vae_scale

    def _step(self, model: nn.Module, size: Size, text_len: int | None = None) -> Step:
        step = count_step(model, self.latents(size), f"{size[1]}x{size[0]}", text_len=text_len)
        if step is None:
            raise ValueError(f"a {self.base.model_class} of this config has no positions for {size[1]}x{size[0]}")
        return step


def time_steps(
    conversion: Conversion,
    sizes: Sequence[Size],
    *,
    device: torch.device,
    dtype: torch.dtype,
    pairs: int = 3,
    text_len: int | None = None,
    impl: str = "auto",
    compiled: bool = False,
) -> Iterator[StepTime]:
    """Time a step of the original and of the conversion in turn, size by size.

    Args:
        sizes: (height, width) in pixels.
        dtype: Of the weights.
        pairs: Forwards of each that count, after one that warms up.
        text_len: Text tokens; None: as the family's pipelines take them.
        impl: As in `linearize_`.
        compiled: Compile the repeated blocks of both.
    Raises:
        ValueError: a setting is out of range, the model cannot make a size, its weights do not fit into memory, or a
            forward fails.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be >= 1, got {pairs}")
    conversion.check(sizes, impl)
    model = random_model(conversion.base, device, dtype)
    conversion.mount(model, impl)
    if compiled:
        compile_(model)
    with tqdm(total=2 * (pairs + 1) * len(sizes), desc=conversion.name, unit="step") as progress:
        for size in sizes:
            tokens, flops, runs = conversion.counted(size, text_len, impl, device)
            made = step_inputs(model, family_of(model).name, conversion.latents(size), text_len=text_len)
            inputs = tree_map_only(Tensor, lambda one: _with_numbers(one, device, dtype), made)
            try:
                original, converted = _in_turn(model, cast(dict[str, Any], inputs), pairs, progress)
            except (RuntimeError, LookupError, TypeError, ValueError) as error:
                told = f"a step at {size[1]}x{size[0]} failed ({type(error).__name__}: {error})"
                raise ValueError(told) from error
            yield StepTime(
                height=size[0],
                width=size[1],
                tokens=tokens,
                flops=flops,
                runs=runs,
                original=original.seconds,
                converted=converted.seconds,
                original_gib=original.gib,
                converted_gib=converted.gib,
            )


def _in_turn(model: nn.Module, inputs: dict[str, Any], pairs: int, progress: "tqdm[Any]") -> tuple["_Timed", "_Timed"]:
    """The original and the conversion, each warmed up and then timed `pairs` times."""
    converted = _Timed(model, inputs)
    with dense(model):
        original = _Timed(model, inputs)
    progress.update(2)
    for _ in range(pairs):
        converted.again()
        with dense(model):
            original.again()
        progress.update(2)
    return original, converted


class _Timed:
    """Forwards of a model on the same inputs, warmed up; out of memory, there are none."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.device = next(model.parameters()).device
        self.seconds: tuple[float, ...] | None = ()
        self.gib: float | None = None
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.again()
        if self.seconds is not None:
            self.seconds = ()
            self.gib = torch.cuda.max_memory_allocated(self.device) / GIB if on_gpu else None

    def again(self) -> None:
        """One more forward."""
        if self.seconds is None:
            return
        try:
            self.seconds = (*self.seconds, self._seconds())
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            self.seconds = self.gib = None
            torch.cuda.empty_cache()

    @torch.no_grad()
    def _seconds(self) -> float:
        inputs = {name: tree_map_only(Tensor, lambda one: one, value) for name, value in self.inputs.items()}
        self._wait()
        began = time.perf_counter()
        self.model(**inputs)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def random_model(base: Base, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The denoiser in its shape, with the random weights that its class begins with.

    Raises:
        ValueError: they are more than the memory that is free.
    """
    shape = build_on_meta(base)
    needed = sum(weight.numel() for weight in shape.parameters()) * dtype.itemsize
    name = str(dtype).removeprefix("torch.")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"the weights of this {base.model_class} are {needed / GIB:.1f} GiB in {name}, "
            f"{free / GIB:.1f} are free on {device}: take a smaller dtype or another device"
        )
    config = {key: value for key, value in base.config.items() if key != CONFIG_KEY}
    with torch.device(device), default_dtype(dtype):
        model = getattr(diffusers, base.model_class).from_config(config)
    return cast(nn.Module, model.eval().requires_grad_(False))


def _with_numbers(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An input of `step_inputs` on a device; floats without numbers get random ones."""
    if not value.is_meta:
        return value.to(device)
    dtype = value.dtype if value.is_complex() else dtype
    if value.ndim == 1:  # a time, or the strength of guidance
        return torch.full(value.shape, 0.5, dtype=dtype, device=device)
    return torch.randn(value.shape, dtype=dtype, device=device)
