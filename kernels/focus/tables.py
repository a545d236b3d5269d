"""Tables of focus: the tokens of each tile and each cell, and which of them a window holds.

n tokens of the image, C cells, L tokens of the largest, m cells that hold a token, r tokens of a cell outside a window
(rest_of_cells.py), G tiles of Q = side * side queries.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..pieces.cells import Grid, cell_grid, cells_of_axis, sizes_of
from ..pieces.table_cache import cached_table
from ..window import Circle
from ..window.windows import Window
from .rest_of_cells import UNSEEN, CellTable, in_reach, rest_of_cells


class FocusTables(NamedTuple):
    """Tables that depend on the shapes alone."""

    tiles: Tensor  # [G, Q] tokens; a tile that crosses the border repeats some
    real: Tensor  # [G, Q] bool, True for every token once
    rows: Tensor  # [G, side] of the queries
    columns: Tensor  # [G, side]
    frames: Tensor  # [G]
    cells: Tensor  # [C, L] tokens
    shares: Tensor  # [C, L], -log (m n/C) of a token, UNSEEN or less beyond the last
    places: Tensor  # [n, largest m], indices of a token in the flattened `cells`, -1 beyond the last
    log_rest: CellTable  # [n, C], log (r / (n/C)), in `rest_dtype`
    log_rest_of_tiles: CellTable  # [G, C], log of the mean of r / (n/C) over the tile
    reached: CellTable  # [G, C] bool: a window of the tile holds tokens of the cell
    distances: list[Tensor]  # [size, size] along frames, rows, columns
    limit: int  # a token is in a window if its distances add up to less

    def reached_of(self, chosen: Tensor, tiles: slice) -> Tensor:
        """`reached` of the cells [B, H, g, k] that these tiles chose, in the same shape."""
        place = torch.arange(len(self.tiles), device=chosen.device)[tiles]
        return self.reached.at(place).expand(*chosen.shape[:2], -1, -1).gather(3, chosen)


@cached_table(maxsize=8)
def focus_tables(
    grid: Grid,
    window: Window,
    num_cells: int,
    side: int,
    dtype: torch.dtype,
    device: torch.device,
    rest_dtype: torch.dtype,
) -> FocusTables:
    """The tables for tiles of `side` x `side` queries and `num_cells` cells; the last used are cached."""
    num_frames, height, width = sizes = sizes_of(grid)
    starts = [torch.arange(size) for size in (num_frames, -(-height // side), -(-width // side))]
    frames, rows, columns = (axis.flatten() for axis in torch.meshgrid(*starts, indexing="ij"))
    step = torch.arange(side)
    rows, columns = rows[:, None] * side + step, columns[:, None] * side + step  # [G, side]
    real = (rows < height)[:, :, None] & (columns < width)[:, None]
    rows, columns = rows.clamp(max=height - 1), columns.clamp(max=width - 1)
    tiles = ((frames[:, None] * height + rows)[:, :, None] * width + columns[:, None]).flatten(1)
    real = real.flatten(1)
    cells, shares = _tokens_of_cells(sizes, num_cells, dtype)
    rest = rest_of_cells(grid, window, num_cells, device)
    rest = rest.map(lambda numbers: numbers.to(dtype).mul_(num_cells / math.prod(sizes)))
    tile_mean, tile_min = _mean_and_min_of_tiles(rest, tiles.to(device), real.to(device), side)
    places = _slots_of_tokens(cells[shares > UNSEEN], shares > UNSEEN, math.prod(sizes))
    shares -= math.log(math.prod(sizes) / num_cells)
    cell_sizes = shares.exp().sum(1).to(device)
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
        log_rest=rest.map(lambda numbers: numbers.log_().clamp_(min=UNSEEN).to(rest_dtype)),
        log_rest_of_tiles=tile_mean.map(lambda numbers: numbers.log_().clamp_(min=UNSEEN)),
        reached=tile_min._replace(
            far=torch.zeros_like(cell_sizes, dtype=torch.bool),
            # the tolerance is less than any token's share of a cell
            near=tile_min.near < (1 - 1e-5) * cell_sizes[tile_min.cells(torch.arange(len(tiles), device=device))],
        ),
        distances=[one.to(device) for one in distances],
        limit=limit,
    )


def _mean_and_min_of_tiles(rest: CellTable, tiles: Tensor, real: Tensor, side: int) -> tuple[CellTable, CellTable]:
    """Mean and minimum of `rest` over the queries of each tile."""
    frames, rows, columns = rest.axes
    _, num_rows, num_columns = rest.counts
    axes = frames, _in_reach_of_tiles(rows, num_rows, side), _in_reach_of_tiles(columns, num_columns, side)
    box = math.prod(cells.shape[1] for cells in axes)
    mean = CellTable(rest.far.clone(), rest.near.new_zeros(len(tiles), box), axes, rest.counts)
    minimum = mean._replace(near=torch.full_like(mean.near, math.inf))
    cells = mean.cells(torch.arange(len(tiles), device=tiles.device))
    for tokens, exists in zip(tiles.unbind(1), real.unbind(1), strict=True):
        numbers = rest.at(tokens).gather(1, cells)
        mean.near.add_(numbers * exists[:, None])
        torch.minimum(minimum.near, numbers, out=minimum.near)
    mean.near.div_(real.sum(1, keepdim=True))
    return mean, minimum


def _in_reach_of_tiles(cells: Tensor, count: int, side: int) -> Tensor:
    """One of `CellTable.axes`, merged over every `side` places."""
    seen = torch.zeros(-(-len(cells) // side), count, dtype=torch.bool, device=cells.device)
    tile = torch.arange(len(cells), device=cells.device) // side
    seen[tile[:, None], cells] = True
    return in_reach(seen)


def _tokens_of_cells(sizes: tuple[int, int, int], num_cells: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`FocusTables.cells` [C, L] and `FocusTables.shares` [C, L], the latter without n/C: -log m."""
    counts = cell_grid(*sizes, num_cells)
    axes = [cells_of_axis(size, count) for size, count in zip(sizes, counts, strict=True)]
    holders = [torch.zeros(size, dtype=dtype) for size in sizes]  # number of cells of an axis that hold a place
    for along_axis, axis in zip(holders, axes, strict=True):
        for start, length in axis:
            along_axis[start : start + length] += 1
    num_holders = holders[0][:, None, None] * holders[1][:, None] * holders[2]
    largest = math.prod(max(length for _, length in axis) for axis in axes)
    cells = torch.zeros(num_cells, largest, dtype=torch.long)
    shares = torch.full((num_cells, largest), UNSEEN, dtype=dtype)
    token = torch.arange(math.prod(sizes)).view(sizes)
    all_cells = ((deep, row, column) for deep in axes[0] for row in axes[1] for column in axes[2])
    for index, cell in enumerate(all_cells):
        where = tuple(slice(start, start + length) for start, length in cell)
        members = token[where].flatten()
        cells[index, : len(members)] = members
        shares[index, : len(members)] = -num_holders[where].flatten().log()
    return cells, shares


def _slots_of_tokens(tokens: Tensor, exists: Tensor, num_tokens: int) -> Tensor:
    """`FocusTables.places`; `tokens` are the cells' tokens in order, `exists` [C, L] is True at their slots."""
    order = tokens.argsort(stable=True)
    flat = exists.flatten().nonzero().squeeze(1)[order]
    counts = tokens.bincount(minlength=num_tokens)
    first = counts.cumsum(0) - counts
    step = torch.arange(int(counts.max()))
    places = flat[(first[:, None] + step).clamp(max=len(flat) - 1)]
    return places.masked_fill(step >= counts[:, None], -1)


def _distances(window: Window, sizes: tuple[int, int, int]) -> tuple[list[Tensor], int]:
    """`distances` and `limit` of `FocusTables`: squares for circles; for boxes and frames 0 if near, else the limit."""
    steps = [(place[:, None] - place).abs() for place in map(torch.arange, sizes)]
    if isinstance(window, Circle):
        limit = min(window.squared_limit, sizes[1] ** 2 + sizes[2] ** 2)
        near = [step**2 for step in steps[1:]]
    else:
        limit = 1
        near = [(~window.span(axis, size).near()).long() for axis, size in enumerate(sizes[1:])]
    far_frames = steps[0] >= (window.frame_radius or sizes[0])
    return [one.to(torch.int32) for one in (far_frames.long() * limit, *near)], limit
