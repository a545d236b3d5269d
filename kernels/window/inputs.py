"""Inputs of the implementations behind the operator."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Image queries, and what they attend to: image keys in their windows, and shared keys (text, pooled tokens)."""

    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, H, N, D]
    value: Tensor  # [B, H, N, D]
    shared_key: Tensor  # [B, H, S, D]
    shared_value: Tensor  # [B, H, S, D]
    shared_mask: Tensor | None  # [B, S] bool, True = attend
