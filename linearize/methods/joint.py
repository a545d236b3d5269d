"""Joins text with a method that attends within the image: text queries and text keys are under softmax.

    text query i    softmax over every token, as in the base
    image query i   out_i = (1 - w_i) T_i + w_i x_i,    w_i = exp(m_i) / (exp(m_i) + sum_t exp(scale q_i . k_t))

T_i is softmax attention over the text alone, x_i the method's output from the image alone, and m_i an estimate of the
logarithm of the image keys' part of the softmax denominator (`log_mass`): with the exact m_i and softmax for x_i, out_i
would be the base's. So text and image are weighted about as in the base, before any training; rows of weights sum to 1
if those of x do; and without text, or if all of it is masked, out is x.

`balance`, a learned number for each head that starts at 0, is added to m.

B batch, H heads, N tokens, n of them of the image, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...kernels.linear import log_mass
from ...kernels.pieces.extra_key import attend_with_extra_key
from ...kernels.pieces.text import key_mask, split_text
from ..layout import Grid, Layout
from .method import Method


class JointMethod(Method):
    """A method that implements `attend_to_image`; its config says whether it has `balance`, [H], None for 0."""

    def __init__(self, config: Any, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        self.balance = nn.Parameter(torch.zeros(num_heads)) if config.balance else None

    def attend_to_image(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float) -> Tensor:
        """x above, of the image's tokens [B, H, n, D] -> [B, H, n, D]; `scale` is for logits, if there are any."""
        raise NotImplementedError

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """out above, of all tokens, [B, H, N, D] -> [B, H, N, D]."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if layout.text_len == 0:
            return self.attend_to_image(query, key, value, layout.grid, scale)
        _, image_query = split_text(query, layout.text_len, layout.text_first)
        text_key, image_key = split_text(key, layout.text_len, layout.text_first)
        text_value, image_value = split_text(value, layout.text_len, layout.text_first)
        image_out = self.attend_to_image(image_query, image_key, image_value, layout.grid, scale)
        log_image_mass = log_mass(image_query, image_key, scale=scale)
        if self.balance is not None:
            log_image_mass = log_image_mass + self.balance[:, None]
        image = (log_image_mass, image_out)
        out = attend_with_extra_key(image_query, text_key, text_value, *image, mask=layout.text_mask, scale=scale)
        text_out = _attend_text_to_all(query, key, value, layout, scale)
        return torch.cat([text_out, out] if layout.text_first else [out, text_out], dim=2)


def joint_pairs(image_pairs: int, num_image: int, text_len: int, head_dim: int) -> int:
    """Pairs of a method whose image part costs `image_pairs`, with text and the two products of `log_mass`."""
    if text_len == 0:
        return image_pairs
    return image_pairs + num_image * (text_len + head_dim) + text_len * (text_len + num_image)


def _attend_text_to_all(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Output for the text queries, [B, H, T, D]."""
    text_query, image_query = split_text(query, layout.text_len, layout.text_first)
    mask = None
    if layout.text_mask is not None:
        mask = key_mask(layout.text_mask, image_query.shape[2], layout.text_first)
    return scaled_dot_product_attention(text_query, key, value, attn_mask=mask, scale=scale)
