"""Window attention by the Triton kernels: tiles, lists on the device, launches.

Two tile shapes: of queries (longer along one axis, the one that makes fewer pairs of tiles) and of keys (at most 64
tokens, the bits of a mask word). The shapes of the backward may be smaller, since its kernels need more memory.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..pieces.launch import block_d, dense_rows, device_of, max_stages, max_sums, split, with_strides
from . import triton_kernels as kernels
from .inputs import Inputs, token_major
from .lists import mask_words, swapped, window_lists
from .windows import Window


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tokens of a query tile and of a key tile, (rows, columns); warps of a program; stages of its loads."""

    query: tuple[int, int]
    key: tuple[int, int]
    num_warps: int
    num_stages: int
    min_arch: int = 0  # compute capability (90 for 9.0) from which on they are worth trying


SMALLER_TILES = (
    Tiles(query=(8, 8), key=(8, 8), num_warps=8, num_stages=2),
    Tiles(query=(8, 8), key=(4, 8), num_warps=4, num_stages=2),
    Tiles(query=(8, 8), key=(4, 8), num_warps=4, num_stages=1),
    Tiles(query=(4, 8), key=(4, 4), num_warps=4, num_stages=1),
)
# Twice the queries load keys half as often; half the queries compute a sixth fewer pairs beyond a window of radius 16,
# and two programs fit a multiprocessor.
FORWARD_TILES = (
    Tiles(query=(8, 16), key=(8, 8), num_warps=8, num_stages=3),
    Tiles(query=(8, 8), key=(8, 8), num_warps=4, num_stages=3),
    *SMALLER_TILES,
)
# Compiled for 8.0, the larger ones spill 1.5 KB a thread (benchmarks/kernel_resources.py).
BACKWARD_TILES = (Tiles(query=(8, 16), key=(8, 8), num_warps=8, num_stages=2, min_arch=90), *SMALLER_TILES)


def candidates(tiles: tuple[Tiles, ...], head_dim: int, arch: int, dtype: torch.dtype) -> list[Tiles]:
    """Those whose sums stay in registers, the largest first; the smallest, where none does."""
    widest = max_sums(dtype) // block_d(head_dim)
    return [
        one
        for one in tiles
        if max(one.query[0] * one.query[1], 2 * one.key[0] * one.key[1]) <= widest
        and arch >= one.min_arch
        and one.num_stages <= max_stages(dtype)
    ] or [tiles[-1]]


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The lists of one kind of tile on the device; a tile is told by the token in its corner."""

    corners: Tensor  # [tiles] int32, of the tiles that own a list
    listed: Tensor  # [tiles, longest list] int32, corners of the tiles in it
    mask_ids: Tensor  # [tiles, longest list] int32
    counts: Tensor  # [tiles] int32


@dataclass(frozen=True, kw_only=True)
class TiledWindow:
    """A window on one grid, cut into tiles."""

    query_tile: tuple[int, int]
    key_tile: tuple[int, int]
    by_query: Entries
    inside: Tensor  # [query tiles] int32, how many at the front of a list need no mask
    by_key: Entries
    words: Tensor  # [masks, BLOCK_Q] int64


@lru_cache(maxsize=16)
def _window(
    grid: tuple[int, ...], window: Window, query_tile: tuple[int, int], key_tile: tuple[int, int], device: torch.device
) -> TiledWindow:
    """Query tiles with their longer side along the axis for which the lists are shorter."""
    choices = [
        (query, window_lists(grid, window, query_tile=query, key_tile=key_tile))
        for query in dict.fromkeys((query_tile, query_tile[::-1]))
    ]
    query_tile, lists = min(choices, key=lambda choice: int(choice[1].counts.sum()))
    by_key = swapped(lists)
    query_corners, key_corners = lists.query_tokens[:, 0], lists.key_tokens[:, 0]

    def on_device(tensor: Tensor) -> Tensor:
        return tensor.int().contiguous().to(device)

    return TiledWindow(
        query_tile=query_tile,
        key_tile=key_tile,
        by_query=Entries(
            corners=on_device(query_corners),
            listed=on_device(key_corners[lists.key_tiles]),
            mask_ids=on_device(lists.mask_ids),
            counts=on_device(lists.counts),
        ),
        inside=on_device(lists.inside),
        by_key=Entries(
            corners=on_device(key_corners),
            listed=on_device(query_corners[by_key.query_tiles]),
            mask_ids=on_device(by_key.mask_ids),
            counts=on_device(by_key.counts),
        ),
        words=mask_words(lists.masks).to(device),
    )


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """What every kernel of one call is given."""

    window: TiledWindow
    shared_words: Tensor  # [B, blocks of shared keys] int64
    shared_whole: int  # leading blocks without a mask
    constants: dict[str, Any]


def _prepare(inputs: Inputs, grid: Sequence[int], window: Window, tiles: Tiles) -> _Launch:
    query = inputs.query
    head_dim = query.shape[3]
    block = tiles.key[0] * tiles.key[1]
    num_shared, mask = inputs.shared_key.shape[2], inputs.shared_mask
    if mask is None:
        words = _words_of_all(query.shape[0], num_shared, block, query.device)
    else:
        words = _shared_words(mask, block)
    return _Launch(
        window=_window(tuple(grid), window, tiles.query, tiles.key, query.device),
        shared_words=words,
        shared_whole=num_shared // block if mask is None else 0,
        constants={
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d(head_dim),
            "PRECISION": "ieee",
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        },
    )


def _shared_words(mask: Tensor, block: int) -> Tensor:
    """[B, S] bool -> [B, blocks] words; the keys missing from the last block are not seen."""
    return mask_words(F.pad(mask, (0, -mask.shape[1] % block)).unflatten(1, (-1, block)))


@lru_cache(maxsize=8)
def _words_of_all(batch: int, num_shared: int, block: int, device: torch.device) -> Tensor:
    """Of shared keys without a mask: the same in every layer and step."""
    return _shared_words(torch.ones(batch, num_shared, dtype=torch.bool, device=device), block)


def _tile_constants(window: TiledWindow) -> dict[str, int]:
    names = ("Q_ROWS", "Q_COLUMNS", "K_ROWS", "K_COLUMNS")
    return dict(zip(names, (*window.query_tile, *window.key_tile), strict=True))


def triton_forward(
    inputs: Inputs,
    out: Tensor,
    grid: Sequence[int],
    window: Window,
    scale: float,
    tiles: Tiles,
) -> Tensor:
    """Fill `out` [B, H, N, D], whose rows are dense; returns the log-sum-exp [B, H, N], float32.

    Raises:
        ValueError: scale <= 0.
    """
    if scale <= 0:
        raise ValueError(f"impl='triton' takes a scale > 0, got {scale}: 'tiled' takes any")
    launch = _prepare(inputs, grid, window, tiles)
    tensors = [dense_rows(tensor) for tensor in inputs[:5]]
    batch, num_heads, num_tokens, _ = inputs.query.shape
    lse = out.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    tiled, lists = launch.window, launch.window.by_query
    with device_of(out):
        strided, unit = with_strides(*tensors, out)
        kernels.window_forward[len(lists.counts), batch * num_heads](
            *strided,
            lse,
            *(lists.corners, lists.listed, lists.mask_ids, lists.counts, tiled.inside),
            *(tiled.words, launch.shared_words),
            *(num_heads, *grid[-2:], num_tokens, inputs.shared_key.shape[2], launch.shared_whole),
            lists.listed.shape[1],
            scale,
            UNIT=unit,
            **_tile_constants(tiled),
            **launch.constants,
        )
    return lse


def triton_backward(
    grad_out: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    grid: Sequence[int],
    window: Window,
    scale: float,
    tiles: Tiles,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, shared_key and shared_value; `out` and `lse` as `triton_forward` left them."""
    launch = _prepare(inputs, grid, window, tiles)
    query, key, value, shared_key, shared_value = (dense_rows(tensor) for tensor in inputs[:5])
    grad_out = dense_rows(grad_out)
    batch, num_heads, num_tokens, _ = query.shape
    grads = [token_major(query, num_tokens) for _ in range(3)]
    delta = torch.zeros_like(lse)  # the kernel takes the gradient of lse from here, and leaves there what others need
    if grad_lse is not None:
        delta.copy_(grad_lse)
    tiled, lists, by_key = launch.window, launch.window.by_query, launch.window.by_key
    tile_constants = _tile_constants(tiled)
    with device_of(query):
        strided, unit = with_strides(grad_out, query, key, value, shared_key, shared_value, out, grads[0])
        kernels.window_grad_query[len(lists.counts), batch * num_heads](
            *strided,
            *(lse, delta),
            *(lists.corners, lists.listed, lists.mask_ids, lists.counts, tiled.inside),
            *(tiled.words, launch.shared_words),
            *(num_heads, *grid[-2:], num_tokens, shared_key.shape[2], launch.shared_whole),
            lists.listed.shape[1],
            scale,
            UNIT=unit,
            **tile_constants,
            **launch.constants,
        )
        strided, unit = with_strides(grad_out, query, key, value, *grads[1:])
        kernels.window_grad_key[len(by_key.counts), batch * num_heads](
            *strided,
            *(lse, delta),
            *(by_key.corners, by_key.listed, by_key.mask_ids, by_key.counts, tiled.words),
            *(num_heads, *grid[-2:], num_tokens, by_key.listed.shape[1]),
            scale,
            UNIT=unit,
            **tile_constants,
            **launch.constants,
        )
        shared = (query, shared_key, shared_value, lse, delta)
        grad_shared_key, grad_shared_value = _shared_gradients(grad_out, *shared, launch, scale)
    return grads[0], grads[1], grads[2], grad_shared_key, grad_shared_value


def _shared_gradients(
    grad_out: Tensor,
    query: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    lse: Tensor,
    delta: Tensor,
    launch: _Launch,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of shared_key and shared_value: partial sums over parts of the image, then their sum, no atomics."""
    batch, num_heads, num_shared, head_dim = shared_key.shape
    if num_shared == 0:
        return torch.empty_like(shared_key), torch.empty_like(shared_value)
    num_tokens, window = query.shape[2], launch.window
    block_q, block_k = math.prod(window.query_tile), math.prod(window.key_tile)
    blocks = triton.cdiv(num_shared, block_k)
    splits, split_len = split(num_tokens, block_q, blocks * batch * num_heads, query.device)
    partial = query.new_empty(2, splits, batch, num_heads, num_shared, head_dim, dtype=torch.float32)
    strided, unit = with_strides(grad_out, query, shared_key, shared_value)
    kernels.window_grad_shared[blocks, batch * num_heads, splits](
        *strided,
        *(*partial, lse, delta, launch.shared_words),
        *(num_heads, num_tokens, num_shared, split_len),
        scale,
        UNIT=unit,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        **launch.constants,
    )
    grad_key, grad_value = partial
    return grad_key.sum(0).to(shared_key.dtype), grad_value.sum(0).to(shared_value.dtype)
