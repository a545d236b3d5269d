"""Softmax over keys and an extra one, whose logit each query brings itself, in one call of PyTorch's attention.

    out_i = (sum_t exp(scale q_i . k_t) v_t + exp(m_i) x_i) / (sum_t exp(scale q_i . k_t) + exp(m_i))

The extra one stands for a set of keys that have been attended to elsewhere: x_i is what query i gets from them, m_i the
logarithm of their mass. Where the T keys are the text's, these are the image's; in a hybrid, where they are proxies or
cells, those of text and window. It has one more coordinate than the other keys: its logit is what the query has there,
m_i, and the share it gets comes back in one more of the value.

B batch, H heads, N queries, T keys, D head dimension.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .autocast import without_autocast

MORE = 8  # coordinates: 2 are used, and GPU kernels like multiples of 8


def attend_with_extra_key(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extra_logit: Tensor,
    extra_value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
) -> Tensor:
    """What queries get from the keys and the extra one together.

    Args:
        query: [B, H, N, D].
        key, value: [B, H, T, D].
        extra_logit: [B, H, N], m above, float32 or float64.
        extra_value: [B, H, N, D], x above.
        mask: [B, T] bool, True = attend; None attends to all. Where all is masked, out is extra_value.
        bias: [N, T + 1], added to the logits, in place of a mask; far below them where a query does not attend. Last
            is that of the extra key, 0.
        scale: of the logits, > 0.
    Returns:
        [B, H, N, D], dtype of value.
    """
    assert bias is None or mask is None
    seen = bias if mask is None else pad(mask, (0, 1), value=True)[:, None, None, :]
    from_keys, extra_share = _attend(query, key, value, extra_logit, seen, scale)
    return from_keys + extra_share * extra_value.to(value.dtype)


def share_of_keys(
    query: Tensor, key: Tensor, extra_logit: Tensor, *, bias: Tensor | None = None, scale: float
) -> Tensor:
    """sum_t exp(scale q_i . k_t) / (sum_t exp(scale q_i . k_t) + exp(m_i)): what these keys take of a query.

    Args:
        query: [B, H, N, D].
        key: [B, H, T, D].
        extra_logit: [B, H, N], m above, float32 or float64.
        bias: [N, T + 1], as in `attend_with_extra_key`.
        scale: of the logits, > 0.
    Returns:
        [B, H, N], dtype of key.
    """
    return _attend(query, key, torch.ones_like(key), extra_logit, bias, scale)[0][..., 0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, extra_logit: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What the keys give, [B, H, N, D], and the share of the extra one, [B, H, N, 1], which is the last of `mask`."""
    dtype, head_dim = value.dtype, query.shape[-1]
    query, key = query.to(dtype), key.to(dtype)
    # near the common 1 / scale, and exact: extra_logit / scale alone is beyond float16 where logits are far from it
    of_key = 2.0 ** round(math.log2(head_dim) / 2)
    exact = extra_logit / (scale * of_key)
    high = exact.to(dtype)
    low = (exact - high).to(dtype)  # to twice the digits of a half precision
    query = torch.cat([query, pad(torch.stack([high, low], -1), (0, MORE - 2))], -1)
    extra_key, extra_value = query.new_zeros(2, *key.shape[:2], 1, head_dim + MORE)
    extra_key[..., head_dim : head_dim + 2] = of_key
    extra_value[..., head_dim] = 1
    key = torch.cat([pad(key, (0, MORE)), extra_key], 2)
    value = torch.cat([pad(value, (0, MORE)), extra_value], 2)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    with without_autocast(query):
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out[..., :head_dim], out[..., head_dim : head_dim + 1]
