"""Terms of the values that compensate for what linear attention lacks: a local convolution, and a gate.

    LocalConv   x_i = sum_o w_o v_(i + o),   o in a square around 0, outside of the image v = 0; w learned, starts at 0
    ValueGate   g_i = 2 sigmoid(v_i W + b),  W, b learned for each head, start at 0, so that g starts at 1

LocalConv is a depth-wise convolution within each frame: LePE of CSWin (arXiv:2107.00652), as MALA and agent attention
have it. B batch, H heads, n tokens of the image, D head dimension, k side of the square.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.pieces.results import token_major
from ..layout import Grid


class LocalConv(nn.Module):
    """Depth-wise convolution of values on the grid; `weight` [H * D, 1, k, k]."""

    def __init__(self, size: int, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads * head_dim, 1, size, size))

    def forward(self, value: Tensor, grid: Grid) -> Tensor:
        """[B, H, n, D] -> [B, H, n, D]."""
        height, width = grid[-2:]
        return conv_tokens(value, self.weight.to(value), height, width)


class ValueGate(nn.Module):
    """One factor for each channel of each token; `weight` [H, D, D], `bias` [H, 1, D]."""

    def __init__(self, *, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

    def forward(self, value: Tensor) -> Tensor:
        """[B, H, n, D] -> [B, H, n, D]."""
        return 2 * (value @ self.weight.to(value) + self.bias.to(value)).sigmoid()


# A custom operator: its views depend on the sides of the grid, so tracing them would recompile for each grid.
@torch.library.custom_op("lineardit::conv_tokens", mutates_args=())
def conv_tokens(tokens: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    """Depth-wise convolution of tokens on a grid, zero beyond the border of each frame.

    Args:
        tokens: [B, H, n, D].
        weight: [H * D, 1, k, k], k odd, dtype of tokens.
    Returns:
        [B, H, n, D].
    """
    with torch.autocast(tokens.device.type, enabled=False):
        picture = _as_picture(tokens, height, width)
        return _as_tokens(torch.conv2d(picture, weight, padding="same", groups=weight.shape[0]), tokens)


@conv_tokens.register_fake
def _(tokens: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    return token_major(tokens, tokens.shape[2])


@torch.library.custom_op("lineardit::conv_tokens_backward", mutates_args=())
def _conv_backward(grad_out: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    pad = weight.shape[-1] // 2
    grad_picture, grad_weight, _ = torch.ops.aten.convolution_backward(
        _as_picture(grad_out, height, width),
        _as_picture(tokens, height, width),
        weight,
        None,
        [1, 1],
        [pad, pad],
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        [True, True, False],
    )
    return _as_tokens(grad_picture, tokens), grad_weight.contiguous()


@_conv_backward.register_fake
def _(grad_out: Tensor, tokens: Tensor, weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    return token_major(tokens, tokens.shape[2]), weight.new_empty(weight.shape)


def _as_picture(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, H, n, D] -> [B * frames, H * D, height, width], in the memory layout of projected tokens."""
    num_heads, head_dim = tokens.shape[1], tokens.shape[3]
    rows = tokens.transpose(1, 2).reshape(-1, height, width, num_heads * head_dim)
    return rows.permute(0, 3, 1, 2)


def _as_tokens(picture: Tensor, like: Tensor) -> Tensor:
    """[B * frames, H * D, height, width] -> [B, H, n, D]."""
    batch, num_heads, num_tokens, head_dim = like.shape
    rows = picture.permute(0, 2, 3, 1).reshape(batch, num_tokens, num_heads, head_dim)
    return rows.contiguous().transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, *ctx.sides = inputs
    ctx.save_for_backward(tokens, weight)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_conv_backward(grad_out, *ctx.saved_tensors, *ctx.sides), None, None


conv_tokens.register_autograd(_backward, setup_context=_setup_context)
