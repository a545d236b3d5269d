"""`lineardit::window_mask`: the reference's mask, kept for the windows that were used last.

An operator, so that the compiler may call it with symbolic sizes, and what is kept never belongs to a trace.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .reference import window_mask


@torch.library.custom_op(
    "lineardit::window_mask",
    mutates_args=(),
    schema="(Tensor like, SymInt[] grid, float radius, SymInt text_len, bool text_first) -> Tensor",
)
def kept_window_mask(like: Tensor, grid: Sequence[int], radius: float, text_len: int, text_first: bool) -> Tensor:
    """[N, N] bool on the device of `like`; a copy, since an operator owns what it returns."""
    return _kept(tuple(grid), radius, text_len, text_first, like.device).clone()


@kept_window_mask.register_fake
def _(like, grid, radius, text_len, text_first):  # type: ignore[no-untyped-def]
    num_tokens = text_len + math.prod(grid)
    return like.new_empty(num_tokens, num_tokens, dtype=torch.bool)


@lru_cache(maxsize=4)
def _kept(grid: tuple[int, ...], radius: float, text_len: int, text_first: bool, device: torch.device) -> Tensor:
    return window_mask(grid, radius, text_len, text_first, device)
