"""Window attention with the whole mask in memory, the reference for all implementations.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j    over the j that i attends to:

    query i \\ key j   text       image                             pooled
    text              unmasked   all                               none
    image             unmasked   in the window (windows.py)        all
                                 and |df| < frame_radius

"unmasked": where `text_mask` is True. A masked text query attends like any other text query. Every query sees at least
one image token, so no row is empty. B batch, H heads, N = text_len + image tokens, D head dimension, P pooled tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pieces.autocast import without_autocast
from ..pieces.cells import Grid, sizes_of
from ..pieces.results import sum_dtype
from ..pieces.text import key_mask
from .windows import Circle, Window

MAX_MASK_ENTRIES = 2**31


def window_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    radius: float,
    text_len: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    frame_radius: int | None = None,
) -> Tensor:
    """Window attention by one dense masked call; memory grows with the square of the tokens.

    Args:
        query, key, value: [B, H, N, D], any floating dtype up to float64.
        grid: (height, width) or (frames, height, width) of the image in tokens, row-major.
        radius: Euclidean, in tokens, strict; the same position in every frame is at distance 0.
        text_len: Number of tokens outside the image, before it or (text_first=False) after it.
        text_mask: [B, text_len] bool, True = attend; None: attend to all.
        pooled: (pooled_key, pooled_value), [B, H, P, D] each, for image queries only.
        scale: Scale of the logits; None: D**-0.5.
        frame_radius: In frames, strict; None: all frames.
    Returns:
        [B, H, N, D], dtype of query.
    Raises:
        ValueError: radius or frame_radius is out of range; the mask would have more than 2**31 entries.
    """
    return windowed_attention_reference(
        query,
        key,
        value,
        grid=grid,
        window=Circle(radius=radius, frame_radius=frame_radius),
        text_len=text_len,
        text_first=text_first,
        text_mask=text_mask,
        pooled=pooled,
        scale=scale,
    )


def windowed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    window: Window,
    text_len: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    pooled: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """`window_attention_reference` with any window."""
    check_mask_size(query, text_mask, pooled)
    bias = window_bias(query, grid, window, text_len, text_first)
    return biased_attention(query, key, value, bias, text_len, text_first, text_mask, pooled, scale)


def window_mask(grid: Grid, window: Window, text_len: int, text_first: bool, device: torch.device) -> Tensor:
    """[N, N] bool, True where a query attends to a key, before `text_mask`."""
    near = _near(grid, window, device)  # [image, image]
    image_len = near.shape[0]
    start = text_len if text_first else 0
    mask = near.new_ones(text_len + image_len, text_len + image_len)
    mask[start : start + image_len, start : start + image_len] = near
    return mask


def window_bias(like: Tensor, grid: Grid, window: Window, text_len: int, text_first: bool) -> Tensor:
    """`window_mask` as a logit bias [N, N], dtype and device of `like`: 0 where it is True, -inf elsewhere."""
    mask = window_mask(grid, window, text_len, text_first, like.device)
    return like.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)


def biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    text_len: int,
    text_first: bool,
    text_mask: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    scale: float | None,
) -> Tensor:
    """One call of dense attention with the window's `bias` [N, N], extended by text mask and pooled tokens, if any."""
    image_len = query.shape[2] - text_len
    bias = bias[None, None]  # [1, 1, query, key]
    if text_mask is not None:
        bias = bias.masked_fill(~key_mask(text_mask, image_len, text_first), -torch.inf)
    if pooled is not None:
        pooled_key, pooled_value = pooled
        start = text_len if text_first else 0
        pooled_bias = bias.new_full((*bias.shape[:3], pooled_key.shape[2]), -torch.inf)
        pooled_bias[:, :, start : start + image_len] = 0
        bias = torch.cat([bias, pooled_bias], dim=3)
        key, value = torch.cat([key, pooled_key], dim=2), torch.cat([value, pooled_value], dim=2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def biased_lse(
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    text_len: int,
    text_first: bool,
    text_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """log sum_j exp(scale * q_i . k_j) over what each image query sees; [B, H, N, D] -> [B, H, image tokens]."""
    num_image = query.shape[2] - text_len
    image = slice(text_len, None) if text_first else slice(0, num_image)
    dtype, bias = sum_dtype(query), bias[image]
    if text_mask is not None:
        bias = bias.masked_fill(~key_mask(text_mask, num_image, text_first), -torch.inf)
    with without_autocast(query):
        logits = query[:, :, image].to(dtype) @ key.to(dtype).mT * scale
    return (logits + bias).logsumexp(-1)


def check_mask_size(query: Tensor, text_mask: Tensor | None, pooled: tuple[Tensor, Tensor] | None) -> None:
    """Raise a ValueError for a dense mask, one per sample with a text mask, of more than 2**31 entries."""
    num_tokens = query.shape[2]
    num_keys = num_tokens + (pooled[0].shape[2] if pooled is not None else 0)
    entries = num_tokens * num_keys * (query.shape[0] if text_mask is not None else 1)
    if entries > MAX_MASK_ENTRIES:
        raise ValueError(
            f"a dense mask must have at most 2**31 entries, got {entries} for {num_tokens} tokens; "
            "impl='tiled' has linear cost"
        )


def _near(grid: Grid, window: Window, device: torch.device) -> Tensor:
    """[image tokens, image tokens] bool: the key is in the query's window."""
    frames, height, width = sizes_of(grid)
    frame = torch.arange(frames, device=device)
    distance = (frame[:, None] - frame).abs()
    in_time = distance < (frames if window.frame_radius is None else window.frame_radius)
    near = window.near(height, width, device)
    return (in_time[:, None, :, None] & near[:, None]).flatten(2).flatten(0, 1)
