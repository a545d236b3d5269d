"""Times one denoising step on this machine before and after conversion: what `lineardit bench` does.

The denoiser runs alone, at full size and with random weights, whose values do not affect the time. So only configs and
adapters are read, and neither text encoders nor a VAE take memory. The original and the conversion alternate, on one
copy of the weights, so that both see the same load of the machine.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from ..compiling import compile_
from ..convert import dense
from ..errors import is_out_of_memory
from ..families import family_of
from ..seam.original import ORIGINAL
from .flops import StepFlops
from .named_inputs import with_values
from .recording import copy_lists
from .step_inputs import step_inputs
from .weightless_conversion import GIB, Conditions, Size, WeightlessConversion, failure_text


def _num_warmup_runs(device_type: str) -> int:
    """Number of warm-up forwards, on a GPU plus one that measures memory."""
    return 2 if device_type == "cuda" else 1


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Time and memory of a step at one size, before and after conversion.

    Attributes:
        height, width: In pixels.
        tokens: Number of image tokens.
        flops: Operations before and after.
        runs: Implementations that the converted modules run, such as "tiled" or "masked, tiled"; "auto" if compiled;
            "original (...)" for the original call.
        original, converted: Seconds of each timed forward; None: out of memory.
        original_gib, converted_gib: Peak memory in GiB, weights included; None: out of memory, or not counted.
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
    def is_original(self) -> bool:
        """Whether every converted module makes its original call."""
        return all(one.startswith(ORIGINAL) for one in self.runs.split(", "))

    @property
    def speedup(self) -> float | None:
        """Median over pairs of original / converted seconds; None without both."""
        if self.original is None or self.converted is None:
            return None
        return median(one / other for one, other in zip(self.original, self.converted, strict=True))


def time_steps(conversion: WeightlessConversion, sizes: Sequence[Size], conditions: Conditions) -> Iterator[StepTime]:
    """Time a step of the original and of the conversion alternately, size by size.

    Args:
        sizes: (height, width) in pixels.
    Raises:
        ValueError: the model does not support a size, its weights do not fit into memory, or a forward fails.
    """
    device, dtype = conditions.device, conditions.dtype
    with _use_device(device):
        conversion.supported_sizes(sizes, conditions)
        model = conversion.model(conditions)
        if conditions.compiled:
            torch.compiler.reset()  # drop graphs and dynamic sizes of earlier conversions
            compile_(model)
        forwards = 2 * (_num_warmup_runs(device.type) + conditions.pairs) * len(sizes)
        with tqdm(total=forwards, desc=conversion.name, unit="step") as progress:
            for size in sizes:
                width_height = f"{size[1]}x{size[0]}"
                try:
                    tokens, flops, runs = conversion.count_size(size, conditions)
                    meta_inputs = step_inputs(
                        model, family_of(model).name, conversion.latents(size), text_len=conditions.text_len
                    )
                    inputs = tree_map_only(Tensor, lambda one: with_values(one, device, dtype), meta_inputs)
                    original, converted = _time_alternately(
                        model, cast(dict[str, Any], inputs), conditions.pairs, progress
                    )
                except (RuntimeError, LookupError, TypeError, ValueError) as error:
                    raise ValueError(failure_text(conversion.base.model_class, width_height, error)) from error
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


@contextmanager
def _use_device(device: torch.device) -> Iterator[None]:
    """Make a GPU the current device, after freeing what an earlier model left on it."""
    gc.collect()
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        yield


def _time_alternately(
    model: nn.Module, inputs: dict[str, Any], pairs: int, progress: "tqdm[Any]"
) -> tuple["_TimedModel", "_TimedModel"]:
    """Run both models alternately: warm up, on a GPU measure memory once, then time `pairs` forwards of each."""
    original, converted = _TimedModel(model, inputs), _TimedModel(model, inputs)
    for index in range(_num_warmup_runs(original.device.type) + pairs):
        converted.run(index)
        with dense(model):
            original.run(index)
        progress.update(2)
    return original, converted


class _TimedModel:
    """Forwards of a model on the same inputs; `seconds` is None once one ran out of memory."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.seconds: tuple[float, ...] | None = ()
        self.gib: float | None = None

    def run(self, index: int) -> None:
        """Run one more forward: the first warms up (kernel trials, compilation), on a GPU the second counts memory."""
        if self.seconds is None:
            return
        counts_memory = self.on_gpu and index == 1
        if counts_memory:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = self._forward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.seconds = self.gib = None
        if self.seconds is None:
            if self.on_gpu:
                torch.cuda.empty_cache()  # only here has the traceback released the forward's tensors
        elif counts_memory:
            self.gib = torch.cuda.max_memory_allocated() / GIB
        elif index >= _num_warmup_runs(self.device.type):
            self.seconds = (*self.seconds, seconds)

    @torch.no_grad()
    def _forward(self) -> float:
        """Run one forward and return its seconds."""
        inputs = copy_lists(self.inputs)
        self._wait()
        began = time.perf_counter()
        self.model(**inputs)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
