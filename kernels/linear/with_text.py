"""Softmax over keys and one more, whose logit each query brings itself, in one call of PyTorch's attention.

    out_i = (sum_t exp(scale q_i . k_t) v_t + exp(m_i) x_i) / (sum_t exp(scale q_i . k_t) + exp(m_i))

The one more stands for a set of keys that have been attended to elsewhere: x_i is what query i gets from them, m_i the
logarithm of their mass. Beside text, these are the image's keys; in a hybrid, whose T keys are proxies, those of text
and window. It has one more coordinate than the other keys: its logit is what the query has there, m_i, and the share it
gets comes back in one more of the value.

B batch, H heads, N queries, T keys, D head dimension.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

EXTRA = 8  # coordinates: 2 are used, and GPU kernels like multiples of 8


def attend_to_text(
    query: Tensor,
    image_out: Tensor,
    log_mass: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    *,
    text_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float,
) -> Tensor:
    """What image queries get from the text and from the image together.

    Args:
        query, image_out: [B, H, N, D]; x above is image_out.
        log_mass: [B, H, N], m above, float32 or float64.
        text_key, text_value: [B, H, T, D].
        text_mask: [B, T] bool, True = attend; None attends to all. Where all is masked, out is image_out.
        bias: [N, T], added to the logits, in place of a mask; far below them where a query does not attend.
        scale: of the logits, > 0.
    Returns:
        [B, H, N, D], dtype of text_value.
    """
    assert bias is None or text_mask is None
    mask = bias if text_mask is None else text_mask[:, None, None, :]
    from_text, image_share = _attend(query, log_mass, text_key, text_value, mask, scale)
    return from_text + image_share * image_out.to(text_value.dtype)


def share_of_keys(query: Tensor, key: Tensor, log_mass: Tensor, *, bias: Tensor | None = None, scale: float) -> Tensor:
    """sum_t exp(scale q_i . k_t) / (sum_t exp(scale q_i . k_t) + exp(m_i)): what these keys take of a query.

    Args:
        query: [B, H, N, D].
        key: [B, H, T, D].
        log_mass: [B, H, N], m above, float32 or float64.
        bias: [N, T], added to the logits of the keys; far below them where a query does not attend.
        scale: of the logits, > 0.
    Returns:
        [B, H, N], dtype of key.
    """
    return _attend(query, log_mass, key, torch.ones_like(key), bias, scale)[0][..., 0]


def _attend(
    query: Tensor, log_mass: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """What the keys give, [B, H, N, D], and the share of the one more, [B, H, N, 1]; `mask` does not count that one."""
    dtype, head_dim = value.dtype, query.shape[-1]
    query, key = query.to(dtype), key.to(dtype)
    high = (log_mass / scale).to(dtype)
    low = (log_mass / scale - high).to(dtype)  # the mass to twice the digits of a half precision
    query = torch.cat([query, pad(torch.stack([high, low], -1), (0, EXTRA - 2))], -1)
    more_key, more_value = query.new_zeros(2, *key.shape[:2], 1, head_dim + EXTRA)
    more_key[..., head_dim : head_dim + 2] = 1
    more_value[..., head_dim] = 1
    key = torch.cat([pad(key, (0, EXTRA)), more_key], 2)
    value = torch.cat([pad(value, (0, EXTRA)), more_value], 2)
    if mask is not None:
        mask = pad(mask, (0, 1), value=True) if mask.dtype == torch.bool else pad(mask.to(dtype), (0, 1))
    with torch.autocast(query.device.type, enabled=False):
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out[..., :head_dim], out[..., head_dim : head_dim + 1]
