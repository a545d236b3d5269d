"""Cells in focus computed with dense masks, and shapes to compare on."""

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lineardit.kernels.focus.attention import cells_in_focus
from lineardit.kernels.pieces.cell_means import cell_means
from lineardit.kernels.pieces.cells import cell_grid, cells_of_axis
from lineardit.kernels.window import Box, Circle, Window
from lineardit.kernels.window.reference import window_mask

SCALE = 0.6
CPU = torch.device("cpu")
WINDOWS = [
    Circle(radius=2.5),
    Circle(radius=math.sqrt(5)),
    Box(window=(3, 5)),
    Box(window=(3, 3), dilation=(2, 1)),
    Box(window=(1, 3), cell=(2, 3)),
]
# grid, cells, tokens in focus, side of the tiles: sides that divide, that do not, cells that overlap, narrow pictures
SHAPES = [((8, 8), 16, 16, 4), ((7, 10), 6, 25, 3), ((5, 6), 8, 12, 2), ((1, 30), 6, 10, 4), ((9, 7), 63, 9, 5)]


def inputs_of(
    grid: tuple[int, ...], num_cells: int, dtype: torch.dtype = torch.float64, head_dim: int = 8
) -> list[Tensor]:
    """query, key and value [2, 2, n, head_dim], the proxies' key and value [2, 2, C, head_dim]."""
    query, key, value = (torch.randn(2, 2, math.prod(grid), head_dim).to(dtype) for _ in range(3))
    return [query, key, value, *(cell_means(x, *grid[-2:], num_cells).to(dtype) for x in (key, value))]


def cell_membership(grid: tuple[int, ...], num_cells: int) -> Tensor:
    """[n, C] of 0 and 1: whether the cell holds the token."""
    sizes = (1, *grid)[-3:]
    axes = [cells_of_axis(size, count) for size, count in zip(sizes, cell_grid(*sizes, num_cells), strict=True)]
    membership = torch.zeros(math.prod(grid), num_cells, dtype=torch.float64)
    for index, ranges in enumerate(product(*axes)):
        for frame, row, column in product(*(range(start, start + length) for start, length in ranges)):
            membership[(frame * sizes[1] + row) * sizes[2] + column, index] = 1
    return membership


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    grid: tuple[int, ...],
    window: Window,
    num_tokens: int,
    side: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """far [B, H, n, D], lse [B, H, n], and whether a query's tile chose a cell [B, H, n, C]; dense masks."""
    _, height, width = (1, *grid)[-3:]
    num_cells = proxy_key.shape[2]
    membership = cell_membership(grid, num_cells).to(query)
    counts = membership / membership.sum(1, keepdim=True)  # 1 / m of each token in each cell
    outside = (~window_mask(grid, window, 0, True, CPU)).to(query)
    rest = outside @ counts * num_cells / math.prod(grid)
    position = torch.arange(math.prod(grid))
    frame, row, column = position // (height * width), position // width % height, position % width
    tile = (frame * height + row // side) * width + column // side
    tile_mean = (tile[:, None] == tile).to(query)
    tile_mean /= tile_mean.sum(1, keepdim=True)
    scores = SCALE * (tile_mean @ query) @ proxy_key.mT + (tile_mean @ rest).log().clamp(min=-1e4)
    best = scores.topk(cells_in_focus(num_tokens, num_cells, grid), -1).indices
    chosen = torch.zeros_like(scores).scatter(-1, best, 1)
    proxy_weights = (SCALE * query @ proxy_key.mT).exp() * rest * (1 - chosen)
    token_weights = (SCALE * query @ key.mT).exp() * outside * (chosen @ counts.T) * num_cells / math.prod(grid)
    mass = proxy_weights.sum(-1) + token_weights.sum(-1)
    return (proxy_weights @ proxy_value + token_weights @ value) / mass[..., None], mass.log(), chosen


def clear_choice(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs and keyword arguments for one tile of queries whose choice is clear enough for any rounding."""
    grid = (8, 8)
    query, key, value, *_ = inputs_of(grid, 4, torch.float32)
    key[:, :, :4] += 8 * query.mean(2, keepdim=True)
    inputs = [x.to(dtype) for x in (query, key, value)]
    inputs += [cell_means(x, *grid, 4).to(dtype) for x in inputs[1:]]
    return inputs, {"grid": grid, "window": Circle(radius=2), "num_tokens": 16, "side": 8}
