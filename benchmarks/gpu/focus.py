"""Cells in focus (kernels/focus): the kernels against float64, and their time at FLUX.1's shape."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from lineardit.kernels.focus.attention import cells_in_focus, focus_attention, focus_backward_op, focus_op
from lineardit.kernels.focus.choose import backward_blocks, choose_impl
from lineardit.kernels.focus.tables import focus_tables
from lineardit.kernels.pieces.cell_means import cell_means
from lineardit.kernels.pieces.results import dtype_name
from lineardit.kernels.window import Circle
from lineardit.kernels.window.windows import from_arguments, to_arguments

from .bench import Bench, Measurement, Task, Tasks, UnavailableError
from .judging import nan_filled_memory, verdict
from .names import size_name
from .timing import peak_gib, seconds

RADIUS = 16
TILE_SIDES = (4, 8)
MIN_AGREEMENT = 0.99  # of the tiles must choose the same cells as in float64; near a tie, rounding decides


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call."""

    grid: tuple[int, ...]
    radius: float
    num_cells: int
    num_tokens: int
    side: int
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 2
    batch: int = 1

    def __str__(self) -> str:
        grid, dtype = "x".join(map(str, self.grid)), dtype_name(self.dtype)
        tokens = f"{self.num_tokens} tokens of {self.num_cells} cells in focus"
        return f"{grid}, radius {self.radius:g}, {tokens}, tiles of {self.side}, {self.head_dim}, {dtype}"

    def inputs(self, device: torch.device) -> list[Tensor]:
        """query, key, value, proxy_key, proxy_value."""
        size = (self.batch, self.num_heads, math.prod(self.grid), self.head_dim)
        query, key, value = (torch.randn(size, device=device).to(self.dtype) for _ in range(3))
        proxies = (cell_means(x, *self.grid[-2:], self.num_cells).to(self.dtype) for x in (key, value))
        return [query, key, value, *proxies]


HALF, FLOAT = torch.float16, torch.float32
CASES = (
    Case(grid=(64, 64), radius=8, num_cells=256, num_tokens=256, side=8),
    Case(grid=(64, 64), radius=8, num_cells=256, num_tokens=256, side=4),
    Case(grid=(37, 29), radius=4, num_cells=49, num_tokens=200, side=4, dtype=HALF, head_dim=72, batch=2),
    Case(grid=(3, 20, 24), radius=5, num_cells=64, num_tokens=150, side=8, head_dim=64),
    Case(grid=(48, 80), radius=8, num_cells=60, num_tokens=640, side=5, dtype=FLOAT, head_dim=64),
    Case(grid=(40, 40), radius=4, num_cells=100, num_tokens=160, side=8, head_dim=256),
)
SMOKE_CASES = (Case(grid=(9, 14), radius=3, num_cells=9, num_tokens=50, side=4, head_dim=16, dtype=FLOAT),)


def correctness_tasks(bench: Bench) -> Tasks:
    for case in SMOKE_CASES if bench.scale.few_cases else CASES:
        yield Task(
            part="correctness", case=str(case), impl=focus_impl(bench), measure=partial(against_plain, bench, case)
        )
        measure = partial(gradients_against_plain, bench, case)
        yield Task(part="correctness", case=f"{case}, gradients", impl=focus_impl(bench), measure=measure)


def operator_tasks(bench: Bench) -> Tasks:
    tile_sides = TILE_SIDES[-1:] if bench.scale.few_cases else TILE_SIDES
    for backward, picture, side in product((False, True), bench.scale.sides, tile_sides):
        case = f"{size_name(picture)}, cells in focus, tiles of {side}" + ", backward" * backward
        measure = partial(speed, bench, picture, side, backward=backward)
        yield Task(part="operator", case=case, impl=focus_impl(bench), measure=measure)


def focus_impl(bench: Bench) -> str:
    return "triton" if bench.impl == "triton" else "plain"


def _check(bench: Bench, case: Case, *, backward: bool = False) -> None:
    """Raise UnavailableError if our implementation cannot run, RuntimeError if plain PyTorch replaces its backward."""
    query = torch.empty(1, 1, 1, case.head_dim, dtype=case.dtype, device=bench.device)
    try:
        choose_impl(query, case.side, focus_impl(bench))
    except ValueError as error:
        raise UnavailableError(str(error)) from None
    kernel = bench.device, case.dtype, case.head_dim, case.side
    if backward and focus_impl(bench) == "triton" and backward_blocks(*kernel) is None:
        raise RuntimeError("the kernels of the backward do not run here, or are wrong")


def against_plain(bench: Bench, case: Case) -> Measurement:
    """out and log-sum-exp of the tiles that choose the same cells as in float64; plain PyTorch is tested on CPUs."""
    _check(bench, case)
    inputs = case.inputs(bench.device)
    count = cells_in_focus(case.num_tokens, case.num_cells, case.grid)
    window = to_arguments(Circle(radius=case.radius))

    def run(tensors: list[Tensor], impl: str) -> tuple[Tensor, Tensor, Tensor]:
        return focus_op(*tensors, case.grid, count, case.side, case.head_dim**-0.5, impl, *window)

    with nan_filled_memory():
        actual, actual_lse, chosen = run(inputs, focus_impl(bench))
    exact, exact_lse, expected = run([x.double() for x in inputs], "plain")
    low, low_lse, low_chosen = run(inputs, "plain")  # in float32, and rounded
    same = (chosen.sort(3).values == expected.sort(3).values).all(3)  # [B, H, tiles]
    if not same.float().mean() >= MIN_AGREEMENT:
        return Measurement(figures={}, note=f"WRONG: {same.float().mean():.2%} of tiles choose alike", passed=False)
    same &= (low_chosen.sort(3).values == expected.sort(3).values).all(3)
    float64 = torch.float64
    tables = focus_tables(case.grid, from_arguments(*window), case.num_cells, case.side, float64, bench.device, float64)
    rows = torch.zeros_like(exact_lse, dtype=torch.bool)
    rows[:, :, tables.tiles[tables.real]] = same.repeat_interleave(tables.real.sum(1), 2)
    pairs = ((actual, actual_lse), (exact, exact_lse), (low, low_lse))
    return verdict(*([out[rows], lse[rows]] for out, lse in pairs), names=("out", "log-sum-exp"))


def gradients_against_plain(bench: Bench, case: Case) -> Measurement:
    """Gradients of all inputs, given float64's output, log-sum-exp and choice; the kernels' runs must be bit-equal."""
    _check(bench, case, backward=True)
    inputs = case.inputs(bench.device)
    doubles = [x.double() for x in inputs]
    count = cells_in_focus(case.num_tokens, case.num_cells, case.grid)
    shape = (case.grid, count, case.side, case.head_dim**-0.5)
    window = to_arguments(Circle(radius=case.radius))
    out, lse, chosen = focus_op(*doubles, *shape, "plain", *window)
    grad_out, grad_lse = torch.randn_like(inputs[0]), torch.randn_like(lse.float())

    def run(tensors: list[Tensor], impl: str) -> list[Tensor]:
        dtype, sums = tensors[0].dtype, torch.promote_types(tensors[0].dtype, torch.float32)
        arguments = (grad_out.to(dtype), grad_lse.to(sums), *tensors, out.to(dtype), lse.to(sums), chosen)
        return list(focus_backward_op(*arguments, *shape, impl, *window))

    with nan_filled_memory():
        actual, again = (run(inputs, focus_impl(bench)) for _ in range(2))
    names = ("query", "key", "value", "proxy_key", "proxy_value")
    differing = [name for name, one, other in zip(names, actual, again, strict=True) if not torch.equal(one, other)]
    if differing and focus_impl(bench) == "triton":
        return Measurement(figures={}, note=f"two runs differ: gradients of {', '.join(differing)}", passed=False)
    return verdict(actual, run(doubles, "plain"), run(inputs, "plain"), names=[f"gradient of {name}" for name in names])


def speed(bench: Bench, picture: int, side: int, *, backward: bool) -> Measurement:
    """Speed of a forward, with `backward` of both; includes the choice of cells, but not the window and the pooling."""
    scale, grid = bench.scale, (picture, picture)
    num_cells = min(scale.focus_tokens, picture**2 // 4)
    case = Case(
        grid=grid,
        radius=RADIUS if picture > 2 * RADIUS else picture / 4,
        num_cells=num_cells,
        num_tokens=scale.focus_tokens,
        side=side,
        head_dim=scale.head_dim,
        dtype=scale.dtype,
        num_heads=scale.num_heads,
    )
    _check(bench, case, backward=backward)
    inputs = [x.requires_grad_(backward) for x in case.inputs(bench.device)]
    grad_outs = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:3], device=bench.device)
    call = partial(
        focus_attention,
        *inputs,
        grid=grid,
        window=Circle(radius=case.radius),
        num_tokens=case.num_tokens,
        side=side,
        scale=case.head_dim**-0.5,
        impl=focus_impl(bench),
    )

    def run() -> None:
        outs = call()
        if backward:
            torch.autograd.grad(outs, inputs, grad_outs)

    peak = peak_gib(run, bench.device)
    elapsed = seconds(run, bench.device, repeats=scale.repeats)
    count = cells_in_focus(case.num_tokens, num_cells, grid)
    pairs = picture**2 * (num_cells + count * picture**2 / num_cells)
    products = 2 + 7 * backward  # four for the gradients of keys, three for those of queries
    tflops = 2 * products * pairs * case.num_heads * case.head_dim / elapsed / 1e12
    return Measurement(figures={"milliseconds": 1e3 * elapsed, "computed_tflops": tflops, "peak_gib": peak})
