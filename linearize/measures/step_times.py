"""How long one denoising step takes on this machine before and after conversion: what `lineardit bench` does.

The denoiser stands alone, in its true shape and with random weights: what a step takes does not depend on their values.
So configs and adapters are all that is read, and neither text encoders nor a VAE take memory. The original and the
conversion run in turn, on one copy of the weights, so that both meet the same load of the machine.
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
from .named_inputs import with_numbers
from .recording import with_own_lists
from .step_inputs import step_inputs
from .weightless_conversion import GIB, Conditions, Size, WeightlessConversion, failed


def _untimed(device_type: str) -> int:
    """Forwards before those that count; on a GPU one more."""
    return 2 if device_type == "cuda" else 1


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """What a step takes at one size, before and after conversion.

    Attributes:
        height, width: In pixels.
        tokens: Of the image.
        flops: Operations before and after.
        runs: Implementations that the converted modules pick, as "tiled" or "masked, tiled"; "auto" where they are
            compiled; "original (...)" where that call is made.
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
    def is_original(self) -> bool:
        """Whether every converted module makes its original call."""
        return all(one.startswith(ORIGINAL) for one in self.runs.split(", "))

    @property
    def speedup(self) -> float | None:
        """The median over pairs of the original's seconds to the converted model's; None without both."""
        if self.original is None or self.converted is None:
            return None
        return median(one / other for one, other in zip(self.original, self.converted, strict=True))


def time_steps(conversion: WeightlessConversion, sizes: Sequence[Size], conditions: Conditions) -> Iterator[StepTime]:
    """Time a step of the original and of the conversion in turn, size by size.

    Args:
        sizes: (height, width) in pixels.
    Raises:
        ValueError: the model cannot make a size, its weights do not fit into memory, or a forward fails.
    """
    device, dtype = conditions.device, conditions.dtype
    with _only(device):
        conversion.fitting(sizes, conditions)
        model = conversion.model(conditions)
        if conditions.compiled:
            torch.compiler.reset()  # without what it has learnt from other conversions
            compile_(model)
        forwards = 2 * (_untimed(device.type) + conditions.pairs) * len(sizes)
        with tqdm(total=forwards, desc=conversion.name, unit="step") as progress:
            for size in sizes:
                width_height = f"{size[1]}x{size[0]}"
                try:
                    tokens, flops, runs = conversion.counted(size, conditions)
                    made = step_inputs(
                        model, family_of(model).name, conversion.latents(size), text_len=conditions.text_len
                    )
                    inputs = tree_map_only(Tensor, lambda one: with_numbers(one, device, dtype), made)
                    original, converted = _in_turn(model, cast(dict[str, Any], inputs), conditions.pairs, progress)
                except (RuntimeError, LookupError, TypeError, ValueError) as error:
                    raise ValueError(failed(conversion.base.model_class, width_height, error)) from error
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
def _only(device: torch.device) -> Iterator[None]:
    """Inside, a GPU is the current one, and holds nothing that an earlier model has left."""
    gc.collect()
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        torch.cuda.empty_cache()
        yield


def _in_turn(model: nn.Module, inputs: dict[str, Any], pairs: int, progress: "tqdm[Any]") -> tuple["_Timed", "_Timed"]:
    """The original and the conversion, each warmed up, on a GPU watched once for memory, then timed `pairs` times."""
    original, converted = _Timed(model, inputs), _Timed(model, inputs)
    for turn in range(_untimed(original.device.type) + pairs):
        converted.run(turn)
        with dense(model):
            original.run(turn)
        progress.update(2)
    return original, converted


class _Timed:
    """Forwards of a model on the same inputs; out of memory, there are none."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.seconds: tuple[float, ...] | None = ()
        self.gib: float | None = None

    def run(self, turn: int) -> None:
        """One more forward: the first warms up (trials, compilation), on a GPU the second counts memory."""
        if self.seconds is None:
            return
        counts = self.on_gpu and turn == 1
        if counts:
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = self._forward()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.seconds = self.gib = None
        if self.seconds is None:
            if self.on_gpu:
                torch.cuda.empty_cache()  # by now no traceback holds what the forward had made
        elif counts:
            self.gib = torch.cuda.max_memory_allocated() / GIB
        elif turn >= _untimed(self.device.type):
            self.seconds = (*self.seconds, seconds)

    @torch.no_grad()
    def _forward(self) -> float:
        """Run one; the seconds that it took."""
        inputs = with_own_lists(self.inputs)
        self._wait()
        began = time.perf_counter()
        self.model(**inputs)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
