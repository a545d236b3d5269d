"""What the implementations inside the operator have in common.

B batch, H heads, N image tokens, S shared keys, D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .partial import Keys, attention_bias


class Inputs(NamedTuple):
    """Image queries, and what they attend to: their windows, and the shared keys (text and pooled tokens)."""

    query: Tensor  # [B, H, N, D]
    key: Tensor  # [B, H, N, D]
    value: Tensor  # [B, H, N, D]
    shared_key: Tensor  # [B, H, S, D]
    shared_value: Tensor  # [B, H, S, D]
    shared_mask: Tensor | None  # [B, S] bool, True = attend

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype of logits, sums and log-sum-exp."""
        return sum_dtype(self.query)

    def shared_keys(self) -> Keys | None:
        """The shared keys in the dtype of sums, None if there are none."""
        if self.shared_key.shape[2] == 0:
            return None
        dtype, bias = self.sum_dtype, None
        if self.shared_mask is not None:
            bias = attention_bias(self.shared_mask, dtype)[:, None, None, :]
        return Keys(self.shared_key.to(dtype), self.shared_value.to(dtype), bias)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """plan(grid, radius, device): what depends on the window alone, and is kept.

    forward(inputs, out, plan, scale, partial): fill `out` [B, H, N, D], whose memory is in the order [B, N, H, D], and
        give the log-sum-exp of the logits, [B, N, H].
    backward(grad_out, inputs, out, lse, plan, scale, partial): gradients of query, key, value, shared_key and
        shared_value; those of [B, H, N, D] with memory in the order [B, N, H, D].
    """

    plan: Callable[[tuple[int, ...], float, torch.device], Any]
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
