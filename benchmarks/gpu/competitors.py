"""Attention at one shape, ours and others', as calls on tensors [1, H, text_len + side * side, D].

An entry of COMPETITORS takes a shape and returns an `Attention`, or raises UnavailableError.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from lineardit.kernels.window import implementations, window_attention
from lineardit.kernels.window.partial import fastest_partial

from .bench import Bench, Shape, UnavailableError
from .flex_window import (
    TileOrder,
    analytic_block_mask,
    pairs_computed,
    row_major,
    row_major_mask_mod,
    tile_mask_mod,
)
from .names import CLEAR_FLEX, DENSE
from .timing import shared_memory

TILE = (8, 16)  # 128 queries
SMALL_TILE = (8, 8)
FLEX_SHARED_MEMORY = 160 * 2**10  # bytes

Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One way to compute attention.

    Attributes:
        call: query, key, value -> outputs, all of which need gradients.
        pairs: Pairs of query and key that the kernel computes, for each head; None if unknown.
        backward_pairs: The same for the backward pass; None: as many.
        backward_products: Matrix products for each pair of the backward pass; the forward pass has 2.
        note: How it differs from the others.
    """

    call: Call
    pairs: int | None
    backward_pairs: int | None = None
    backward_products: int = 7  # logits and their gradients twice, dq, dk, dv
    note: str = ""


def ours(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    check_ours(bench, shape.dtype)
    grid = (shape.side, shape.side)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        out = window_attention(
            query, key, value, grid=grid, radius=shape.radius, text_len=shape.text_len, impl=bench.impl
        )
        return (out,)

    if bench.impl != "triton":
        return Attention(call=call, pairs=None)
    from .our_tiles import our_pairs

    pairs, backward_pairs, note = our_pairs(shape, bench, backward=backward)
    return Attention(call=call, pairs=pairs, backward_pairs=backward_pairs, note=note)


def check_ours(bench: Bench, dtype: torch.dtype) -> None:
    """Raise UnavailableError if our implementation cannot run at all."""
    if bench.impl not in implementations():
        raise UnavailableError(f"there is no implementation {bench.impl!r}, but {implementations()}")
    if bench.impl == "triton" and bench.device.type == "cpu" and dtype == torch.bfloat16:
        raise UnavailableError("Triton's interpreter computes nonsense in bfloat16")


def tiled(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    """What users without Triton get."""
    grid = (shape.side, shape.side)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (
            window_attention(query, key, value, grid=grid, radius=shape.radius, text_len=shape.text_len, impl="tiled"),
        )

    in_half = fastest_partial(bench.device, shape.dtype, shape.head_dim).takes_half
    note = "PyTorch's memory-efficient kernel" if in_half else "products in float32"
    return Attention(call=call, pairs=None, note=note)


def dense_cudnn(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    if bench.device.type != "cuda":
        raise UnavailableError("cuDNN runs on a GPU")
    return _dense(SDPBackend.CUDNN_ATTENTION, shape)


def dense_flash(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    return _dense(SDPBackend.FLASH_ATTENTION, shape)


def _dense(backend: SDPBackend, shape: Shape) -> Attention:
    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(query, key, value),)

    return Attention(call=call, pairs=shape.num_tokens**2, backward_products=5)


def flex_row_major(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    """CLEAR's way: one call for text and image."""
    _check_flex(bench, backward=backward)
    order, text_len = row_major((shape.side, shape.side)), shape.text_len
    mask_mod = row_major_mask_mod(shape.side, shape.radius, text_len)
    mask = analytic_block_mask(order, shape.radius, text_len, mask_mod, bench.device, text_queries=True)
    compiled, options = _compiled_flex(bench), _smaller_loads(bench)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (compiled(query, key, value, block_mask=mask, kernel_options=options),)

    return Attention(call=call, pairs=pairs_computed(mask))


def flex_tiles(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    """Image tokens in tile order; text queries in a separate call."""
    _check_flex(bench, backward=backward)
    order = tile_order(shape.side, backward=backward)
    text_len = shape.text_len
    mask_mod = tile_mask_mod(order, shape.radius, text_len, text_queries=False)
    mask = analytic_block_mask(order, shape.radius, text_len, mask_mod, bench.device, text_queries=False)
    compiled = _compiled_flex(bench)
    options = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64} | _smaller_loads(bench)

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        text, image = query.split([text_len, shape.image_len], dim=2)
        out = compiled(image, key, value, block_mask=mask, kernel_options=options)
        return F.scaled_dot_product_attention(text, key, value), out

    pairs = pairs_computed(mask) + text_len * shape.num_tokens
    return Attention(call=call, pairs=pairs, note="tokens come and go in tile order, which costs nothing here")


def tile_order(side: int, *, backward: bool) -> TileOrder:
    """Key tiles of 64 tokens; of 128 for FlexAttention's backward pass, which does not take 64."""
    return TileOrder(grid=(side, side), query_tile=TILE, key_tile=TILE if backward else SMALL_TILE)


def natten(shape: Shape, bench: Bench, *, backward: bool) -> Attention:
    """Neighbourhood attention: the square around the circle, no text."""
    if importlib.util.find_spec("natten") is None:
        raise UnavailableError("natten is not installed")
    from natten import na2d  # type: ignore[import-not-found]

    grid, window = (shape.side, shape.side), 2 * shape.radius - 1
    if window > shape.side:
        raise UnavailableError(f"a window of {window} is larger than the picture")

    def call(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        image = (tensor[:, :, shape.text_len :].transpose(1, 2).unflatten(1, grid) for tensor in (query, key, value))
        return (na2d(*image, kernel_size=(window, window)),)

    return Attention(call=call, pairs=None, backward_products=5, note="image alone, and a square window")


def _check_flex(bench: Bench, *, backward: bool) -> None:
    if backward and bench.device.type == "cpu":
        raise UnavailableError("FlexAttention has no backward pass on a CPU")


def _smaller_loads(bench: Bench) -> dict[str, int]:
    """Options for GPUs with less shared memory than FlexAttention's defaults need, as consumer cards."""
    if bench.device.type == "cpu":
        return {}
    shared = shared_memory(bench.device)
    return {} if shared >= FLEX_SHARED_MEMORY else {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 2}


def _compiled_flex(bench: Bench) -> Callable[..., Tensor]:
    """FlexAttention compiled for one shape; graphs of others, which count towards a limit, are dropped."""
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, backend=bench.scale.backend)


def pairs_attending(shape: Shape) -> int:
    """Pairs that attend, for each head: text and window for the image, everything for text."""
    side, window = shape.side, 0
    for step in range(1 - side, side):  # rows from a query to its keys
        if (rest := shape.radius**2 - step**2) > 0:
            reach = min(math.isqrt(rest - 1), side - 1)  # columns, at most
            window += (side - abs(step)) * (side * (2 * reach + 1) - reach * (reach + 1))
    return window + shape.image_len * shape.text_len + shape.text_len * shape.num_tokens


Competitor = Callable[..., Attention]
COMPETITORS: dict[str, Competitor] = {
    DENSE[0]: dense_cudnn,
    DENSE[1]: dense_flash,
    CLEAR_FLEX: flex_row_major,
    "flex tiles": flex_tiles,
    "natten": natten,
}
