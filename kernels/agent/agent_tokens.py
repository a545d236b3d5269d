"""Agents on the grid of an image: where they stand, queries pooled to them, and a bias by their distance to each token.

A fixed number A of agents stands in the cells of kernels/focus/cells.py.

B batch, H heads, n = frames * height * width tokens, D head dimension, A agents, R side of a table of biases.
"""

from typing import Any

import torch
from torch import Tensor

from ..focus.cells import cell_grid, cells_of_axis
from ..pieces.results import sum_dtype

_AXES = (3, 4, 2)  # rows, columns, frames of [B, H, frames, height, width, D], in the order that saves most


# Operators: cells and views depend on the grid, so tracing them would compile anew for each one.
@torch.library.custom_op("lineardit::pool_agents", mutates_args=())
def pool_agents(tokens: Tensor, height: int, width: int, num_agents: int) -> Tensor:
    """Means over the cells; [B, H, n, D] -> [B, H, A, D], float32, or float64 for float64."""
    pooled = _on_grid(tokens, height, width)
    counts = _counts(tokens, height, width, num_agents)
    for axis in _AXES:
        cells = cells_of_axis(pooled.shape[axis], counts[axis])
        means = [pooled.narrow(axis, start, length).mean(axis, dtype=sum_dtype(tokens)) for start, length in cells]
        pooled = torch.stack(means, axis)
    return pooled.flatten(2, 4)


@pool_agents.register_fake
def _(tokens: Tensor, height: int, width: int, num_agents: int) -> Tensor:
    batch, num_heads, _, head_dim = tokens.shape
    return tokens.new_empty(batch, num_heads, num_agents, head_dim, dtype=sum_dtype(tokens))


@torch.library.custom_op("lineardit::pool_agents_backward", mutates_args=())
def _pool_backward(grad_out: Tensor, tokens: Tensor, height: int, width: int, num_agents: int) -> Tensor:
    counts = _counts(tokens, height, width, num_agents)
    sizes = _on_grid(tokens, height, width).shape
    grad = grad_out.unflatten(2, [counts[axis] for axis in (2, 3, 4)])
    for axis in reversed(_AXES):
        spread = grad.new_zeros(*grad.shape[:axis], sizes[axis], *grad.shape[axis + 1 :])
        for index, (start, length) in enumerate(cells_of_axis(sizes[axis], counts[axis])):
            spread.narrow(axis, start, length).add_(grad.narrow(axis, index, 1) / length)
        grad = spread
    return grad.flatten(2, 4).to(tokens.dtype)


@_pool_backward.register_fake
def _(grad_out: Tensor, tokens: Tensor, height: int, width: int, num_agents: int) -> Tensor:
    return tokens.new_empty(tokens.shape)


@torch.library.custom_op("lineardit::agent_bias", mutates_args=())
def agent_bias(table: Tensor, num_tokens: int, height: int, width: int, num_agents: int) -> Tensor:
    """A bias for each agent and token by the token's place seen from the agent, in shares of the picture.

    Args:
        table: [H, R, R], over row and column offsets from -1 to 1; between its points, linear. Frames are not told
            apart.
        num_tokens: n.
    Returns:
        [H, A, n].
    """
    frames = num_tokens // (height * width)
    depth, rows, columns = cell_grid(frames, height, width, num_agents)
    by_row, by_column = _hats(table, height, rows), _hats(table, width, columns)
    with torch.autocast(table.device.type, enabled=False):
        picture = torch.einsum("hays,bxs->habyx", torch.einsum("hrs,ayr->hays", table, by_row), by_column)
    shape = (-1, depth, rows * columns, frames, height * width)
    return picture.flatten(3, 4).flatten(1, 2)[:, None, :, None].expand(shape).flatten(3, 4).flatten(1, 2).contiguous()


@agent_bias.register_fake
def _(table: Tensor, num_tokens: int, height: int, width: int, num_agents: int) -> Tensor:
    return table.new_empty(table.shape[0], num_agents, num_tokens)


@torch.library.custom_op("lineardit::agent_bias_backward", mutates_args=())
def _bias_backward(grad_out: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    num_heads, num_agents, num_tokens = grad_out.shape
    frames = num_tokens // (height * width)
    depth, rows, columns = cell_grid(frames, height, width, num_agents)
    by_row, by_column = _hats(table, height, rows), _hats(table, width, columns)
    picture = grad_out.reshape(num_heads, depth, rows, columns, frames, height, width).sum((1, 4))
    with torch.autocast(table.device.type, enabled=False):
        grad = torch.einsum("hays,ayr->hrs", torch.einsum("habyx,bxs->hays", picture, by_column), by_row)
    return grad.contiguous()


@_bias_backward.register_fake
def _(grad_out: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    return table.new_empty(table.shape)


def _hats(table: Tensor, size: int, count: int) -> Tensor:
    """[count, size, R]: how much each point of a side of the table counts for each agent and token along an axis."""
    points = table.shape[1]
    tokens, agents, point = (
        torch.arange(number, dtype=table.dtype, device=table.device) for number in (size, count, points)
    )
    offset = (tokens + 0.5) / size - (agents[:, None] + 0.5) / count  # -1 to 1
    return (1 - ((offset[..., None] + 1) / 2 * (points - 1) - point).abs()).clamp(min=0)


def _on_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H, n, D] -> [B, H, frames, height, width, D]."""
    return tokens.unflatten(2, (-1, height, width))


def _counts(tokens: Tensor, height: int, width: int, num_agents: int) -> dict[int, int]:
    """Agents along each of `_AXES`."""
    frames = tokens.shape[2] // (height * width)
    return dict(zip((2, 3, 4), cell_grid(frames, height, width, num_agents), strict=True))


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, *ctx.numbers = inputs
    ctx.save_for_backward(tokens)


def _backward_pool(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _pool_backward(grad_out, *ctx.saved_tensors, *ctx.numbers), None, None, None


def _setup_bias(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, _, *ctx.sides, _ = inputs
    ctx.save_for_backward(table)


def _backward_bias(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _bias_backward(grad_out, *ctx.saved_tensors, *ctx.sides), None, None, None, None


pool_agents.register_autograd(_backward_pool, setup_context=_setup_pool)
agent_bias.register_autograd(_backward_bias, setup_context=_setup_bias)
