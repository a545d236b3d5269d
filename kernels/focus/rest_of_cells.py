"""How much of each cell is outside each query's window: the weight of proxies and cells next to an exact window.

    rest_ic = sum_j 1/m_j,   j in cell c, not in the window of i;   m_j the number of cells that hold token j

Cells are those of kernels/pieces/cells.py, which overlap if their number does not divide a side. Over all cells, rest_i
adds up to the number of tokens outside the window. With a cell for each token, rest is 1 outside and 0 inside.

A window reaches few of the cells; all others are entirely outside it. `CellTable` holds only the cells in reach of
each query: a few MiB instead of hundreds for [n, C] numbers.

Tokens in a window are counted along each axis: a box is a product over the axes, and so is each row of a circle.

n = frames * height * width tokens, C cells, k of them in reach of a window.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..pieces.cells import Grid, cell_grid, cells_of_axis, sizes_of
from ..pieces.table_cache import CACHES_TABLES, cached_table
from ..window import Box, Circle
from ..window.windows import Window, from_arguments, to_arguments

# Stands for log(0), added to the logits of keys that a query does not see. Finite, also in float16, so that a block of
# keys of which a query sees none gives weight 0, never NaN.
UNSEEN = -1e4

ALIGNED = 16  # PyTorch's kernels copy a bias unless its rows start at multiples of this
PARTS = 8  # parts of the image's rows, counted one at a time
SCATTER_CHUNK = 2**22  # numbers of `CellTable.near` scattered to their cells at a time, with indices of 32 MiB


class CellTable(NamedTuple):
    """A number for each place and cell, [places, C]; at each place, most cells have the number in `far`.

    Places form a grid (frames, height, width): the image's tokens, or tiles of them.
    """

    far: Tensor  # [C], for cells out of the window's reach
    near: Tensor  # [places, k], for the cells in reach, which form a box
    axes: tuple[Tensor, Tensor, Tensor]  # the box's cells by axis: [frames, deep], [height, rows], [width, columns]
    counts: tuple[int, int, int]  # frames, rows and columns of all cells

    def cells(self, places: Tensor) -> Tensor:
        """The cells in reach, [...] -> [..., k]."""
        frames, rows, columns = self.axes
        line = places // len(columns)
        deep, row, column = frames[line // len(rows)], rows[line % len(rows)], columns[places % len(columns)]
        row = deep[..., :, None] * self.counts[1] + row[..., None, :]
        return (row[..., None] * self.counts[2] + column[..., None, None, :]).flatten(-3)

    def at(self, places: Tensor) -> Tensor:
        """The numbers of these places and all cells, [...] -> [..., C], in new memory."""
        return self.far.repeat(*places.shape, 1).scatter_(-1, self.cells(places), self.near[places])

    def everywhere(self, *, multiple: int = 1) -> Tensor:
        """The numbers of all places and cells, [places, C]; rows start at multiples of `multiple` numbers."""
        num_places, num_cells = len(self.near), len(self.far)
        out = self.far.new_empty(num_places, -(-num_cells // multiple) * multiple)[:, :num_cells].copy_(self.far)
        step = max(1, SCATTER_CHUNK // self.near.shape[1])
        for start in range(0, num_places, step):
            places = torch.arange(start, min(start + step, num_places), device=out.device)
            out[start : start + step].scatter_(1, self.cells(places), self.near[start : start + step])
        return out

    def map(self, function: Callable[[Tensor], Tensor]) -> "CellTable":
        """Apply a function to all numbers."""
        return self._replace(far=function(self.far), near=function(self.near))


def log_rest(like: Tensor, grid: Grid, window: Window, num_cells: int) -> Tensor:
    """log(rest / (n / C)): 0 for a cell of mean size outside the window, UNSEEN for one inside.

    Args:
        like: The result has its dtype and device.
    Returns:
        [n, C + 1], the last 0, to be added to the logits of the cells and of an extra key (pieces/extra_key.py).
    """
    # the result for a fake tensor would be cached, and served to real ones
    if torch.compiler.is_compiling() or like.is_meta or type(like) is not Tensor:
        radius, frame_radius, box = to_arguments(window)
        return log_rest_op(like.detach(), grid, radius, num_cells, frame_radius, box)
    return _log_rest(like, grid, window, num_cells)


@torch.library.custom_op(
    "lineardit::log_rest",
    mutates_args=(),
    **CACHES_TABLES,
    schema="(Tensor like, SymInt[] grid, float? radius, SymInt num_cells, SymInt? frame_radius=None, "
    "SymInt[]? box=None) -> Tensor",
)
def log_rest_op(
    like: Tensor,
    grid: Sequence[int],
    radius: float | None,
    num_cells: int,
    frame_radius: int | None = None,
    box: Sequence[int] | None = None,
) -> Tensor:
    """`log_rest` as an operator: tables depend on the grid, so tracing would recompile for each grid."""
    return _log_rest(like, grid, from_arguments(radius, frame_radius, box), num_cells)


@log_rest_op.register_fake
def _(like, grid, radius, num_cells, *_):  # type: ignore[no-untyped-def]
    return like.new_empty(math.prod(grid), (num_cells + ALIGNED) // ALIGNED * ALIGNED)[:, : num_cells + 1]


def _log_rest(like: Tensor, grid: Sequence[int], window: Window, num_cells: int) -> Tensor:
    rest = cached_log_rest(tuple(grid), window, num_cells, like.dtype, like.device)
    return rest._replace(far=pad(rest.far, (0, 1))).everywhere(multiple=ALIGNED)


@cached_table(maxsize=8)
def cached_log_rest(grid: Grid, window: Window, num_cells: int, dtype: torch.dtype, device: torch.device) -> CellTable:
    """The numbers of `log_rest`, cached: read only."""
    with torch.autocast(device.type, enabled=False):
        share = num_cells / math.prod(grid)
        rest = rest_of_cells(grid, window, num_cells, device)
        return rest.map(lambda numbers: numbers.mul_(share).log_().clamp_(min=UNSEEN).to(dtype))


def rest_of_cells(grid: Grid, window: Window, num_cells: int, device: torch.device) -> CellTable:
    """`rest` of the module's formula, in float32."""
    frames, height, _ = sizes = sizes_of(grid)
    counts = cell_grid(*sizes, num_cells)
    holds = [  # [places of an axis, cells along it], along frames, height and width
        _membership(size, count, device) for size, count in zip(sizes, counts, strict=True)
    ]
    deep, rows, columns = (one.sum(0) for one in holds)
    frame = torch.arange(frames, device=device)
    distance = (frame[:, None] - frame).abs()
    near_frames = (distance < (window.frame_radius or frames)).float() @ holds[0]  # [frames, cells along them]
    if isinstance(window, Circle):
        by_row, by_column = _near_circle(window, *holds[1:])
    else:
        by_row, by_column = _near_box(window, *holds[1:])
    axes = in_reach(near_frames > 0), in_reach((by_row > 0).any(0)), in_reach((by_column > 0).any(0))
    near_frames = near_frames.gather(1, axes[0])[:, None, None, :, None, None]
    by_row = by_row.gather(2, axes[1].expand(len(by_row), -1, -1))
    by_column = by_column.gather(2, axes[2].expand(len(by_column), -1, -1))
    frame_tokens = deep[axes[0]][:, None, None, :, None, None]

    rest = torch.empty(*sizes, math.prod(cells.shape[1] for cells in axes), device=device)
    step = math.ceil(height / PARTS)
    for start in range(0, height, step):
        part = slice(start, start + step)
        near = near_frames * _product(by_row[:, part], by_column)[:, :, None]  # [frames, part, width, *box]
        plane_tokens = rows[axes[1][part]][:, None, None, :, None] * columns[axes[2]][:, None, None]
        torch.sub(frame_tokens * plane_tokens, near, out=near)
        rest[:, part] = near.masked_fill_(near < 1e-3, 0).flatten(3)  # less than any share of a token
    cell_sizes = deep[:, None] * torch.outer(rows, columns).flatten()
    return CellTable(cell_sizes.flatten(), rest.flatten(0, 2), axes, counts)


def in_reach(seen: Tensor) -> Tensor:
    """The range of cells that each place of an axis sees, [places, cells] bool -> [places, widest range]."""
    count = seen.shape[1]
    first, last = seen.int().argmax(1), count - 1 - seen.flip(1).int().argmax(1)
    widest = int((last - first).max()) + 1
    return first.clamp(max=count - widest)[:, None] + torch.arange(widest, device=seen.device)


def _membership(size: int, count: int, device: torch.device) -> Tensor:
    """[size, count]: 1/m where a cell holds a place of the axis that m cells hold, else 0."""
    holds = torch.zeros(size, count)
    for index, (start, length) in enumerate(cells_of_axis(size, count)):
        holds[start : start + length, index] = 1
    return (holds / holds.sum(1, keepdim=True)).to(device)


def _near_box(window: Box, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `_product`: what each row of a frame sees of each row of cells, and likewise for columns."""
    by_row, by_column = (
        window.span(axis, len(one), one.device).near().float() @ one for axis, one in enumerate((rows, columns))
    )
    return by_row[None], by_column[None]


def _near_circle(window: Circle, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of `_product` for a circle, the sum of its rows s, each of which is a range of columns."""
    place = torch.arange(len(columns), device=columns.device)
    distance = (place[:, None] - place).abs()
    limit = window.squared_limit
    reach = min(math.isqrt(limit - 1), len(rows) - 1)
    by_row, by_column = [], []
    for step in range(-reach, reach + 1):
        shifted = torch.zeros_like(rows)
        shifted[max(-step, 0) : len(rows) - max(step, 0)] = rows[max(step, 0) : len(rows) - max(-step, 0)]
        by_row.append(shifted)
        in_row = distance.square() + step * step < limit
        by_column.append(in_row.float() @ columns)
    return torch.stack(by_row), torch.stack(by_column)


def _product(by_row: Tensor, by_column: Tensor) -> Tensor:
    """sum_s of [s, height, rows of cells] times [s, width, columns of cells], [height, width, rows, columns]."""
    sums = by_row.flatten(1).T @ by_column.flatten(1)  # [height * rows, width * columns]
    return sums.unflatten(1, by_column.shape[1:]).unflatten(0, by_row.shape[1:]).transpose(1, 2)
