"""Reference of agent attention, with both weight matrices in memory. The implementation is tested against it."""

import torch
from torch import Tensor


def agent_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    second_scale: float | None = None,
    shortcut: float = 0.0,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
) -> Tensor:
    """Arguments and result are those of `agent_attention`; sums in float32, or float64 for float64."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    second_scale = scale if second_scale is None else second_scale
    q, k, v, a = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value, agents))
    first, second = a @ k.mT * scale, q @ a.mT * second_scale  # [B, H, A, N], [B, H, N, A]
    if key_bias is not None:
        first = first + key_bias
    if query_bias is not None:
        second = second + query_bias
    return (second.softmax(-1) @ (first.softmax(-1) @ v) + shortcut * v).to(value.dtype)
