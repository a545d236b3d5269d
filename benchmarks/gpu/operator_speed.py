"""The operator at FLUX.1's shape: ours, FlexAttention in two orders, dense attention, NATTEN; forward and backward."""

from functools import partial
from itertools import product

import torch
from torch.nn.attention.flex_attention import create_block_mask

from .bench import Bench, Measurement, Shape, Task, Tasks, UnavailableError, shape_of
from .competitors import COMPETITORS, Attention, Competitor, ours, pairs_attending, tiled
from .flex_window import row_major_mask_mod
from .focus import operator_tasks as focus_tasks
from .names import CLEAR_FLEX, DENSE, PORTABLE, case_name, size_name
from .timing import peak_gib, seconds, shared_memory

PART = "operator"
CARD = ("this card", "rates")  # the case and impl of the first row
SLOW_SIDE = 512  # here, only the dense call that was faster at half this side is timed
MARKED = ((256, 16), (512, 8))  # (side, radius): these first, should time run out


def tasks(bench: Bench) -> Tasks:
    scale = bench.scale
    yield Task(part=PART, case=CARD[0], impl=CARD[1], measure=partial(card_rates, bench))
    for side, name, backward in product(scale.sides, DENSE, (False, True)):
        yield _task(bench, side, None, name, COMPETITORS[name], backward=backward)
    for backward, side, radius in product((False, True), scale.sides, scale.radii):
        yield _task(bench, side, radius, bench.impl, ours, backward=backward)

    others = [name for name in COMPETITORS if name not in DENSE]
    cases = list(product((False, True), scale.sides, scale.radii))
    marked = [case for case in cases if case[1:] in MARKED]
    for backward, side, radius in dict.fromkeys([*marked, *cases]):
        for name in others:
            yield _task(bench, side, radius, name, COMPETITORS[name], backward=backward)
    yield from focus_tasks(bench)
    *_, side = (side for side in scale.sides if side < SLOW_SIDE)
    for backward in (False, True):
        yield _task(bench, side, scale.radii[len(scale.radii) // 2], PORTABLE, tiled, backward=backward)
    for side in scale.sides:
        measure = partial(mask_creation, bench, shape_of(scale, side, scale.radii[0]))
        yield Task(part=PART, case=f"{size_name(side)}, its mask", impl="create_block_mask", measure=measure)


def _task(bench: Bench, side: int, radius: int | None, name: str, competitor: Competitor, *, backward: bool) -> Task:
    measure = partial(speed, bench, side, radius, name, competitor, backward=backward)
    return Task(part=PART, case=case_name(side, radius, backward=backward), impl=name, measure=measure)


def speed(
    bench: Bench, side: int, radius: int | None, name: str, competitor: Competitor, *, backward: bool
) -> Measurement:
    """Speed of one call; `radius` is None for dense attention."""
    if side >= SLOW_SIDE and name in DENSE:
        _check_fastest(bench, side // 2, name, backward=backward)
    shape = shape_of(bench.scale, side, radius or bench.scale.radii[0])
    attention = competitor(shape, bench, backward=backward)
    inputs = shape.tensors(bench.device, requires_grad=backward)
    grad_outs: list[torch.Tensor] = []  # made once, at the first run

    def run() -> None:
        outs = attention.call(*inputs)
        if backward:
            grad_outs.extend(torch.randn_like(out) for out in outs[len(grad_outs) :])
            torch.autograd.grad(outs, inputs, grad_outs)

    peak = peak_gib(run, bench.device)
    elapsed = seconds(run, bench.device, repeats=bench.scale.repeats)
    figures = {"milliseconds": 1e3 * elapsed, "peak_gib": peak}
    figures |= _rates(bench, shape, attention, elapsed, dense=radius is None, backward=backward)
    dense = dense_milliseconds(bench, side, backward=backward)
    if dense is not None and radius is not None:
        figures["speedup"] = dense / figures["milliseconds"]
    return Measurement(figures=figures, note=attention.note)


def dense_milliseconds(bench: Bench, side: int, *, backward: bool) -> float | None:
    """Milliseconds of the faster dense call; None if none was measured."""
    case = case_name(side, None, backward=backward)
    times = [bench.results.figure(PART, case, name, "milliseconds") for name in DENSE]
    return min((time for time in times if time is not None), default=None)


def _check_fastest(bench: Bench, side: int, name: str, *, backward: bool) -> None:
    times = {
        other: time
        for other in DENSE
        if (time := bench.results.figure(PART, case_name(side, None, backward=backward), other, "milliseconds"))
    }
    fastest = min(times, key=times.__getitem__, default=name)
    row = bench.results.find(PART, case_name(2 * side, None, backward=backward), fastest)
    if fastest != name and (row is None or row.status == "measured"):
        raise UnavailableError(f"not timed: {fastest} is faster at {size_name(side)}")


def _rates(
    bench: Bench, shape: Shape, attention: Attention, elapsed: float, *, dense: bool, backward: bool
) -> dict[str, float]:
    """TFLOP/s, and the share of what the card's own rates allow."""
    per_pair = 2 * shape.num_heads * shape.head_dim  # of one product: multiply and add
    pairs = shape.num_tokens**2 if dense else pairs_attending(shape)
    useful = pairs * per_pair * (2 + 5 * backward)
    figures = {"useful_tflops": useful / elapsed / 1e12}
    if attention.pairs is not None:
        products = 2 * attention.pairs
        if backward:
            products += attention.backward_products * (attention.backward_pairs or attention.pairs)
        figures["computed_tflops"] = products * per_pair / elapsed / 1e12
    copy, matmul = (bench.results.figure(PART, *CARD, name) for name in ("copy_tb_per_s", "matmul_tflops"))
    if copy and matmul:
        # query, key, value, out; backward reads them and the gradient of out, and writes three gradients
        moved = (4 + 8 * backward) * shape.num_tokens * shape.num_heads * shape.head_dim * shape.dtype.itemsize
        figures["roofline_share"] = max(moved / copy, useful / matmul) / 1e12 / elapsed
    return figures


def card_rates(bench: Bench) -> Measurement:
    """Two ceilings: a large copy, and a large matrix product of random numbers."""
    scale, device = bench.scale, bench.device
    figures: dict[str, float] = {}
    size = scale.copy_bytes
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        size = min(size, free // 4)
        shared = shared_memory(device)
        figures = {"memory_gib": free / 2**30, "shared_memory_kib": shared / 2**10}
    source, target = torch.ones(2, size, dtype=torch.uint8, device=device)
    copy = partial(target.copy_, source)
    copy()
    copying = seconds(copy, device, repeats=scale.repeats)
    side = scale.matmul_side
    left, right = torch.randn(2, side, side, dtype=torch.bfloat16, device=device)
    multiply = partial(torch.mm, left, right)
    multiply()
    multiplying = seconds(multiply, device, repeats=scale.repeats)
    return Measurement(
        figures=figures
        | {"copy_tb_per_s": 2 * size / copying / 1e12, "matmul_tflops": 2 * side**3 / multiplying / 1e12}
    )


def mask_creation(bench: Bench, shape: Shape) -> Measurement:
    """Time of `create_block_mask`, compiled as CLEAR calls it, once for every size; other figures exclude it."""
    mask_mod = row_major_mask_mod(shape.side, shape.radius, shape.text_len)
    compiled = bench.device.type == "cuda"

    def run() -> None:
        create_block_mask(
            mask_mod, None, None, shape.num_tokens, shape.num_tokens, device=bench.device.type, _compile=compiled
        )

    torch.compiler.reset()
    peak = peak_gib(run, bench.device)
    elapsed = seconds(run, bench.device, repeats=1)
    return Measurement(figures={"milliseconds": 1e3 * elapsed, "peak_gib": peak}, note=f"for {CLEAR_FLEX}")
