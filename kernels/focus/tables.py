"""What focus needs of the shapes alone: the tokens of each tile and each cell, and which of them a window holds.

n tokens of the image, C cells, L tokens of the largest, m cells that hold a token, r tokens of a cell outside of a
window (rest_of_cells.py), G tiles of Q = side * side queries.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..pieces.cells import Grid, cell_grid, cells_of_axis, sizes_of
from ..window import Circle
from ..window.windows import Window
from .rest_of_cells import UNSEEN, rest_of_cells


class FocusTables(NamedTuple):
    """What depends on the shapes alone."""

    tiles: Tensor  # [G, Q] tokens; those of a tile that reaches over the border stand twice
    real: Tensor  # [G, Q] bool: every token once
    rows: Tensor  # [G, side] of the queries
    columns: Tensor  # [G, side]
    frames: Tensor  # [G]
    cells: Tensor  # [C, L] tokens
    shares: Tensor  # [C, L], -log (m n/C) of a token, UNSEEN beyond the last
    places: Tensor  # [n, largest m] of a token in the flat `cells`, -1 beyond the last
    log_rest: Tensor  # [n, C], log (r / (n/C)), in a dtype of its own
    log_rest_of_tiles: Tensor  # [G, C], log of the mean of r / (n/C) over the tile
    reached: Tensor  # [G, C] bool: a window of the tile holds tokens of the cell
    distances: list[Tensor]  # [size, size] along frames, rows, columns:
    limit: int  # a token lies in a window where they add up to less


# Of 1,024 cells in half precision 151 MiB at a grid of 256 x 256 (4096 pixels on a side), 602 MiB at 512 x 512.
@lru_cache(maxsize=4)
def focus_tables(
    grid: Grid,
    window: Window,
    num_cells: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    rest_dtype: torch.dtype,
) -> FocusTables:
    """The tables of tiles of `side` x `side` queries and `num_cells` cells; kept for what was used last."""
    num_frames, height, width = sizes = sizes_of(grid)
    with torch.inference_mode(False):  # serves training as well
        starts = [torch.arange(size) for size in (num_frames, -(-height // side), -(-width // side))]
        frames, rows, columns = (axis.flatten() for axis in torch.meshgrid(*starts, indexing="ij"))
        step = torch.arange(side)
        rows, columns = rows[:, None] * side + step, columns[:, None] * side + step  # [G, side]
        real = (rows < height)[:, :, None] & (columns < width)[:, None]
        rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
        tiles = ((frames[:, None] * height + rows)[:, :, None] * width + columns[:, None]).flatten(1)
        real = real.flatten(1)
        cells, shares = _tokens_of_cells(sizes, num_cells, dtype)
        rest = rest_of_cells(grid, window, num_cells, device).to(dtype).mul_(num_cells / math.prod(sizes))
        sums = rest.new_zeros(len(tiles), num_cells)
        least_rest = torch.full_like(sums, math.inf)
        for tokens, exists in zip(tiles.to(device).unbind(1), real.to(device).unbind(1), strict=True):
            one = rest[tokens]
            sums += one * exists[:, None]
            least_rest = torch.minimum(least_rest, one)
        sums /= real.sum(1, keepdim=True).to(device)
        places = _places_of_tokens(cells[shares > UNSEEN], shares > UNSEEN, math.prod(sizes))
        shares -= math.log(math.prod(sizes) / num_cells)
        whole = shares.exp().sum(1).to(device)
        distances, limit = _distances(window, sizes)
        return FocusTables(
            tiles=tiles.to(device),
            real=real.to(device),
            rows=rows.to(device),
            columns=columns.to(device),
            frames=frames.to(device),
            cells=cells.to(device),
            shares=shares.to(device),
            places=places.to(device),
            log_rest=rest.log_().clamp_(min=UNSEEN).to(rest_dtype),
            log_rest_of_tiles=sums.log().clamp(min=UNSEEN),
            reached=least_rest < (1 - 1e-5) * whole,  # a token is more of a cell
            distances=[one.to(device) for one in distances],
            limit=limit,
        )


def _tokens_of_cells(sizes: tuple[int, int, int], num_cells: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`FocusTables.cells` [C, L] and `FocusTables.shares` [C, L], the latter without their n/C: -log m."""
    counts = cell_grid(*sizes, num_cells)
    axes = [cells_of_axis(size, count) for size, count in zip(sizes, counts, strict=True)]
    holders = [torch.zeros(size, dtype=dtype) for size in sizes]  # cells of an axis that hold a place
    for holds, axis in zip(holders, axes, strict=True):
        for start, length in axis:
            holds[start : start + length] += 1
    of_token = holders[0][:, None, None] * holders[1][:, None] * holders[2]
    largest = math.prod(max(length for _, length in axis) for axis in axes)
    cells = torch.zeros(num_cells, largest, dtype=torch.long)
    shares = torch.full((num_cells, largest), UNSEEN, dtype=dtype)
    token = torch.arange(math.prod(sizes)).view(sizes)
    every = ((deep, row, column) for deep in axes[0] for row in axes[1] for column in axes[2])
    for index, cell in enumerate(every):
        where = tuple(slice(start, start + length) for start, length in cell)
        members = token[where].flatten()
        cells[index, : len(members)] = members
        shares[index, : len(members)] = -of_token[where].flatten().log()
    return cells, shares


def _places_of_tokens(tokens: Tensor, exists: Tensor, num_tokens: int) -> Tensor:
    """`FocusTables.places`; `tokens` are those of the cells in order, `exists` [C, L] where they stand."""
    order = tokens.argsort(stable=True)
    flat = exists.flatten().nonzero().squeeze(1)[order]
    counts = tokens.bincount(minlength=num_tokens)
    first = counts.cumsum(0) - counts
    step = torch.arange(int(counts.max()))
    places = flat[(first[:, None] + step).clamp(max=len(flat) - 1)]
    return places.masked_fill(step >= counts[:, None], -1)


def _distances(window: Window, sizes: tuple[int, int, int]) -> tuple[list[Tensor], int]:
    """`distances` and `limit` of `FocusTables`: squares for circles; for boxes and frames 0 near, else the limit."""
    steps = [(place[:, None] - place).abs() for place in map(torch.arange, sizes)]
    if isinstance(window, Circle):
        limit = min(window.squared_limit, sizes[1] ** 2 + sizes[2] ** 2)
        near = [step**2 for step in steps[1:]]
    else:
        limit = 1
        near = [(~window.span(axis, size).near()).long() for axis, size in enumerate(sizes[1:])]
    far_frames = steps[0] >= (window.frame_radius or sizes[0])
    return [one.to(torch.int32) for one in (far_frames.long() * limit, *near)], limit
