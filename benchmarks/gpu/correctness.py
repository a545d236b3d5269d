"""Our implementations against float64: outputs and every gradient, operators, determinism, memory errors, a long run.

The tolerance is that of the tests (judging.py). `torch.empty` gives NaN during the calls that are judged.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lineardit.kernels.window import implementations, window_attention, window_attention_reference
from lineardit.kernels.window.choose import backward_tiles

from .bench import Bench, Measurement, OutOfTimeError, Shape, Task, Tasks, UnavailableError
from .cases import GENERAL, PORTABLE, SMOKE_CASES, Case
from .competitors import COMPETITORS, check_ours, tile_order
from .focus import correctness_tasks as focus_tasks
from .judging import nan_filled_memory, verdict
from .names import CLEAR_FLEX

PART = "correctness"
SAMPLED = 64  # queries of the long run that are computed exactly
REPEATS = 200
SANITIZER = "compute-sanitizer"
SANITIZER_ERROR = 86


def tasks(bench: Bench) -> Tasks:
    yield from case_tasks(bench)
    for name in (CLEAR_FLEX, "flex tiles"):
        yield _task("same function", name, partial(competitor_against_reference, bench, name))
    yield _task("torch.library.opcheck", bench.impl, partial(operators, bench))
    yield _task("two backward passes, bit for bit", bench.impl, partial(determinism, bench))
    repeats = 2 if bench.scale.few_cases else REPEATS
    yield _task(f"{repeats + 1} backward passes, bit for bit", bench.impl, partial(repetition, bench, repeats))
    long_side = bench.scale.long_side
    yield _task(f"{long_side**2} tokens, forward and backward", bench.impl, partial(long_run, bench))
    yield _task("compiled, as the first call of a process", "auto", partial(compiled_first, bench))
    yield _task(SANITIZER, bench.impl, partial(sanitizer, bench))


def case_tasks(bench: Bench) -> Tasks:
    """Small calls that together run every kernel that is compared."""
    for case in SMOKE_CASES if bench.scale.few_cases else GENERAL:
        yield _task(f"{case}", bench.impl, partial(against_reference, bench, case, bench.impl))
    for case in PORTABLE:
        if bench.impl != "tiled" and not bench.scale.few_cases:
            yield _task(f"{case}", "tiled", partial(against_reference, bench, case, "tiled"))
    yield from focus_tasks(bench)


def _task(case: str, impl: str, measure: Callable[[], Measurement]) -> Task:
    return Task(part=PART, case=case, impl=impl, measure=measure)


def against_reference(bench: Bench, case: Case, impl: str) -> Measurement:
    if impl not in implementations():
        raise UnavailableError(f"there is no implementation {impl!r}, but {implementations()}")
    if impl == bench.impl:
        _check(bench, case)
    inputs = case.inputs(bench.device)
    options = case.options(bench.device)
    grad_out = case.in_memory_order(torch.randn_like(inputs[0]))
    with nan_filled_memory():
        actual = outputs_and_gradients(partial(window_attention, impl=impl), inputs, options, grad_out)
    low = outputs_and_gradients(window_attention_reference, inputs, options, grad_out)
    doubles = [tensor.double() for tensor in inputs]
    exact = outputs_and_gradients(window_attention_reference, doubles, options, grad_out.double())
    return verdict(actual, exact, low)


def _check(bench: Bench, case: Case) -> None:
    """Raise as `check_ours` does, or RuntimeError if plain PyTorch would replace the backward's kernels."""
    check_ours(bench, case.dtype)
    if bench.impl == "triton" and backward_tiles(bench.device, case.dtype, case.head_dim) is None:
        raise RuntimeError("the kernels of the backward do not run here, or are wrong")


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], options: dict[str, Any], grad_out: Tensor
) -> list[Tensor]:
    """[out, gradient of every input]; inputs are query, key, value, and pooled key and value if there are any."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    query, key, value, *pooled = leaves
    out = function(query, key, value, pooled=tuple(pooled) or None, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def competitor_against_reference(bench: Bench, name: str) -> Measurement:
    """A competitor against the reference: whether its mask and its order are right; forward only."""
    shape = Shape(side=32, radius=5, text_len=128, num_heads=2, head_dim=64, dtype=bench.scale.dtype)
    attention = COMPETITORS[name](shape, bench, backward=False)
    query, key, value = shape.tensors(bench.device)
    options: dict[str, Any] = {"grid": (shape.side, shape.side), "radius": shape.radius, "text_len": shape.text_len}
    actual = torch.cat(attention.call(*_reordered(name, shape, query, key, value)), dim=2)
    low = window_attention_reference(query, key, value, **options)
    exact = window_attention_reference(query.double(), key.double(), value.double(), **options)
    expected = _reordered(name, shape, exact, low)
    return verdict([actual], expected[:1], expected[1:])


def _reordered(name: str, shape: Shape, *tensors: Tensor) -> list[Tensor]:
    """Tensors in tile order, if the competitor takes its tokens so."""
    if name == CLEAR_FLEX:
        return list(tensors)
    row, column = tile_order(shape.side, backward=False).row_and_column(
        torch.arange(shape.image_len, device=tensors[0].device)
    )
    index = torch.cat([torch.arange(shape.text_len, device=row.device), shape.text_len + row * shape.side + column])
    return [tensor.index_select(2, index) for tensor in tensors]


class _OperatorRecorder(TorchDispatchMode):
    """Records one call of each of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lineardit":
            self.calls.setdefault(func, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operators(bench: Bench) -> Measurement:
    """Every operator that a forward pass calls: schema, fake tensors, autograd, symbolic shapes."""
    case = Case(grid=(9, 14), radius=3, text_len=5, head_dim=16, dtype=torch.float32)
    _check(bench, case)
    query, key, value = (tensor.requires_grad_() for tensor in case.inputs(bench.device))
    with _OperatorRecorder() as recorded:
        window_attention(query, key, value, impl=bench.impl, **case.options(bench.device))
    if not recorded.calls:
        return Measurement(figures={}, note=f"{bench.impl} calls no operator of ours", passed=False)
    for operator, (args, kwargs) in recorded.calls.items():
        torch.library.opcheck(operator, *tree_map(_fresh, (args, kwargs)))
    return Measurement(figures={}, note=", ".join(str(operator) for operator in recorded.calls))


def _fresh(value: Any) -> Any:
    """A new leaf for a tensor; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def determinism(bench: Bench) -> Measurement:
    grid = (12, 20) if bench.scale.few_cases else (96, 160)
    case = Case(grid=grid, radius=5, text_len=77, head_dim=16, dtype=torch.float32)
    _check(bench, case)
    inputs, options = case.inputs(bench.device), case.options(bench.device)
    grad_out = torch.randn_like(inputs[0])
    function = partial(window_attention, impl=bench.impl)
    with sdpa_kernel(SDPBackend.MATH):  # for text queries: other float32 backends accumulate with atomics
        first, second = (outputs_and_gradients(function, inputs, options, grad_out) for _ in range(2))
    differing = [index for index, (a, b) in enumerate(zip(first, second, strict=True)) if not torch.equal(a, b)]
    note = f"these differ: {differing} of (out, gradients)" if differing else ""
    return Measurement(figures={}, note=note, passed=not differing)


def repetition(bench: Bench, repeats: int) -> Measurement:
    """Many passes in the precision and with the tiles of the speed rows: a product that does not wait for its loads
    shows only in some. Pooled tokens replace text, whose queries PyTorch computes.
    """
    scale = bench.scale
    small = scale.few_cases
    size: dict[str, Any] = (
        {"grid": (9, 14), "num_pooled": 5} if small else {"grid": (64, 64), "num_pooled": scale.text_len}
    )
    case = Case(
        radius=8,
        text_len=0,
        head_dim=scale.head_dim,
        num_heads=scale.num_heads,
        dtype=scale.dtype,
        token_major=True,
        **size,
    )
    _check(bench, case)
    inputs, options = case.inputs(bench.device), case.options(bench.device)
    grad_out = torch.randn_like(inputs[0])
    function = partial(window_attention, impl=bench.impl)
    first = outputs_and_gradients(function, inputs, options, grad_out)
    differing: set[int] = set()
    for _ in range(repeats):
        again = outputs_and_gradients(function, inputs, options, grad_out)
        differing |= {index for index, (a, b) in enumerate(zip(first, again, strict=True)) if not torch.equal(a, b)}
    note = f"these differ: {sorted(differing)} of (out, gradients)" if differing else ""
    return Measurement(figures={}, note=note, passed=not differing)


def long_run(bench: Bench) -> Measurement:
    """All is finite, and some queries match exact attention over all keys."""
    scale = bench.scale
    side, radius = scale.long_side, 8
    dim = scale.head_dim
    case = Case(grid=(side, side), radius=radius, text_len=128, head_dim=dim, dtype=scale.dtype, num_heads=1)
    _check(bench, case)
    inputs, options = case.inputs(bench.device), case.options(bench.device)
    grad_out = torch.randn_like(inputs[0])
    function = partial(window_attention, impl=bench.impl)
    out, *grads = outputs_and_gradients(function, inputs, options, grad_out)
    non_finite = [index for index, tensor in enumerate((out, *grads)) if not tensor.isfinite().all()]
    if non_finite:
        return Measurement(figures={}, note=f"not finite: {non_finite} of (out, gradients)", passed=False)
    tokens = torch.randperm(side * side, device=bench.device)[:SAMPLED]
    mask = _window_rows(tokens, side, radius, case.text_len)
    query, key, value = (inputs[0][:, :, case.text_len + tokens], *inputs[1:])
    exact = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), attn_mask=mask)
    low = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return verdict([out[:, :, case.text_len + tokens]], [exact], [low])


def _window_rows(tokens: Tensor, side: int, radius: int, text_len: int) -> Tensor:
    """[tokens, text_len + side * side] bool: what these image tokens attend to."""
    keys = torch.arange(side * side, device=tokens.device)
    rows, columns = (tokens // side)[:, None] - keys // side, (tokens % side)[:, None] - keys % side
    return F.pad(rows**2 + columns**2 < radius**2, (text_len, 0), value=True)


def compiled_first(bench: Bench) -> Measurement:
    """What "auto" runs in a graph traced before anything has run, as a model's compiled blocks may be."""
    lines, _ = _run_command([sys.executable, "-m", f"{__package__}.compiled_run", str(bench.device)], bench)
    try:
        result = json.loads(lines[-1])
    except json.JSONDecodeError:
        raise RuntimeError("\n".join(lines)) from None
    ran = result.pop("ran")
    measured = Measurement(**result)
    as_expected = ran == "triton" or bench.device.type != "cuda"
    return replace(measured, note=f"{ran} ran; {measured.note}", passed=measured.passed and as_expected)


def sanitizer(bench: Bench) -> Measurement:
    """A small forward and backward under NVIDIA's memory checker, where that is installed."""
    if bench.device.type != "cuda" or shutil.which(SANITIZER) is None:
        raise UnavailableError(f"{SANITIZER} needs a GPU, and to be installed")
    check_ours(bench, torch.float16)
    # driver calls may fail: torch asks for features that some machines lack
    command = [SANITIZER, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", str(SANITIZER_ERROR)]
    command += [sys.executable, "-m", f"{__package__}.small_run", bench.impl]
    lines, code = _run_command(command, bench, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if any("Device not supported" in line for line in lines):
        raise UnavailableError(f"{SANITIZER} says that it does not support this device")
    if code not in (0, SANITIZER_ERROR):
        raise UnavailableError(f"{SANITIZER} ended with {code}: {lines[-1]}")
    return Measurement(figures={}, note=lines[-1].strip("= "), passed=code == 0)


def _run_command(command: Sequence[str], bench: Bench, **environment: str) -> tuple[list[str], int]:
    """The output lines of a command, and its exit code."""
    limit = max(20.0, bench.seconds_left())
    # In a new session, so that the processes it started can be killed with it.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    ) as run:
        try:
            output, _ = run.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            raise OutOfTimeError(f"{' '.join(command[:3])} took longer than {limit:.0f} s; run it again") from None
    return output.strip().splitlines() or [""], run.returncode
