"""Softmax over text tokens and one more key that stands for the whole image, in one call of PyTorch's attention.

    out_i = (sum_t exp(scale q_i . k_t) v_t + exp(m_i) x_i) / (sum_t exp(scale q_i . k_t) + exp(m_i))

x_i is what query i gets from the image, m_i the logarithm of the image's mass. The image's key has one more coordinate
than the text's: its logit is what the query has there, m_i, and the share it gets comes back in one more of the value.

B batch, H heads, N image tokens, T text tokens, D head dimension.
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
    scale: float,
) -> Tensor:
    """What image queries get from the text and from the image together.

    Args:
        query, image_out: [B, H, N, D]; x above is image_out.
        log_mass: [B, H, N], m above, float32 or float64.
        text_key, text_value: [B, H, T, D].
        text_mask: [B, T] bool, True = attend; None attends to all. Where all is masked, out is image_out.
        scale: of the logits, > 0.
    Returns:
        [B, H, N, D], dtype of text_value.
    """
    dtype, head_dim = text_value.dtype, query.shape[-1]
    query, text_key = query.to(dtype), text_key.to(dtype)
    high = (log_mass / scale).to(dtype)
    low = (log_mass / scale - high).to(dtype)  # the mass to twice the digits of a half precision
    query = torch.cat([query, pad(torch.stack([high, low], -1), (0, EXTRA - 2))], -1)
    image_key, image_value = query.new_zeros(2, *text_key.shape[:2], 1, head_dim + EXTRA)
    image_key[..., head_dim : head_dim + 2] = 1
    image_value[..., head_dim] = 1
    key = torch.cat([pad(text_key, (0, EXTRA)), image_key], 2)
    value = torch.cat([pad(text_value, (0, EXTRA)), image_value], 2)
    mask = None if text_mask is None else pad(text_mask, (0, 1), value=True)[:, None, None, :]
    with torch.autocast(query.device.type, enabled=False):
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    from_text, image_share = out[..., :head_dim], out[..., head_dim : head_dim + 1]
    return from_text + image_share * image_out.to(dtype)
