"""A conversion without its base's weights, from an adapter and the base's config files, for `lineardit bench`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from torch import Tensor, nn

from ...kernels.pieces.results import dtype_name
from ..adapters.adapter import adapter_tensors, apply_adapter_
from ..adapters.base import Base, build_on_meta
from ..adapters.config_entry import CONFIG_KEY
from ..adapters.fitting import check_fit
from ..adapters.manifest import Manifest
from ..adapters.resolve import resolve_name
from ..convert import check_impl, linearize_
from ..families import family_of
from ..matching import attention_modules, choose
from ..seam.original import ORIGINAL
from .flops import Step, StepFlops, count_step
from .random_weights import random_model
from .step_inputs import can_make_inputs, token_side

logger = logging.getLogger(__name__)

GIB = 2**30
Size = tuple[int, int]  # (height, width) in pixels


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions under which steps are timed.

    Attributes:
        device: Device to run on.
        dtype: Dtype of the weights.
        pairs: Timed forwards of each model, after warm-up.
        text_len: Text tokens; None: as in the family's pipelines.
        impl: As in `linearize_`.
        compiled: Compile the repeated blocks of both.
    """

    device: torch.device
    dtype: torch.dtype
    pairs: int = 3
    text_len: int | None = None
    impl: str = "auto"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be >= 1, got {self.pairs}")


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightlessConversion:
    """An adapter or a saved converted pipeline, with the shape of its base but without the base's weights.

    Attributes:
        name: Its name, as given.
        base: What the base's config files say.
        configs: {pattern: config}.
        dense_below: Image tokens of a call below which the original attention runs; 0 if weights were trained.
        adapter: Its manifest and tensors; None: a saved pipeline.
        steps: What a forward of the original does, for each size and text length counted so far.
    """

    name: str
    base: Base
    configs: dict[str, Any]
    dense_below: int
    adapter: tuple[Manifest, dict[str, Tensor]] | None
    steps: dict[tuple[Size, int | None], Step] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str | Path, *, base: str | Path | None = None, offline: bool = False) -> Self:
        """Read an adapter or a saved pipeline.

        Args:
            name: Folder, `.safetensors` file or Hub id.
            base: Base to read instead of the one that an adapter names.
            offline: Do not access the network.
        Raises:
            ValueError: it is missing, damaged, not converted, a saved pipeline with trained weights, or of a model
                whose inputs cannot be generated; or `base` is given for something other than an adapter.
        """
        resolved = resolve_name(name, base=base, offline=offline)
        found, conversion, adapter = resolved.base, resolved.require_conversion(), None
        if isinstance(conversion, Manifest):
            adapter = conversion, adapter_tensors(resolved.place, conversion)
        elif conversion.trained:
            raise ValueError(
                f"{name} keeps its trained parameters among its weights, which are not read: time the adapter instead "
                "(save one with lineardit.save_adapter on the loaded pipeline)"
            )
        if not can_make_inputs(build_on_meta(found)):
            raise ValueError(
                f"the inputs of a {found.model_class} cannot be generated: use `lineardit evaluate`, which times whole "
                "images"
            )
        configs, dense_below = conversion.configs(), conversion.dense_tokens
        return cls(name=str(name), base=found, configs=configs, dense_below=dense_below, adapter=adapter)

    def supported_sizes(self, sizes: Sequence[Size], conditions: Conditions, *, require_all: bool = True) -> list[Size]:
        """The sizes that the model supports.

        Args:
            require_all: Raise for any unsupported size; False: leave it out with a warning, and raise only if none is
                left.
        Raises:
            ValueError: a size is unsupported, the conversion is of another model, the implementation is unknown, or the
                weights do not fit into memory.
        """
        for config in self.configs.values():
            check_impl(conditions.impl, type(config))
        model = build_on_meta(self.base, dtype=conditions.dtype)
        if self.adapter is not None:
            check_fit(self.adapter[0], model, family_of(model))
        multiple = self.base.vae_scale * token_side(model)
        supported = []
        for size in sizes:
            try:
                self._check_size(size, multiple, conditions.text_len)
                supported.append(size)
            except ValueError as error:
                if require_all or (size == sizes[-1] and not supported):
                    raise
                logger.warning("%s: skipped, %s", self.name, error)
        needed, free = sum(weight.nbytes for weight in model.parameters()), _free_bytes(conditions.device)
        if needed > free:
            raise ValueError(
                f"the weights of this {self.base.model_class} are {needed / GIB:.1f} GiB in "
                f"{dtype_name(conditions.dtype)}, but {free / GIB:.1f} are free on {conditions.device}: "
                "use a smaller dtype or another device, or time fewer bits with `lineardit evaluate --quantize ...`"
            )
        return supported

    def _check_size(self, size: Size, multiple: int, text_len: int | None) -> None:
        if any(side % multiple for side in size):
            raise ValueError(f"sides must be multiples of {multiple} pixels for this model, got {size[1]}x{size[0]}")
        self._step(size, text_len)

    def model(self, conditions: Conditions) -> nn.Module:
        """A denoiser of the base's shape, with random weights, converted."""
        config = {key: value for key, value in self.base.config.items() if key != CONFIG_KEY}
        model = random_model(self.base.model_class, config, conditions.device, conditions.dtype)
        if self.adapter is None:
            linearize_(model, self.configs, dense_below=self.dense_below, impl=conditions.impl)
        else:
            apply_adapter_(model, *self.adapter, keep_original=True, impl=conditions.impl)
        return model

    def count_size(self, size: Size, conditions: Conditions) -> tuple[int, StepFlops, str]:
        """Image tokens, operations, and what runs, for one size."""
        step, model = self._step(size, conditions.text_len), build_on_meta(self.base)
        modules, _ = attention_modules(model, family_of(model))
        configs = choose(list(modules), self.configs, None)
        dense_below = self.dense_below if conditions.impl == "auto" else 0
        runs = conditions.impl
        if runs == "auto":
            like = torch.empty(1, device=conditions.device, dtype=conditions.dtype)
            impls = {step.auto_impl(name, config, like, dense_below=dense_below) for name, config in configs.items()}
            if conditions.compiled:  # what a trace picks is unknown here
                impls = {one if one.startswith(ORIGINAL) else "auto" for one in impls}
            runs = ", ".join(sorted(impls))
        return prod(step.grid), step.flops(configs, dense_below=dense_below), runs

    def _step(self, size: Size, text_len: int | None) -> Step:
        """What a forward of the original does, counted once; a ValueError for an unsupported size or text length."""
        if (size, text_len) not in self.steps:
            self.steps[size, text_len] = self._count(size, text_len)
        return self.steps[size, text_len]

    def _count(self, size: Size, text_len: int | None) -> Step:
        width_height, model_class = f"{size[1]}x{size[0]}", self.base.model_class
        model = build_on_meta(self.base)
        try:
            step = count_step(model, self.latents(size), width_height, text_len=text_len)
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(failure_text(model_class, width_height, error)) from error
        if step is None:
            raise ValueError(f"a {model_class} with this config has no positions for {width_height}")
        return step

    def latents(self, size: Size) -> Size:
        """(height, width) in the VAE's latents."""
        return size[0] // self.base.vae_scale, size[1] // self.base.vae_scale


def failure_text(model_class: str, width_height: str, error: Exception) -> str:
    """Error message about a forward that raised."""
    message = str(error).strip().partition("\n")[0]
    return f"a step of a {model_class} at {width_height} failed ({type(error).__name__}: {message})"


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
