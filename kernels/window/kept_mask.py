"""The reference's mask, kept for the windows that were used last.

For the compiler it comes from an operator, `lineardit::window_mask`, which takes symbolic sizes and hands out copies.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .reference import window_mask
from .windows import Window, from_arguments, to_arguments


def kept_window_mask(like: Tensor, grid: Sequence[int], window: Window, text_len: int, text_first: bool) -> Tensor:
    """[N, N] bool on the device of `like`, to be read only."""
    if torch.compiler.is_compiling():
        radius, frame_radius, box = to_arguments(window)
        return window_mask_op(like, grid, radius, text_len, text_first, frame_radius, box)
    return _kept(tuple(grid), window, text_len, text_first, like.device)


@torch.library.custom_op(
    "lineardit::window_mask",
    mutates_args=(),
    schema="(Tensor like, SymInt[] grid, float? radius, SymInt text_len, bool text_first, SymInt? frame_radius=None, "
    "SymInt[]? box=None) -> Tensor",
)
def window_mask_op(
    like: Tensor,
    grid: Sequence[int],
    radius: float | None,
    text_len: int,
    text_first: bool,
    frame_radius: int | None = None,
    box: Sequence[int] | None = None,
) -> Tensor:
    """[N, N] bool on the device of `like`; a copy, since an operator owns what it returns."""
    window = from_arguments(radius, frame_radius, box)
    return _kept(tuple(grid), window, text_len, text_first, like.device).clone()


@window_mask_op.register_fake
def _(like, grid, radius, text_len, *_):  # type: ignore[no-untyped-def]
    num_tokens = text_len + math.prod(grid)
    return like.new_empty(num_tokens, num_tokens, dtype=torch.bool)


@lru_cache(maxsize=4)
def _kept(grid: tuple[int, ...], window: Window, text_len: int, text_first: bool, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a mask first made for inference serves training as well
        return window_mask(grid, window, text_len, text_first, device)
