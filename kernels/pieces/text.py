"""Sequences of text and image tokens: splitting them, and masking the text.

B batch, H heads, T text tokens, N image tokens, D head dimension.
"""

import torch
from torch import Tensor


def split_text(tensor: Tensor, text_len: int, text_first: bool) -> tuple[Tensor, Tensor]:
    """[B, H, T + N, D] -> text [B, H, T, D], image [B, H, N, D]."""
    image_len = tensor.shape[2] - text_len
    if text_first:
        text, image = tensor.split([text_len, image_len], dim=2)
    else:
        image, text = tensor.split([image_len, text_len], dim=2)
    return text, image


def key_mask(text_mask: Tensor, image_len: int, text_first: bool) -> Tensor:
    """text_mask [B, T] bool -> mask of all keys [B, 1, 1, T + N] bool, False at masked text."""
    image_mask = text_mask.new_ones(text_mask.shape[0], image_len)
    return torch.cat([text_mask, image_mask] if text_first else [image_mask, text_mask], dim=1)[:, None, None, :]
