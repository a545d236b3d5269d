"""Logit biases of window masks for dense attention, cached for the windows that were used last.

From a bool mask, PyTorch would build the bias in every call; without that, a small image takes two thirds of the time.
For the compiler and for fake tensors the bias comes from an operator, `lineardit::window_bias`, which takes symbolic
sizes and returns copies.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces.cells import Grid
from ..pieces.table_cache import CACHES_TABLES, cached_table
from .reference import window_bias
from .windows import Window, from_arguments, to_arguments


def cached_window_bias(like: Tensor, grid: Sequence[int], window: Window, text_len: int, text_first: bool) -> Tensor:
    """[N, N], dtype and device of `like`, cached: read only."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # a fake one would be cached, and served to real ones
        radius, frame_radius, box = to_arguments(window)
        return window_bias_op(like.detach(), grid, radius, text_len, text_first, frame_radius, box)
    return cached_bias(tuple(grid), window, text_len, text_first, like.dtype, like.device)


@torch.library.custom_op(
    "lineardit::window_bias",
    mutates_args=(),
    **CACHES_TABLES,
    schema="(Tensor like, SymInt[] grid, float? radius, SymInt text_len, bool text_first, SymInt? frame_radius=None, "
    "SymInt[]? box=None) -> Tensor",
)
def window_bias_op(
    like: Tensor,
    grid: Sequence[int],
    radius: float | None,
    text_len: int,
    text_first: bool,
    frame_radius: int | None = None,
    box: Sequence[int] | None = None,
) -> Tensor:
    """[N, N], dtype and device of `like`; a copy, since an operator owns what it returns."""
    window = from_arguments(radius, frame_radius, box)
    return cached_bias(tuple(grid), window, text_len, text_first, like.dtype, like.device).clone()


@window_bias_op.register_fake
def _(like, grid, radius, text_len, *_):  # type: ignore[no-untyped-def]
    num_tokens = text_len + math.prod(grid)
    return like.new_empty(num_tokens, num_tokens)


@cached_table(maxsize=4)
def cached_bias(
    grid: Grid, window: Window, text_len: int, text_first: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return window_bias(torch.empty((), dtype=dtype, device=device), grid, window, text_len, text_first)
