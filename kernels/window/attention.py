"""Window attention: image queries attend to text and to nearby image tokens, text queries to everything.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in text  or  i in text  or  pos_j in window(pos_i)

In a video, pos is the position within a frame, and |frame_i - frame_j| < frame_radius must hold too. The windows are in
windows.py: `window_attention` takes CLEAR's circle, |pos_i - pos_j| < radius, and `windowed_attention` any of them.
The implementations:

    reference   one dense call with a mask, rebuilt in each call; any device and dtype; memory tokens x tokens
    masked      the same with the mask cached as a bias; the fastest for small images
    tiled       tile by tile, in plain PyTorch; any device and dtype; time and memory linear in the image
    triton      the same in one kernel; CUDA; float16, bfloat16, float32; head dimensions up to 256
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pieces.autocast import as_autocast, autocast_enabled
from ..pieces.cells import Grid
from ..pieces.checks import check_attention, check_devices
from ..pieces.text import key_mask, split_text
from .cached_bias import cached_window_bias
from .choose import choose_impl, implementations, require_triton
from .operator import window_attention_op
from .reference import biased_attention, biased_lse, check_mask_size, window_bias
from .windows import Box, Circle, Window, to_arguments


def window_attention(
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
    impl: str = "auto",
    frame_radius: int | None = None,
) -> Tensor:
    """Softmax attention: image queries over the text and a circular window, text queries over everything.

    Differentiable once. Under autocast, inputs are cast as for `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query, key, value: [B, H, N, D], any strides; float16, bfloat16, float32 or float64.
        grid: (height, width), or (frames, height, width) for a video or several images of one size, with the window at
            the same position in each; in tokens, row-major; text_len + their product == N.
        radius: Euclidean, in tokens, strict: dy**2 + dx**2 < radius**2.
        text_len: Number of tokens outside the image, before it or (text_first=False) after it.
        text_mask: [B, text_len] bool, True = attend. No query attends to a masked text token; as a query, it attends
            like any other text token.
        pooled: (pooled_key, pooled_value), [B, H, P, D] each: additional keys for image queries only.
        scale: Scale of the logits; None: D**-0.5.
        impl: "auto" (see `choose_impl`) or one of `implementations()`.
        frame_radius: In frames, strict: image queries see frames with |df| < frame_radius; None: all frames.
    Returns:
        [B, H, N, D], dtype of query (under autocast, the autocast dtype); sums are in float32, or float64 for float64.
    Raises:
        ValueError: invalid shapes, grid, radius, frame_radius or impl; "triton" cannot run here or scale <= 0 for it;
            the mask of "reference" or "masked" has more than 2**31 entries.
    """
    return windowed_attention(
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
        impl=impl,
    )


def windowed_attention(
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
    impl: str = "auto",
) -> Tensor:
    """`window_attention` with any window, such as `Circle(radius=8)` or `Box(window=(13, 13))`.

    Other arguments, result and errors are those of `window_attention`.
    """
    text = (text_len, text_first, text_mask)
    return _attend(query, key, value, grid, window, *text, pooled, scale, impl, return_lse=False)[0]


def windowed_attention_and_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grid: Grid,
    window: Window,
    text_len: int = 0,
    text_first: bool = True,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Like `windowed_attention`, and return the log-sum-exp of the logits of each image query as well.

    Other arguments and errors are those of `windowed_attention`.
    Returns:
        out [B, H, N, D], lse [B, H, image tokens] in float32, or float64 for float64; both have gradients.
    """
    text = (text_len, text_first, text_mask)
    out, lse = _attend(query, key, value, grid, window, *text, None, scale, impl, return_lse=True)
    assert lse is not None, "return_lse=True returns lse"
    return out, lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    window: Window,
    text_len: int,
    text_first: bool,
    text_mask: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    scale: float | None,
    impl: str,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """out [B, H, N, D] and lse [B, H, image tokens], which is None if it is not wanted and would take extra work."""
    _validate(query, key, value, grid, window, text_len, text_mask, pooled, impl)
    query, key, value = as_autocast(query, key, value)
    if pooled is not None:
        pooled_key, pooled_value = as_autocast(*pooled)
        pooled = pooled_key, pooled_value
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    impl = _resolve_impl(query, grid, window, text_len, scale, impl)
    if impl in ("tiled", "triton"):
        return _linear(query, key, value, text_len, text_first, text_mask, pooled, grid, window, scale, impl)
    check_mask_size(query, text_mask, pooled)
    make_bias = cached_window_bias if impl == "masked" else window_bias
    bias = make_bias(query, grid, window, text_len, text_first)  # [N, N]
    out = biased_attention(query, key, value, bias, text_len, text_first, text_mask, pooled, scale)
    return out, biased_lse(query, key, bias, text_len, text_first, text_mask, scale) if return_lse else None


def _linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_len: int,
    text_first: bool,
    text_mask: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    grid: Grid,
    window: Window,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The operator on the image's queries, with text and pooled tokens as shared keys, and a call for text queries."""
    text_query, image_query = split_text(query, text_len, text_first)
    shared_key, image_key = split_text(key, text_len, text_first)
    shared_value, image_value = split_text(value, text_len, text_first)
    shared_mask = text_mask
    if pooled is not None:
        pooled_key, pooled_value = pooled
        shared_key, shared_value = torch.cat([shared_key, pooled_key], 2), torch.cat([shared_value, pooled_value], 2)
        shared_mask = None if text_mask is None else F.pad(text_mask, (0, pooled_key.shape[2]), value=True)
    text_out = text_query
    if text_len > 0:
        mask = None if text_mask is None else key_mask(text_mask, image_query.shape[2], text_first)
        text_out = F.scaled_dot_product_attention(text_query, key, value, attn_mask=mask, scale=scale)
    image = (image_query, image_key, image_value)
    shared = (shared_key, shared_value, shared_mask)
    radius, frame_radius, box = to_arguments(window)
    return window_attention_op(text_out, text_first, *image, *shared, grid, radius, scale, impl, frame_radius, box)


def _resolve_impl(query: Tensor, grid: Grid, window: Window, text_len: int, scale: float, impl: str) -> str:
    """The implementation that `impl` runs."""
    if impl == "auto":
        impl = choose_impl(query, grid=grid, window=window, text_len=text_len)
        return "tiled" if impl == "triton" and scale <= 0 else impl  # the kernels take a scale > 0
    if impl == "triton":
        require_triton(query)
    return impl


def _validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: Grid,
    window: Window,
    text_len: int,
    text_mask: Tensor | None,
    pooled: tuple[Tensor, Tensor] | None,
    impl: str,
) -> None:
    check_attention(query, key, value, impl, implementations())
    batch, num_heads, num_tokens, head_dim = query.shape
    if len(grid) not in (2, 3) or any(not isinstance(size, int | torch.SymInt) or size < 1 for size in grid):
        raise ValueError(f"grid must be (height, width) or (frames, height, width), integers >= 1, got {tuple(grid)}")
    if not isinstance(window, Circle | Box):
        raise ValueError(f"window must be a Circle or a Box, got {window!r}")
    if window.frame_radius is not None and len(grid) != 3:
        raise ValueError(f"frame_radius={window.frame_radius} needs grid = (frames, height, width), got {tuple(grid)}")
    if text_len < 0:
        raise ValueError(f"text_len must be >= 0, got {text_len}")
    if text_len + math.prod(grid) != num_tokens:
        sides = " * ".join(("frames", "height", "width")[-len(grid) :])
        sizes = " * ".join(str(size) for size in grid)
        raise ValueError(f"text_len + {sides} must equal N, got {text_len} + {sizes} != {num_tokens}")
    if text_mask is not None and (text_mask.dtype != torch.bool or text_mask.shape != (batch, text_len)):
        got = f"{text_mask.dtype} {tuple(text_mask.shape)}"
        raise ValueError(f"text_mask must be bool [B, text_len] = ({batch}, {text_len}), got {got}")
    if pooled is not None:
        pooled_shapes = [tuple(tensor.shape) for tensor in pooled]
        expected = (batch, num_heads, pooled_shapes[0][-2] if pooled_shapes and pooled[0].ndim == 4 else 0, head_dim)
        if pooled_shapes != [expected, expected]:
            raise ValueError(f"pooled must be (key, value), each [B, H, P, D] like query, got {pooled_shapes}")
    check_devices(query, text_mask=text_mask, pooled=None if pooled is None else pooled[0])
    tensors = (query, key, value, *(pooled or ()))
    if any(tensor.dtype != query.dtype for tensor in tensors) and not autocast_enabled(query):
        raise ValueError(f"query, key, value and pooled must have one dtype, got {[t.dtype for t in tensors]}")
