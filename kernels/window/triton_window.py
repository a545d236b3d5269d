"""Window attention by the Triton kernels: tiles, lists on the device, launches.

There are two tile shapes: the tile that a program owns (longer along the axis that makes fewer pairs of tiles) and the
tiles that it reads (at most 64 tokens, the bits of a mask word). The backward's may be smaller: it needs more memory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..pieces.cells import Grid
from ..pieces.launch import block_d, dense_rows, device_of, max_stages, split, with_strides
from ..pieces.results import token_major
from ..pieces.table_cache import cached_table
from . import triton_kernels as kernels
from .inputs import Inputs
from .lists import TileLists, mask_words, transposed, window_lists
from .windows import Window


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tile that a program owns and a tile that it reads, (rows, columns) of tokens; its warps; stages of its loads.

    A program owns queries and reads keys; for the gradients of keys, the other way round.
    """

    owned: tuple[int, int]
    read: tuple[int, int]
    num_warps: int
    num_stages: int
    archs: range = range(1000)  # compute capabilities (90 for 9.0) on which they are worth trying


SMALLER_TILES = (
    Tiles(owned=(8, 8), read=(8, 8), num_warps=8, num_stages=2),
    Tiles(owned=(8, 8), read=(4, 8), num_warps=4, num_stages=2),
    Tiles(owned=(8, 8), read=(4, 8), num_warps=4, num_stages=1),
    Tiles(owned=(4, 8), read=(4, 4), num_warps=4, num_stages=1),
)
# The first tile loads keys half as often; the second computes a sixth fewer pairs outside a window of radius 16, and
# two programs fit on a multiprocessor.
FORWARD_TILES = (
    Tiles(owned=(8, 16), read=(8, 8), num_warps=8, num_stages=3),
    Tiles(owned=(8, 8), read=(8, 8), num_warps=4, num_stages=3),
    *SMALLER_TILES,
)
# The first two are for tensor cores that read from shared memory alone; compiled for others they spill
# (benchmarks/kernel_resources.py). Two programs of the second fit on a multiprocessor of 9.0: one multiplies while the
# other computes its weights.
BACKWARD_TILES = (
    Tiles(owned=(8, 16), read=(8, 8), num_warps=8, num_stages=2, archs=range(90, 120)),
    Tiles(owned=(8, 8), read=(8, 8), num_warps=4, num_stages=2, archs=range(90, 120)),
    *SMALLER_TILES,
)
# float32 accumulators of one output that fit a thread's registers; gradients of keys have two outputs. Half of that for
# float32 inputs (`max_stages` says why).
SUMS_PER_THREAD, FLOAT_SUMS_PER_THREAD = 64, 32


def candidates(tiles: tuple[Tiles, ...], head_dim: int, arch: int, dtype: torch.dtype) -> list[Tiles]:
    """The tiles to try: those whose sums stay in registers, the largest first; the smallest if none do."""
    max_sums = FLOAT_SUMS_PER_THREAD if dtype == torch.float32 else SUMS_PER_THREAD
    return [
        one
        for one in tiles
        if math.prod(one.owned) * block_d(head_dim) <= max_sums * 32 * one.num_warps
        and arch in one.archs
        and one.num_stages <= max_stages(dtype)
    ] or [tiles[-1]]


@dataclass(frozen=True, kw_only=True)
class TiledWindow:
    """A window on one grid, cut into tiles, on the device; a tile is given by the token in its corner."""

    owned: tuple[int, int]
    corners: Tensor  # [owned tiles] int32
    listed: Tensor  # [owned tiles, longest list] int32, corners of the tiles to read
    mask_ids: Tensor  # [owned tiles, longest list] int32
    counts: Tensor  # [owned tiles] int32
    inside: Tensor  # [owned tiles] int32, leading tiles of a list without a mask; 0 if keys are owned: all have one
    words: Tensor  # [masks, owned tokens] int64, a bit for each token that is read


@cached_table(maxsize=16)
def _window(
    grid: Grid, window: Window, owned: tuple[int, int], read: tuple[int, int], device: torch.device
) -> TiledWindow:
    """A window cut for programs that own queries and read keys."""
    owned, lists = _with_shorter_lists(owned, lambda tile: window_lists(grid, window, query_tile=tile, key_tile=read))
    listed = lists.key_tokens[:, 0][lists.key_tiles]
    lengths = lists.counts, lists.inside
    return _on_device(device, owned, lists.query_tokens[:, 0], listed, lists.mask_ids, *lengths, lists.masks)


@cached_table(maxsize=16)
def _key_window(
    grid: Grid, window: Window, owned: tuple[int, int], read: tuple[int, int], device: torch.device
) -> TiledWindow:
    """A window cut for programs that own keys and read the queries that see them."""
    owned, lists = _with_shorter_lists(owned, lambda tile: window_lists(grid, window, query_tile=read, key_tile=tile))
    by_key = transposed(lists)
    listed = lists.query_tokens[:, 0][by_key.query_tiles]
    lengths = by_key.counts, torch.zeros_like(by_key.counts)
    masks = lists.masks.transpose(1, 2)
    return _on_device(device, owned, lists.key_tokens[:, 0], listed, by_key.mask_ids, *lengths, masks)


def _with_shorter_lists(
    owned: tuple[int, int], lists_of: Callable[[tuple[int, int]], TileLists]
) -> tuple[tuple[int, int], TileLists]:
    """The owned tile, turned so that lists are shorter, and the lists."""
    choices = [(tile, lists_of(tile)) for tile in dict.fromkeys((owned, owned[::-1]))]
    return min(choices, key=lambda choice: int(choice[1].counts.sum()))


def _on_device(device: torch.device, owned: tuple[int, int], *lists: Tensor) -> TiledWindow:
    *numbers, masks = lists
    corners, listed, mask_ids, counts, inside = (one.int().contiguous().to(device) for one in numbers)
    return TiledWindow(
        owned=owned,
        corners=corners,
        listed=listed,
        mask_ids=mask_ids,
        counts=counts,
        inside=inside,
        words=mask_words(masks).to(device),
    )


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """Arguments of every kernel of one call."""

    window: TiledWindow
    shared_words: Tensor  # [B, blocks of shared keys] int64
    shared_whole: int  # leading blocks without a mask
    constants: dict[str, Any]


def _prepare(inputs: Inputs, grid: Sequence[int], window: Window, tiles: Tiles) -> _Launch:
    query = inputs.query
    head_dim = query.shape[3]
    block = math.prod(tiles.read)
    num_shared, mask = inputs.shared_key.shape[2], inputs.shared_mask
    if mask is None:
        words = _unmasked_words(query.shape[0], num_shared, block, query.device)
    else:
        words = _shared_words(mask, block)
    return _Launch(
        window=_window(tuple(grid), window, tiles.owned, tiles.read, query.device),
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
    """[B, S] bool -> [B, blocks] words; keys missing from the last block are not seen."""
    return mask_words(F.pad(mask, (0, -mask.shape[1] % block)).unflatten(1, (-1, block)))


@cached_table(maxsize=8)
def _unmasked_words(batch: int, num_shared: int, block: int, device: torch.device) -> Tensor:
    """`_shared_words` of keys without a mask, cached: they are the same in every layer and step."""
    return _shared_words(torch.ones(batch, num_shared, dtype=torch.bool, device=device), block)


def _tile_constants(queries: tuple[int, int], keys: tuple[int, int]) -> dict[str, int]:
    return dict(zip(("Q_ROWS", "Q_COLUMNS", "K_ROWS", "K_COLUMNS"), (*queries, *keys), strict=True))


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
        raise ValueError(f"impl='triton' needs a scale > 0, got {scale}: use 'tiled', which takes any scale")
    launch = _prepare(inputs, grid, window, tiles)
    tensors = [dense_rows(tensor) for tensor in inputs[:5]]
    batch, num_heads, num_tokens, _ = inputs.query.shape
    lse = out.new_empty(batch, num_heads, num_tokens, dtype=torch.float32)
    tiled = launch.window
    with device_of(out):
        strided, unit = with_strides(*tensors, out)
        kernels.window_forward[len(tiled.counts), batch * num_heads](
            *strided,
            lse,
            *(tiled.corners, tiled.listed, tiled.mask_ids, tiled.counts, tiled.inside),
            *(tiled.words, launch.shared_words),
            *(num_heads, *grid[-2:], num_tokens, inputs.shared_key.shape[2], launch.shared_whole),
            tiled.listed.shape[1],
            scale,
            UNIT=unit,
            **_tile_constants(tiled.owned, tiles.read),
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
    """Gradients of query, key, value, shared_key and shared_value; `out` and `lse` are those of `triton_forward`."""
    launch = _prepare(inputs, grid, window, tiles)
    query, key, value, shared_key, shared_value = (dense_rows(tensor) for tensor in inputs[:5])
    grad_out = dense_rows(grad_out)
    batch, num_heads, num_tokens, _ = query.shape
    grads = [token_major(query, num_tokens) for _ in range(3)]
    delta = torch.empty_like(lse)  # written by the query kernel, read by the key kernels
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype).contiguous()
    tiled = launch.window
    key_window = _key_window(tuple(grid), window, tiles.owned, tiles.read, query.device)
    with device_of(query):
        strided, unit = with_strides(grad_out, query, key, value, shared_key, shared_value, out, grads[0])
        kernels.window_grad_query[len(tiled.counts), batch * num_heads](
            *strided,
            *(lse, grad_lse, delta),
            *(tiled.corners, tiled.listed, tiled.mask_ids, tiled.counts, tiled.inside),
            *(tiled.words, launch.shared_words),
            *(num_heads, *grid[-2:], num_tokens, shared_key.shape[2], launch.shared_whole),
            tiled.listed.shape[1],
            scale,
            UNIT=unit,
            **_tile_constants(tiled.owned, tiles.read),
            **launch.constants,
        )
        strided, unit = with_strides(grad_out, query, key, value, *grads[1:])
        kernels.window_grad_key[len(key_window.counts), batch * num_heads](
            *strided,
            *(lse, delta),
            *(key_window.corners, key_window.listed, key_window.mask_ids, key_window.counts, key_window.words),
            *(num_heads, *grid[-2:], num_tokens, key_window.listed.shape[1]),
            scale,
            UNIT=unit,
            **_tile_constants(tiles.read, key_window.owned),
            **launch.constants,
        )
        shared = (query, shared_key, shared_value, lse, delta)
        grad_shared_key, grad_shared_value = _shared_gradients(grad_out, *shared, launch, tiles, scale)
    return grads[0], grads[1], grads[2], grad_shared_key, grad_shared_value


def _shared_gradients(
    grad_out: Tensor,
    query: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    lse: Tensor,
    delta: Tensor,
    launch: _Launch,
    tiles: Tiles,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of shared_key and shared_value: partial sums over parts of the image, then their sum; no atomics."""
    batch, num_heads, num_shared, head_dim = shared_key.shape
    if num_shared == 0 or query.numel() == 0:
        return torch.empty_like(shared_key), torch.empty_like(shared_value)
    num_tokens, keys, queries = query.shape[2], math.prod(tiles.owned), math.prod(tiles.read)
    blocks = triton.cdiv(num_shared, keys)
    splits, split_len = split(num_tokens, queries, blocks * batch * num_heads, query.device)
    partial = query.new_empty(2, splits, batch, num_heads, num_shared, head_dim, dtype=torch.float32)
    strided, unit = with_strides(grad_out, query, shared_key, shared_value)
    kernels.window_grad_shared[blocks, batch * num_heads, splits](
        *strided,
        *(*partial, lse, delta, launch.shared_words),
        *(num_heads, num_tokens, num_shared, split_len),
        scale,
        UNIT=unit,
        BLOCK_Q=queries,
        BLOCK_K=keys,
        WORD_LEN=queries,
        **launch.constants,
    )
    grad_key, grad_value = partial
    return grad_key.sum(0).to(shared_key.dtype), grad_value.sum(0).to(shared_value.dtype)
