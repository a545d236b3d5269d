"""The reference's mask, kept for the windows that were used last.

For the compiler it comes from an operator, `lineardit::window_mask`, which takes symbolic sizes and hands out copies.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .reference import window_mask


def kept_window_mask(
    like: Tensor,
    grid: Sequence[int],
    radius: float,
    text_len: int,
    text_first: bool,
    frame_radius: int | None = None,
) -> Tensor:
    """[N, N] bool on the device of `like`, to be read only."""
    if torch.compiler.is_compiling():
        return window_mask_op(like, grid, radius, text_len, text_first, frame_radius)
    return _kept(tuple(grid), radius, text_len, text_first, like.device, frame_radius)


@torch.library.custom_op(
    "lineardit::window_mask",
    mutates_args=(),
    schema="(Tensor like, SymInt[] grid, float radius, SymInt text_len, bool text_first, SymInt? frame_radius=None)"
    " -> Tensor",
)
def window_mask_op(
    like: Tensor,
    grid: Sequence[int],
    radius: float,
    text_len: int,
    text_first: bool,
    frame_radius: int | None = None,
) -> Tensor:
    """[N, N] bool on the device of `like`; a copy, since an operator owns what it returns."""
    return _kept(tuple(grid), radius, text_len, text_first, like.device, frame_radius).clone()


@window_mask_op.register_fake
def _(like, grid, radius, text_len, text_first, frame_radius=None):  # type: ignore[no-untyped-def]
    num_tokens = text_len + math.prod(grid)
    return like.new_empty(num_tokens, num_tokens, dtype=torch.bool)


@lru_cache(maxsize=4)
def _kept(
    grid: tuple[int, ...],
    radius: float,
    text_len: int,
    text_first: bool,
    device: torch.device,
    frame_radius: int | None,
) -> Tensor:
    with torch.inference_mode(False):  # a mask first made for inference serves training as well
        return window_mask(grid, radius, text_len, text_first, device, frame_radius)
