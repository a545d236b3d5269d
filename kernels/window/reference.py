"""What window attention computes, with the whole mask in memory. Every implementation is judged by this file.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over the j that i attends to:

    query i \\ key j   text       image                             pooled
    text              unmasked   all                               none
    image             unmasked   dy**2 + dx**2 < radius**2         all

"unmasked": where `text_mask` is True. A masked text query attends like any other text query. Every query sees at least
one image token, so no row is empty. B batch, H heads, N = text_len + image tokens, D head dimension, P pooled tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_MASK_ENTRIES = 2**31


def window_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: tuple[int, ...],
    radius: float,
    text_len: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Window attention by one dense masked call; memory grows with the square of the tokens.

    Args:
        query, key, value: [B, H, N, D], any floating dtype up to float64.
        grid: (height, width) or (frames, height, width) of the image in tokens, row-major.
        radius: Euclidean, in tokens, strict; the same place in every frame is at distance 0.
        text_len: tokens that are not of the image, before it or (text_first=False) after it.
        text_mask: [B, text_len] bool, True = attend; None attends to all.
        pooled: (pooled_key, pooled_value), [B, H, P, D] each, seen by image queries only.
        scale: of the logits, D**-0.5 if None.
    Returns:
        [B, H, N, D], dtype of query.
    Raises:
        ValueError: the mask would have more than 2**31 entries.
    """
    num_tokens = query.shape[2]
    num_keys = num_tokens + (pooled[0].shape[2] if pooled is not None else 0)
    check_mask_size(num_tokens, num_keys, text_mask)
    near = _near(grid, radius, query.device)  # [image, image]
    image_tokens = near.shape[0]
    start = text_len if text_first else 0
    mask = near.new_ones(num_tokens, num_tokens)
    mask[start : start + image_tokens, start : start + image_tokens] = near
    mask = mask[None, None]  # [1, 1, query, key]
    if text_mask is not None:
        image_mask = text_mask.new_ones(query.shape[0], image_tokens)
        key_mask = torch.cat([text_mask, image_mask] if text_first else [image_mask, text_mask], dim=1)
        mask = mask & key_mask[:, None, None, :]
    if pooled is not None:
        pooled_key, pooled_value = pooled
        sees_pooled = mask.new_zeros(*mask.shape[:3], pooled_key.shape[2])
        sees_pooled[:, :, start : start + image_tokens] = True
        mask = torch.cat([mask, sees_pooled], dim=3)
        key, value = torch.cat([key, pooled_key], dim=2), torch.cat([value, pooled_value], dim=2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def check_mask_size(num_queries: int, num_keys: int, text_mask: Tensor | None) -> None:
    """Refuse a dense mask, one for each sample if `text_mask` [B, ...] is given, of more than 2**31 entries."""
    entries = num_queries * num_keys * (1 if text_mask is None else text_mask.shape[0])
    if entries > MAX_MASK_ENTRIES:
        raise ValueError(
            f"a dense mask must have at most 2**31 entries, got {entries} for {num_queries} x {num_keys} tokens; "
            "impl='tiled' has linear cost"
        )


def _near(grid: tuple[int, ...], radius: float, device: torch.device) -> Tensor:
    """[image tokens, image tokens] bool: the key lies in the query's window."""
    frames, height, width = (1, *grid)[-3:]
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    row = rows[:, None].expand(height, width).flatten().repeat(frames)
    column = columns.repeat(height * frames)
    squared = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
    return squared.double() < radius * radius
