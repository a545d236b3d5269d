"""One step of FLUX.1-dev's transformer with compiled blocks: dense, CLEAR's way, ours; seconds and peak memory."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineardit.kernels.focus.choose import why_not as why_no_focus
from lineardit.kernels.window.choose import why_not_triton

from .bench import Bench, Measurement, Task, Tasks, UnavailableError
from .names import CLEAR_STEP, DENSE, DENSE_STEP, FOCUS_STEP, HYBRID_STEP, OUR_STEPS, case_name, size_name
from .timing import peak_gib, seconds

PART = "model"
MAX_STEP_SECONDS = 10.0  # seconds: steps expected to take longer are extrapolated from a few blocks
CLEAR_RADIUS = 8
FOCUS_SIDE = 8
SIDES_IN_ORDER, SIDES_OF_16 = (256, 512, 64, 128), (64, 256, 512, 128)  # sides of marks first, should time run out
REPEATS, TIMING_SECONDS = 15, 3.0  # steps of one timing, and seconds of them: a mark at 1K allows 2%


def tasks(bench: Bench) -> Tasks:
    if importlib.util.find_spec("diffusers") is None:
        yield Task(part=PART, case="FLUX.1-dev's transformer", impl=DENSE_STEP, measure=_no_diffusers)
        return
    cached = CachedModel(bench)
    for impl in (DENSE_STEP, *OUR_STEPS.values(), CLEAR_STEP, HYBRID_STEP, FOCUS_STEP):
        sides = SIDES_OF_16 if impl == OUR_STEPS[16] else SIDES_IN_ORDER
        for side in [one for one in sides if one in bench.scale.sides] or bench.scale.sides:
            measure = partial(measure_step, bench, cached, impl, side)
            yield Task(part=PART, case=size_name(side), impl=impl, measure=measure)


def _no_diffusers() -> Measurement:
    raise UnavailableError("diffusers is not installed")


class CachedModel:
    """The model, built when first needed, as last converted and compiled."""

    def __init__(self, bench: Bench, *, compiled: bool = True) -> None:
        self.bench = bench
        self.compiled = compiled
        self.units = self.total_units = 0
        self._model: Any = None
        self._impl = ""

    def converted(self, impl: str) -> Any:
        """The model with DENSE_STEP attention, CLEAR_STEP or ours. CLEAR's way is recompiled for every size."""
        from . import flux

        if self._model is None:
            self.units, self.total_units = flux.units_that_fit(self.bench.scale)
            self._model = flux.build(self.bench.scale, self.units)
        if impl != self._impl:
            _convert(self._model, impl, self.bench)
        if self.compiled and (impl != self._impl or impl == CLEAR_STEP):
            _compile(self._model, self.bench.scale.backend)
        self._impl = impl
        return self._model


def _convert(model: Any, impl: str, bench: Bench) -> None:
    from lineardit import Clear, Hybrid, ProxyTokens, linearize_, restore_

    from .row_major_flex import RowMajorFlex, register

    if impl == DENSE_STEP:
        if "lineardit" in model.config:
            restore_(model)
    elif impl == CLEAR_STEP:
        register()
        linearize_(model, RowMajorFlex(radius=CLEAR_RADIUS, text_len=bench.scale.text_len))
    else:
        method: Any = Clear(radius=next(radius for radius, name in OUR_STEPS.items() if impl.startswith(name)))
        if impl == HYBRID_STEP:
            method = Hybrid(local=method, global_=ProxyTokens(num_proxies=256), gate=1.0)
        elif impl == FOCUS_STEP:
            tokens = bench.scale.focus_tokens
            proxies = ProxyTokens(num_proxies=tokens)
            method = Hybrid(local=method, global_=proxies, gate=1.0, focus_tokens=tokens, focus_side=FOCUS_SIDE)
        # "auto" is what users get; it never chooses the interpreter of a smoke run
        linearize_(model, method, impl=bench.impl if bench.results.head.smoke else "auto")


def _compile(model: Any, backend: str) -> None:
    """Compile the blocks, after dropping the graphs of another attention."""
    from lineardit.linearize.compiling import compile_

    torch.compiler.reset()
    compile_(model, backend=backend)


def measure_step(bench: Bench, cached: CachedModel, impl: str, side: int) -> Measurement:
    """Measure one unit of blocks first, which compiles and tells whether there is time for the whole step."""
    from . import flux

    check_no_fallback(bench, impl)
    model = cached.converted(impl)
    run = flux.step(model, bench.scale, side)
    with fastest_dense(bench) if impl == DENSE_STEP else nullcontext():
        with flux.first_units(model, 1):
            peak = peak_gib(partial(_finite, run), bench.device)
            one_unit = _seconds(run, bench)
        expected = one_unit * cached.total_units
        if cached.units == cached.total_units and expected <= MAX_STEP_SECONDS and 3 * expected < bench.seconds_left():
            peak = peak_gib(partial(_finite, run), bench.device)
            elapsed, note = _seconds(run, bench), ""
        else:
            with flux.first_units(model, 2):
                elapsed = extrapolate(one_unit, _seconds(run, bench), cached.total_units)
            note = f"time extrapolated from 1 and 2 of {cached.total_units} units of blocks, all of one size"
            if cached.units < cached.total_units:
                note += f"; memory with the weights of {cached.units} units, which is what fits"
    figures = {"seconds": elapsed, "peak_gib": peak}
    dense = bench.results.figure(PART, size_name(side), DENSE_STEP, "seconds")
    if dense is not None:
        figures["speedup"] = dense / elapsed
    return Measurement(figures=figures, note=note)


def check_no_fallback(bench: Bench, impl: str) -> None:
    """Raise a RuntimeError if a row of ours would time plain PyTorch."""
    if bench.device.type != "cuda" or bench.impl != "triton" or impl in (DENSE_STEP, CLEAR_STEP):
        return
    kernel = bench.device, bench.scale.dtype, bench.scale.head_dim
    reason = why_no_focus(*kernel, FOCUS_SIDE) if impl == FOCUS_STEP else why_not_triton(*kernel)
    if reason is not None:
        raise RuntimeError(f"our kernels fall back to plain PyTorch: {reason}")


def fastest_dense(bench: Bench) -> AbstractContextManager[None]:
    """A context in which dense attention is the faster operator at 4K, or cuDNN's if that was not measured."""
    case = case_name(256, None, backward=False)
    cudnn, flash = (bench.results.figure("operator", case, name, "milliseconds") for name in DENSE)
    if bench.device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if cudnn is not None and flash is not None and flash < cudnn:
        order.reverse()
    return sdpa_kernel(order, set_priority=True)


def extrapolate(one_unit: float, two_units: float, units: int) -> float:
    """Seconds of a step with `units` units, from steps with 1 and 2."""
    return one_unit + (units - 1) * (two_units - one_unit)


def _seconds(run: Callable[[], Tensor], bench: Bench) -> float:
    return seconds(run, bench.device, repeats=min(bench.scale.repeats, REPEATS), budget=TIMING_SECONDS)


def _finite(run: Callable[[], Tensor]) -> None:
    if not run().isfinite().all():
        raise ValueError("the step's output is not finite")
