"""Agent attention's position bias on any grid, by the offset of each token from each agent.

Agents are at the centres of the cells of kernels/pieces/cells.py.

H heads, n = frames * height * width tokens, A agents, R side of a table of biases.
"""

from typing import Any

import torch
from torch import Tensor

from ..pieces.cells import cell_grid


# An operator: cells and views depend on the grid, so tracing them would recompile for each grid.
@torch.library.custom_op("lineardit::agent_bias", mutates_args=())
def agent_bias(table: Tensor, num_tokens: int, height: int, width: int, num_agents: int) -> Tensor:
    """Bias of each agent and token by the token's offset from the agent, relative to the image size.

    Args:
        table: [H, R, R], over row and column offsets from -1 to 1, interpolated linearly; the same for all frames.
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
    """[count, size, R]: interpolation weights of the table's points for each agent and token along an axis."""
    points = table.shape[1]
    tokens, agents, point = (
        torch.arange(number, dtype=table.dtype, device=table.device) for number in (size, count, points)
    )
    offset = (tokens + 0.5) / size - (agents[:, None] + 0.5) / count  # -1 to 1
    return (1 - ((offset[..., None] + 1) / 2 * (points - 1) - point).abs()).clamp(min=0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table, _, *ctx.sides, _ = inputs
    ctx.save_for_backward(table)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return _bias_backward(grad_out, *ctx.saved_tensors, *ctx.sides), None, None, None, None


agent_bias.register_autograd(_backward, setup_context=_setup_context)
