"""Softmax over keys and an extra key, whose logit is given for each query, in one call of PyTorch's attention.

    out_i = (sum_t exp(scale q_i . k_t) v_t + exp(m_i) x_i) / (sum_t exp(scale q_i . k_t) + exp(m_i))

The extra key stands for keys that are attended to elsewhere: x_i is the output of query i over them, m_i its
log-sum-exp. If the T keys are the text, these are the image; in a hybrid, where the T keys are proxies or cells, these
are text and window. Vectors get more coordinates, 0 in the T keys and values: the query holds m_i there, which becomes
the extra key's logit, and the output returns the extra key's share.

B batch, H heads, N queries, T keys, D head dimension.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .autocast import without_autocast

EXTRA_DIMS = 8  # additional coordinates: 2 are used, and GPU kernels prefer multiples of 8


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
    """Attention over the keys and the extra key together.

    Args:
        query: [B, H, N, D].
        key, value: [B, H, T, D].
        extra_logit: [B, H, N], m above, float32 or float64.
        extra_value: [B, H, N, D], x above.
        mask: [B, T] bool, True = attend; None attends to all. If all keys are masked, out is extra_value.
        bias: [N, T + 1], added to the logits, instead of a mask; far below them where a query does not attend. The
            last column is the extra key's, 0.
        scale: Scale of the logits, > 0.
    Returns:
        [B, H, N, D], dtype of value.
    """
    assert bias is None or mask is None
    attn_mask = bias if mask is None else pad(mask, (0, 1), value=True)[:, None, None, :]
    key_out, extra_share = _attend(query, key, value, extra_logit, attn_mask, scale)
    return key_out + extra_share * extra_value.to(value.dtype)


def share_of_keys(
    query: Tensor, key: Tensor, extra_logit: Tensor, *, bias: Tensor | None = None, scale: float
) -> Tensor:
    """sum_t exp(scale q_i . k_t) / (sum_t exp(scale q_i . k_t) + exp(m_i)): the keys' share of the softmax.

    Args:
        query: [B, H, N, D].
        key: [B, H, T, D].
        extra_logit: [B, H, N], m above, float32 or float64.
        bias: [N, T + 1], as in `attend_with_extra_key`.
        scale: Scale of the logits, > 0.
    Returns:
        [B, H, N], dtype of key.
    """
    return _attend(query, key, torch.ones_like(key), extra_logit, bias, scale)[0][..., 0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, extra_logit: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output of the keys [B, H, N, D], and share of the extra key [B, H, N, 1], which is the last in `mask`."""
    dtype, head_dim = value.dtype, query.shape[-1]
    query, key = query.to(dtype), key.to(dtype)
    # a power of two, so exact, near the usual 1 / scale: extra_logit / scale alone overflows float16 for large logits
    key_coordinate = 2.0 ** round(math.log2(head_dim) / 2)
    exact = extra_logit / (scale * key_coordinate)
    high = exact.to(dtype)
    low = (exact - high).to(dtype)  # high + low has twice the digits of half precision
    query = torch.cat([query, pad(torch.stack([high, low], -1), (0, EXTRA_DIMS - 2))], -1)
    extra_key, extra_value = query.new_zeros(2, *key.shape[:2], 1, head_dim + EXTRA_DIMS)
    extra_key[..., head_dim : head_dim + 2] = key_coordinate
    extra_value[..., head_dim] = 1
    key = torch.cat([pad(key, (0, EXTRA_DIMS)), extra_key], 2)
    value = torch.cat([pad(value, (0, EXTRA_DIMS)), extra_value], 2)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    with without_autocast(query):
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out[..., :head_dim], out[..., head_dim : head_dim + 1]
