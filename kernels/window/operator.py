"""`lineardit::window_attention`: the implementations with linear memory as an operator for autograd and the compiler.

The operator is opaque to the compiler: grid sizes may be symbolic outside it and are numbers inside, where the lists of
a window are cached. It saves inputs, output and log-sum-exp for backward; output and log-sum-exp are differentiable
once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pieces.results import sum_dtype, token_major
from ..pieces.table_cache import CACHES_TABLES
from ..pieces.text import split_text
from .choose import backward_tiles
from .inputs import Inputs
from .tiled import tiled_backward, tiled_forward
from .windows import from_arguments

INPUTS = "Tensor query, Tensor key, Tensor value, Tensor shared_key, Tensor shared_value, Tensor? shared_mask"
# Either radius or box is None (windows.py).
WINDOW = "SymInt[] grid, float? radius, float scale, str impl, SymInt? frame_radius=None, SymInt[]? box=None"


@torch.library.custom_op(
    "lineardit::window_attention",
    mutates_args=(),
    **CACHES_TABLES,
    schema=f"(Tensor text_out, bool text_first, {INPUTS}, {WINDOW}) -> (Tensor, Tensor)",
)
def window_attention_op(
    text_out: Tensor,
    text_first: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    shared_mask: Tensor | None,
    grid: Sequence[int],
    radius: float | None,
    scale: float,
    impl: str,
    frame_radius: int | None = None,
    box: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of image queries over their window and all shared keys, joined with the text's output.

    Args:
        text_out: [B, H, T, D], output of the text queries; T may be 0. Joined here, so that out is in memory only once.
        text_first: text_out goes before the image, else after it.
        query, key, value: [B, H, N, D], the image tokens of `grid`.
        shared_key, shared_value: [B, H, S, D], seen by every query; S may be 0.
        shared_mask: [B, S] bool, True = attend; None attends to all.
        radius, frame_radius, box: The window, as returned by `to_arguments`.
        impl: "tiled" or "triton".
    Returns:
        out [B, H, T + N, D], and the log-sum-exp of the logits of image queries, [B, H, N].
    """
    text_len = text_out.shape[2]
    out = token_major(query, text_len + query.shape[2])
    text_slot, image_slot = split_text(out, text_len, text_first)
    text_slot.copy_(text_out)
    inputs = Inputs(query, key, value, shared_key, shared_value, shared_mask)
    window = from_arguments(radius, frame_radius, box)
    with torch.autocast(query.device.type, enabled=False):
        if impl == "triton":
            from .triton_probe import forward_tiles_for
            from .triton_window import triton_forward

            tiles = forward_tiles_for(query.device, query.dtype, query.shape[3])
            return out, triton_forward(inputs, image_slot, grid, window, scale, tiles)
        return out, tiled_forward(inputs, image_slot, grid, window, scale)


@torch.library.custom_op(
    "lineardit::window_attention_backward",
    mutates_args=(),
    **CACHES_TABLES,
    schema=f"(Tensor grad_out, {INPUTS}, Tensor out, Tensor lse, Tensor? grad_lse, {WINDOW}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _window_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    shared_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    grid: Sequence[int],
    radius: float | None,
    scale: float,
    impl: str,
    frame_radius: int | None = None,
    box: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(query, key, value, shared_key, shared_value, shared_mask)
    window = from_arguments(radius, frame_radius, box)
    with torch.autocast(query.device.type, enabled=False):
        tiles = backward_tiles(query.device, query.dtype, query.shape[3]) if impl == "triton" else None
        if tiles is not None:
            from .triton_window import triton_backward

            return triton_backward(grad_out, inputs, out, lse, grad_lse, grid, window, scale, tiles)
        return tiled_backward(grad_out, inputs, out, lse, grad_lse, grid, window, scale)


@window_attention_op.register_fake
def _(text_out, text_first, query, *_):  # type: ignore[no-untyped-def]
    batch, num_heads, num_tokens, _ = query.shape
    lse = query.new_empty(batch, num_heads, num_tokens, dtype=sum_dtype(query))
    return token_major(query, text_out.shape[2] + num_tokens), lse


@_window_attention_backward.register_fake
def _(grad_out, query, key, value, shared_key, shared_value, *_):  # type: ignore[no-untyped-def]
    image = (token_major(tensor, tensor.shape[2]) for tensor in (query, key, value))
    return (*image, shared_key.new_empty(shared_key.shape), shared_value.new_empty(shared_value.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    text_out, text_first, *tensors, grid, radius, scale, impl, frame_radius, box = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse)
    ctx.set_materialize_grads(False)  # most callers do not use lse
    ctx.text = (text_out.shape[2], text_first)
    ctx.window = (grid, radius, scale, impl, frame_radius, box)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    text_len, text_first = ctx.text
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    _, image_out = split_text(out, text_len, text_first)
    grad_text, grad_image = split_text(grad_out, text_len, text_first)
    grads = _window_attention_backward(grad_image, *tensors, image_out, lse, grad_lse, *ctx.window)
    return (grad_text, None, *grads, *(None,) * 7)


window_attention_op.register_autograd(_backward, setup_context=_setup_context)
