"""How many tokens of each cell are outside a window, against a count one by one."""

from itertools import product

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lineardit.kernels.focus import rest_of_cells as rest_of_cells_module
from lineardit.kernels.focus.rest_of_cells import ALIGNED, UNSEEN, log_rest, rest_of_cells
from lineardit.kernels.pieces.cells import cell_grid, cells_of_axis
from lineardit.kernels.window import Box, Circle
from lineardit.kernels.window.reference import window_mask
from lineardit.linearize.measures.live_bytes import LiveBytes

CPU = torch.device("cpu")
WINDOWS = [
    Circle(radius=2.5),
    Circle(radius=1),
    Circle(radius=20),
    Box(window=(3, 5)),
    Box(window=(3, 3), dilation=(2, 1)),
    Box(window=(1, 3), cell=(2, 3)),
]


def expected_rest(grid: tuple[int, ...], window: Circle | Box, num_cells: int) -> torch.Tensor:
    """[n, C], from the definition."""
    frames, height, width = (1, *grid)[-3:]
    in_window = window_mask(grid, window, 0, True, CPU)
    counts = cell_grid(frames, height, width, num_cells)
    cells = product(*(cells_of_axis(size, count) for size, count in zip((frames, height, width), counts, strict=True)))
    membership = torch.zeros(len(in_window), num_cells, dtype=torch.float64)
    for index, ranges in enumerate(cells):
        for frame, row, column in product(*(range(start, start + length) for start, length in ranges)):
            membership[(frame * height + row) * width + column, index] = 1
    return (~in_window).double() @ (membership / membership.sum(1, keepdim=True))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("grid", "num_cells"), [((7, 10), 6), ((7, 10), 70), ((6, 8), 4), ((3, 5), 64)])
def test_rest_of_cells_matches_the_count(grid: tuple[int, ...], num_cells: int, window: Circle | Box) -> None:
    rest = rest_of_cells(grid, window, num_cells, CPU).everywhere()
    assert torch.allclose(rest.double(), expected_rest(grid, window, num_cells), atol=1e-5)
    outside = (~window_mask(grid, window, 0, True, CPU)).sum(1)
    assert torch.allclose(rest.sum(1), outside.float(), atol=1e-4)


@pytest.mark.parametrize("window", [Circle(radius=2, frame_radius=1), Circle(radius=2), Box(window=(3, 3))], ids=str)
@pytest.mark.parametrize(("grid", "num_cells"), [((3, 4, 6), 8), ((3, 5, 2), 4)], ids=["cubes", "one-column"])
def test_rest_of_cells_matches_the_count_in_videos(grid: tuple[int, ...], num_cells: int, window: Circle | Box) -> None:
    rest = rest_of_cells(grid, window, num_cells, CPU)
    expected = expected_rest(grid, window, num_cells)
    assert torch.allclose(rest.everywhere().double(), expected, atol=1e-5)
    indices = torch.tensor([[7, 0, 11], [3, 3, len(expected) - 1]])
    assert torch.equal(rest.at(indices), rest.everywhere()[indices])


@pytest.mark.parametrize("chunk_size", [1, 20, 10**9])
def test_rest_everywhere_does_not_depend_on_the_chunk_size(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = rest_of_cells((7, 10), Circle(radius=2.5), 70, CPU)
    expected = rest.everywhere()
    monkeypatch.setattr(rest_of_cells_module, "SCATTER_CHUNK", chunk_size)
    assert torch.equal(rest.everywhere(), expected)


def test_log_rest_is_0_for_a_cell_outside_and_excludes_one_inside() -> None:
    log = log_rest(torch.zeros(1, dtype=torch.float64), (8, 8), Circle(radius=4), 16)
    assert log.dtype == torch.float64
    assert log[0, 15] == 0  # the far corner
    assert log[0, 0] == UNSEEN  # 2 x 2 tokens, all nearer than 4
    rest = rest_of_cells((8, 8), Circle(radius=4), 16, CPU).everywhere()
    assert torch.allclose(log[:, :16].exp(), rest.double() / 4)
    assert log.shape == (64, 17) and (log[:, 16] == 0).all() and log.stride(0) % ALIGNED == 0
    assert ((rest > 0) & (rest < 4)).any()
    halves = log_rest(torch.zeros(1, dtype=torch.float16), (8, 8), Circle(radius=4), 16)
    assert halves.dtype == torch.float16 and halves.isfinite().all()


def test_log_rest_compiles_with_gradients() -> None:
    def loss(value: torch.Tensor) -> torch.Tensor:
        return (value.mT @ log_rest(value, (4, 5), Circle(radius=2), 4)[:, :4].softmax(0)).square().sum()

    value = torch.randn(1, 2, 20, 8, requires_grad=True)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(loss(value), value)
    assert torch.allclose(torch.autograd.grad(compiled(value), value)[0], expected)


def test_log_rest_keeps_fake_and_real_tensors_apart() -> None:
    arguments = ((4, 5), Circle(radius=2.25), 4)
    with FakeTensorMode():
        assert isinstance(log_rest(torch.zeros(1), *arguments), FakeTensor)
    assert type(log_rest(torch.zeros(1), *arguments)) is torch.Tensor


@pytest.mark.parametrize("window", [Circle(radius=4), Box(window=(5, 5))], ids=str)
def test_rest_of_cells_stores_only_cells_within_reach(window: Circle | Box) -> None:
    """A window that reaches 3 or 2 tokens touches at most 2 x 2 cells of 6 x 8 tokens."""
    with LiveBytes(nn.Module()) as live:
        rest = rest_of_cells((48, 64), window, 64, CPU)
    assert rest.near.shape == (48 * 64, 4)
    assert live.peak < 3 * rest.near.nbytes
