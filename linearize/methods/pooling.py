"""One token for each square cell of every frame: means with learned weights, and plain means.

    pooled_c = sum_t w_t x_t * sum(w) / sum_t w_t,    t over the tokens that cell c holds

so that a cell cut by the border keeps the weight of a full one.
B batch, H heads, D head dimension, p side of a cell, C = frames * ceil(height / p) * ceil(width / p) cells.
n = frames * height * width tokens; a grid (height, width) is one frame.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...kernels.pieces.cells import sizes_of
from ...kernels.pieces.results import sum_dtype
from ..errors import LayoutError
from ..layout import Grid


def cell_side(grid: Grid, max_cells: int) -> int:
    """The smallest integer side >= 2 of square cells with at most `max_cells` of them on the grid.

    Raises:
        LayoutError: there are more frames than that.
    """
    frames, _, _ = sizes_of(grid)
    if frames > max_cells:
        raise LayoutError(
            f"pool_tokens must be >= the number of frames, since each frame has a cell, got {max_cells} for {frames}: "
            "raise pool_tokens, or pool by pool_size"
        )
    side = 2
    while count_cells(grid, side) > max_cells:
        side += 1
    return side


def count_cells(grid: Grid, side: int) -> int:
    """Number of square cells of a grid; those at the border may be cut."""
    frames, height, width = sizes_of(grid)
    return frames * -(-height // side) * -(-width // side)


def weighted_pool(parts: Sequence[Tensor], weight: Tensor, grid: Grid, num_cells: int) -> tuple[Tensor, ...]:
    """Weighted means over cells, times the sum of the weights.

    Args:
        parts: Each [B, H, n, D].
        weight: [p, p].
        num_cells: C, given because traced code cannot divide to get it.
    Returns:
        For each part [B, H, C, D], in its dtype.
    """
    height, width = grid[-2:]
    ones = weight.new_ones(1, 1, parts[0].shape[2], 1)
    is_full = cell_sums(ones, torch.ones_like(weight), height, width, num_cells) == weight.numel()
    # both are 1 in full cells, where the weights may add up to 0
    present = torch.where(is_full, 1, cell_sums(ones, weight, height, width, num_cells))
    total = torch.where(is_full, 1, weight.sum())
    correction = total / present  # [1, 1, C, 1]
    return tuple((cell_sums(part, weight, height, width, num_cells) * correction).to(part.dtype) for part in parts)


def mean_pool(parts: Sequence[Tensor], side: int, grid: Grid, num_cells: int) -> tuple[Tensor, ...]:
    """Plain means over cells; for each part [B, H, n, D] -> [B, H, C, D]."""
    height, width = grid[-2:]
    weight = parts[0].new_ones(side, side, dtype=torch.float32)
    count = cell_sums(weight.new_ones(1, 1, parts[0].shape[2], 1), weight, height, width, num_cells)
    return tuple((cell_sums(part, weight, height, width, num_cells) / count).to(part.dtype) for part in parts)


# Custom operators: their views depend on the sides of the grid, so tracing them would recompile for each grid.
@torch.library.custom_op("lineardit::cell_sums", mutates_args=())
def cell_sums(tokens: Tensor, weight: Tensor, height: int, width: int, num_cells: int) -> Tensor:
    """Weighted sums over square cells, in float32 or better.

    Args:
        tokens: [B, H, n, D].
        weight: [p, p].
    Returns:
        [B, H, C, D].
    """
    cells = _in_cells(tokens, weight.shape[0], height, width)
    return (cells * weight.to(tokens.dtype)[:, None, :, None]).sum((4, 6), dtype=sum_dtype(tokens)).flatten(2, 4)


@cell_sums.register_fake
def _(tokens: Tensor, weight: Tensor, height: int, width: int, num_cells: int) -> Tensor:
    batch, num_heads, _, head_dim = tokens.shape
    return tokens.new_empty(batch, num_heads, num_cells, head_dim, dtype=sum_dtype(tokens))


@torch.library.custom_op("lineardit::cell_sums_tokens_backward", mutates_args=())
def _tokens_backward(gradient: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """[B, H, C, D] -> [B, H, n, D]: for each token, its cell's gradient times its weight."""
    side = weight.shape[0]
    rows, cols = -(-height // side), -(-width // side)
    per_cell = gradient.to(tokens.dtype).unflatten(2, (-1, rows, 1, cols, 1))
    spread = per_cell * weight.to(tokens.dtype)[:, None, :, None]  # [B, H, frames, rows, p, cols, p, D]
    whole = spread.flatten(5, 6).flatten(3, 4)
    return whole[:, :, :, :height, :width].reshape(tokens.shape).contiguous()


@_tokens_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("lineardit::cell_sums_weight_backward", mutates_args=())
def _weight_backward(gradient: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """[B, H, C, D] -> [p, p]: for each position in a cell, the sum of tokens times their cell's gradient."""
    side = weight.shape[0]
    cells = _in_cells(tokens, side, height, width)
    per_cell = gradient.reshape(*cells.shape[:4], cells.shape[5], cells.shape[7])  # [B, H, frames, rows, cols, D]
    return torch.einsum("bhfrpcqd,bhfrcd->pq", cells.to(gradient.dtype), per_cell).to(weight.dtype)


@_weight_backward.register_fake
def _(gradient: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    return weight.new_empty(weight.shape)


def _in_cells(tokens: Tensor, side: int, height: int, width: int) -> Tensor:
    """[B, H, n, D] -> [B, H, frames, rows, p, cols, p, D], zero beyond the border."""
    image = tokens.unflatten(2, (-1, height, width))
    padded = functional.pad(image, (0, 0, 0, -width % side, 0, -height % side))
    return padded.unflatten(4, (-1, side)).unflatten(3, (-1, side))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, height, width, _ = inputs
    ctx.save_for_backward(tokens, weight)
    ctx.grid = height, width


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    saved = (*ctx.saved_tensors, *ctx.grid)
    to_tokens = _tokens_backward(gradient, *saved) if ctx.needs_input_grad[0] else None
    to_weight = _weight_backward(gradient, *saved) if ctx.needs_input_grad[1] else None
    return to_tokens, to_weight, None, None, None


cell_sums.register_autograd(_backward, setup_context=_setup_context)
