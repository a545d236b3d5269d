"""Means of the tokens in each cell of an image (cells.py): agents, proxies, and keys of cells.

B batch, H heads, n = frames * height * width tokens, D head dimension, C cells.
"""

from typing import Any

import torch
from torch import Tensor

from .cells import cell_grid, cells_of_axis
from .results import sum_dtype

# rows, columns, frames of [B, H, frames, height, width, D]: averaging one axis leaves less work for the next
_AXES = (3, 4, 2)


# An operator: cells and views depend on the grid, so tracing them would recompile for each grid.
@torch.library.custom_op("lineardit::cell_means", mutates_args=())
def cell_means(tokens: Tensor, height: int, width: int, num_cells: int) -> Tensor:
    """Means over the cells; [B, H, n, D] -> [B, H, C, D], float32, or float64 for float64."""
    means = tokens.unflatten(2, (-1, height, width))
    counts = _counts(tokens, height, width, num_cells)
    for axis in _AXES:
        if means.shape[axis] % counts[axis] == 0:
            means = means.unflatten(axis, (counts[axis], -1)).mean(axis + 1, dtype=sum_dtype(tokens))
            continue
        cells = cells_of_axis(means.shape[axis], counts[axis])
        parts = [means.narrow(axis, start, length).mean(axis, dtype=sum_dtype(tokens)) for start, length in cells]
        means = torch.stack(parts, axis)
    return means.flatten(2, 4)


@cell_means.register_fake
def _(tokens: Tensor, height: int, width: int, num_cells: int) -> Tensor:
    batch, num_heads, _, head_dim = tokens.shape
    return tokens.new_empty(batch, num_heads, num_cells, head_dim, dtype=sum_dtype(tokens))


@torch.library.custom_op("lineardit::cell_means_backward", mutates_args=())
def _cell_means_backward(grad_out: Tensor, tokens: Tensor, height: int, width: int, num_cells: int) -> Tensor:
    counts = _counts(tokens, height, width, num_cells)
    sizes = {2: tokens.shape[2] // (height * width), 3: height, 4: width}
    grad = grad_out.unflatten(2, [counts[axis] for axis in (2, 3, 4)])
    for axis in reversed(_AXES):
        length, rest = divmod(sizes[axis], counts[axis])
        if rest == 0:
            shape = (*grad.shape[: axis + 1], length, *grad.shape[axis + 1 :])
            grad = (grad / length).unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)
            continue
        spread = grad.new_zeros(*grad.shape[:axis], sizes[axis], *grad.shape[axis + 1 :])
        for index, (start, length) in enumerate(cells_of_axis(sizes[axis], counts[axis])):
            spread.narrow(axis, start, length).add_(grad.narrow(axis, index, 1) / length)
        grad = spread
    return grad.flatten(2, 4).to(tokens.dtype)


@_cell_means_backward.register_fake
def _(grad_out: Tensor, tokens: Tensor, height: int, width: int, num_cells: int) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _counts(tokens: Tensor, height: int, width: int, num_cells: int) -> dict[int, int]:
    """Cells along each of `_AXES`."""
    frames = tokens.shape[2] // (height * width)
    return dict(zip((2, 3, 4), cell_grid(frames, height, width, num_cells), strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, *ctx.numbers = inputs
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _cell_means_backward(grad_out, *ctx.saved_tensors, *ctx.numbers), None, None, None


cell_means.register_autograd(_backward, setup_context=_setup_context)
