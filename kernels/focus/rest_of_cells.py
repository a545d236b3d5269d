"""How much of each cell lies outside of each query's window: what proxies and cells weigh beside an exact window.

    rest_ic = sum_j 1/m_j,   j in cell c, not in the window of i;   m_j the number of cells that hold token j

Cells are those of kernels/pieces/cells.py, which overlap where a side does not divide. Over all cells, rest_i adds up
to the number of tokens outside of the window. With a cell for each token, rest is 1 outside and 0 inside.

Windows are counted along each axis: a box is a product of its axes, and of a circle every row is one. Some rows of the
image are counted at a time, which takes several times the memory of their result.

n = frames * height * width tokens, C cells.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..pieces.cells import Grid, cell_grid, cells_of_axis, sizes_of
from ..pieces.kept_tables import KEEPS_TABLES
from ..window import Box, Circle
from ..window.windows import Window, from_arguments, to_arguments

# The logarithm of nothing, added to the logit of what a query does not see. Finite, also in float16: a block of keys of
# which a query sees none gives weight 0, never NaN.
UNSEEN = -1e4

PARTS = 8  # of the image's rows, counted one after the other


def log_rest(like: Tensor, grid: Grid, window: Window, num_cells: int) -> Tensor:
    """log(rest / (n / C)): 0 for a cell of mean size that lies outside, UNSEEN for one inside the window.

    Args:
        like: Whose dtype and device it gets.
    Returns:
        [n, C], to be read only: it is kept for the windows that were used last.
    """
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # a fake one would be kept, and served to real ones
        radius, frame_radius, box = to_arguments(window)
        return log_rest_op(like.detach(), grid, radius, num_cells, frame_radius, box)
    return kept_log_rest(tuple(grid), window, num_cells, like.dtype, like.device)


@torch.library.custom_op(
    "lineardit::log_rest",
    mutates_args=(),
    **KEEPS_TABLES,
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
    """A copy, since an operator owns what it returns."""
    return kept_log_rest(
        tuple(grid), from_arguments(radius, frame_radius, box), num_cells, like.dtype, like.device
    ).clone()


@log_rest_op.register_fake
def _(like, grid, radius, num_cells, *_):  # type: ignore[no-untyped-def]
    return like.new_empty(math.prod(grid), num_cells)


def new_log_rest(grid: Grid, window: Window, num_cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`log_rest` computed anew, in this dtype and on this device."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):  # serves training as well
        log = torch.empty(*sizes_of(grid), num_cells, dtype=dtype, device=device)
        for rows, rest in _by_rows(grid, window, num_cells, device):
            log[:, rows] = rest.mul_(num_cells / math.prod(grid)).log_().clamp_(min=UNSEEN)
        return log.flatten(0, 2)


# Of 1,024 cells in half precision 128 MiB at a grid of 256 x 256 (4096 pixels on a side), 512 MiB at 512 x 512.
kept_log_rest = lru_cache(maxsize=4)(new_log_rest)


def rest_of_cells(grid: Grid, window: Window, num_cells: int, device: torch.device) -> Tensor:
    """rest above, [n, C], float32."""
    out = torch.empty(*sizes_of(grid), num_cells, device=device)
    for rows, rest in _by_rows(grid, window, num_cells, device):
        out[:, rows] = rest
    return out.flatten(0, 2)


def _by_rows(grid: Grid, window: Window, num_cells: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """`rest_of_cells` for some rows of the image at a time: (the rows, [frames, rows, width, C]), to be overwritten."""
    frames, height, width = sizes = sizes_of(grid)
    holds = [  # [places of an axis, cells along it], along frames, height and width
        _holds(size, count, device) for size, count in zip(sizes, cell_grid(*sizes, num_cells), strict=True)
    ]
    of_frames, of_rows, of_columns = (one.sum(0) for one in holds)
    frame = torch.arange(frames, device=device)
    distance = (frame[:, None] - frame).abs()
    near_frames = (distance < (window.frame_radius or frames)).float() @ holds[0]  # [frames, deep]
    if isinstance(window, Circle):
        by_row, by_column = _near_circle(window, *holds[1:])
    else:
        by_row, by_column = _near_box(window, *holds[1:])
    whole = of_frames[:, None] * torch.outer(of_rows, of_columns).flatten()  # [deep, cells of a frame]
    step = math.ceil(height / PARTS)
    for start in range(0, height, step):
        near = _product(by_row[:, start : start + step], by_column)
        rest = near_frames[:, None, :, None] * near[None, :, None]  # [frames, rows * width, deep, cells of a frame]
        torch.sub(whole, rest, out=rest)
        rest.masked_fill_(rest < 1e-3, 0)  # less than any share of a token
        yield slice(start, start + step), rest.reshape(frames, -1, width, num_cells)  # a copy if one column


def _holds(size: int, count: int, device: torch.device) -> Tensor:
    """[size, count]: 1/m where a cell holds a place of the axis that m cells hold, else 0."""
    holds = torch.zeros(size, count)
    for index, (start, length) in enumerate(cells_of_axis(size, count)):
        holds[start : start + length, index] = 1
    return (holds / holds.sum(1, keepdim=True)).to(device)


def _near_box(window: Box, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of `_product`: what each row of a frame sees of the rows of cells, and each column of theirs."""
    by_row, by_column = (
        window.span(axis, len(one), one.device).near().float() @ one for axis, one in enumerate((rows, columns))
    )
    return by_row[None], by_column[None]


def _near_circle(window: Circle, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same factors of a circle, a sum over its rows: each row s is a stretch of columns."""
    place = torch.arange(len(columns), device=columns.device)
    distance = (place[:, None] - place).abs()
    limit = window.squared_limit
    reach = min(math.isqrt(limit - 1), len(rows) - 1)
    by_row, by_column = [], []
    for step in range(-reach, reach + 1):
        shifted = torch.zeros_like(rows)
        shifted[max(-step, 0) : len(rows) - max(step, 0)] = rows[max(step, 0) : len(rows) - max(-step, 0)]
        by_row.append(shifted)
        stretch = distance.square() + step * step < limit
        by_column.append(stretch.float() @ columns)
    return torch.stack(by_row), torch.stack(by_column)


def _product(by_row: Tensor, by_column: Tensor) -> Tensor:
    """sum_s of [s, height, rows of cells] times [s, width, columns of cells], [height * width, cells of a frame]."""
    sums = by_row.flatten(1).T @ by_column.flatten(1)  # [height * rows, width * columns]
    sums = sums.unflatten(1, by_column.shape[1:]).unflatten(0, by_row.shape[1:])  # [height, rows, width, columns]
    return sums.transpose(1, 2).flatten(2).flatten(0, 1)
