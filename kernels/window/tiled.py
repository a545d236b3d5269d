"""Window attention of image queries, tile by tile, in plain PyTorch: cost and memory linear in the image.

Query tiles with the same mask form a group. The keys that a tile sees are gathered into one dense block, which is
attended to with that mask; the shared keys (text, pooled tokens) are a second part for the same queries, merged by
log-sum-exp. Only `window_groups` depends on the kind of window.

Internally, tensors are rows of tokens, [B, N, H * D]: a token is contiguous, as diffusers' projections return it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..pieces.cells import Grid
from ..pieces.results import sum_dtype
from ..pieces.table_cache import cached_table
from .inputs import Inputs
from .lists import TileLists, box_lists, circle_lists
from .partial import Keys, Partial, attention_bias, fastest_partial, merge
from .windows import Circle, Window

# Bytes of gathered keys and values per call: more exceeds a CPU's caches, less leaves a GPU idle.
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}


@dataclass(frozen=True, kw_only=True)
class TileGroup:
    """Query tiles that share a mask: only real queries, only keys that some query of the tile sees."""

    queries: Tensor  # [tiles, Q] image tokens, int32
    keys: Tensor  # [tiles, K] image tokens, int32
    mask: Tensor | None  # [Q, K] bool, None if every pair attends


def tile_groups(lists: TileLists, device: torch.device) -> tuple[TileGroup, ...]:
    """Groups, on the device, whose queries together are every image token once."""
    patterns, members = torch.unique(lists.mask_ids, dim=0, return_inverse=True)
    groups = []
    for index, pattern in enumerate(patterns):
        tiles = (members == index).nonzero()[:, 0]
        count = int((pattern >= 0).sum())
        mask = lists.masks[pattern[:count]].transpose(0, 1).flatten(1)  # [BLOCK_Q, count * BLOCK_K]
        real, seen = mask.any(1), mask.any(0)
        mask = mask[real][:, seen]
        groups.append(
            TileGroup(
                queries=lists.query_tokens[tiles][:, real].int().to(device),
                keys=lists.key_tokens[lists.key_tiles[tiles, :count]].flatten(1)[:, seen].int().to(device),
                mask=None if mask.all() else mask.to(device),
            )
        )
    return tuple(groups)


class _Chunk(NamedTuple):
    """Some tiles of one group, processed in one call."""

    tiles: int
    queries: Tensor  # [tiles * Q]
    keys: Tensor  # [tiles * K]
    bias: Tensor | None  # [Q, K]


def tiled_forward(inputs: Inputs, out: Tensor, grid: Sequence[int], window: Window, scale: float) -> Tensor:
    """Fill `out` [B, H, N, D], whose memory is in the order [B, N, H, D]; returns the log-sum-exp [B, H, N]."""
    groups, partial = _groups_and_partial(inputs, grid, window)
    batch, num_heads, num_tokens, _ = inputs.query.shape
    dtype = _products_dtype(inputs.query, partial)
    shared = _shared_keys(inputs, dtype)
    query, key, value = _rows(inputs.query), _rows(inputs.key), _rows(inputs.value)
    out_rows = out.transpose(1, 2).flatten(2)
    lse_rows = query.new_empty(batch, num_tokens, num_heads, dtype=sum_dtype(query))
    for chunk in _chunks(groups, key, dtype):
        q = _gather_rows(query, chunk.queries, num_heads, dtype)
        k, v = (_tiles(_gather_rows(rows, chunk.keys, num_heads, dtype), chunk.tiles) for rows in (key, value))
        o, lse = partial.forward(_tiles(q, chunk.tiles), Keys(k, v, chunk.bias), scale)
        o, lse = _untile(o, batch), _untile(lse, batch)  # [B, queries, H, D], [B, queries, H]
        if shared is not None:
            shared_o, shared_lse = partial.forward(q.transpose(1, 2), shared, scale)
            o, lse = merge(o, lse, shared_o.transpose(1, 2), shared_lse.transpose(1, 2))
        out_rows.index_copy_(1, chunk.queries, o.flatten(2).to(out_rows.dtype))
        lse_rows.index_copy_(1, chunk.queries, lse)
    return lse_rows.transpose(1, 2).contiguous()


def tiled_backward(
    grad_out: Tensor,
    inputs: Inputs,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    grid: Sequence[int],
    window: Window,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, shared_key and shared_value; `out` and `lse` are those of the forward."""
    groups, partial = _groups_and_partial(inputs, grid, window)
    lse_rows = lse.transpose(1, 2).contiguous()  # [B, N, H]
    grad_lse_rows = None if grad_lse is None else grad_lse.to(lse.dtype).transpose(1, 2).contiguous()
    num_heads, dtype = inputs.query.shape[1], _products_dtype(inputs.query, partial)
    shared = _shared_keys(inputs, dtype)
    query, key, value = _rows(inputs.query), _rows(inputs.key), _rows(inputs.value)
    out_rows, grad_out_rows = _rows(out), _rows(grad_out)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (torch.zeros_like(rows, dtype=lse.dtype) for rows in (key, value))
    grad_shared = [rows.new_zeros(rows.shape, dtype=lse.dtype) for rows in (inputs.shared_key, inputs.shared_value)]
    for chunk in _chunks(groups, key, dtype):
        q, o, do = (_gather_rows(rows, chunk.queries, num_heads, dtype) for rows in (query, out_rows, grad_out_rows))
        k, v = (_tiles(_gather_rows(rows, chunk.keys, num_heads, dtype), chunk.tiles) for rows in (key, value))
        chunk_lse = lse_rows.index_select(1, chunk.queries)
        dl = None if grad_lse_rows is None else grad_lse_rows.index_select(1, chunk.queries)
        q_tiles, o_tiles, do_tiles, lse_tiles = (_tiles(rows, chunk.tiles) for rows in (q, o, do, chunk_lse))
        dl_tiles = None if dl is None else _tiles(dl, chunk.tiles)
        dq, dk, dv = partial.backward(do_tiles, q_tiles, Keys(k, v, chunk.bias), o_tiles, lse_tiles, scale, dl_tiles)
        dq = _untile(dq, query.shape[0])
        if shared is not None:
            q, o, do, chunk_lse = (rows.transpose(1, 2) for rows in (q, o, do, chunk_lse))
            dl = None if dl is None else dl.transpose(1, 2)
            shared_dq, *shared_grads = partial.backward(do, q, shared, o, chunk_lse, scale, dl)
            dq = dq + shared_dq.transpose(1, 2)
            for total, grad in zip(grad_shared, shared_grads, strict=True):
                total += grad
        grad_query.index_copy_(1, chunk.queries, dq.flatten(2).to(grad_query.dtype))
        grad_key.index_add_(1, chunk.keys, _untile(dk, query.shape[0]).flatten(2))
        grad_value.index_add_(1, chunk.keys, _untile(dv, query.shape[0]).flatten(2))
    heads = (
        rows.to(query.dtype).unflatten(2, (num_heads, inputs.query.shape[3])).transpose(1, 2)
        for rows in (grad_query, grad_key, grad_value)
    )
    return (*heads, *(total.to(query.dtype) for total in grad_shared))


def _products_dtype(query: Tensor, partial: Partial) -> torch.dtype:
    """The dtype in which `partial` gets queries, keys and values; sums are wider."""
    return query.dtype if partial.takes_half else sum_dtype(query)


def _shared_keys(inputs: Inputs, dtype: torch.dtype) -> Keys | None:
    """The keys that every image query sees, None if there are none."""
    if inputs.shared_key.shape[2] == 0:
        return None
    bias = None
    if inputs.shared_mask is not None:
        bias = attention_bias(inputs.shared_mask, dtype)[:, None, None, :]
    return Keys(inputs.shared_key.to(dtype), inputs.shared_value.to(dtype), bias)


def _chunks(groups: tuple[TileGroup, ...], key: Tensor, dtype: torch.dtype) -> Iterator[_Chunk]:
    """Every group, cut such that the gathered keys and values of a chunk have about CHUNK_BYTES."""
    token_bytes = 2 * key.shape[0] * key.shape[2] * dtype.itemsize
    if token_bytes == 0:  # an empty batch
        return
    budget = CHUNK_BYTES.get(key.device.type, CHUNK_BYTES["cuda"])
    for group in groups:
        bias = None if group.mask is None else attention_bias(group.mask, dtype)
        step = max(1, budget // (token_bytes * group.keys.shape[1]))
        for queries, keys in zip(group.queries.split(step), group.keys.split(step), strict=True):
            yield _Chunk(len(queries), queries.flatten().long(), keys.flatten().long(), bias)


def _rows(tensor: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, H * D], without a copy if memory is in that order."""
    return tensor.transpose(1, 2).flatten(2).contiguous()


def _gather_rows(rows: Tensor, index: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """[B, N, H * D] -> [B, len(index), H, D]."""
    # On a CPU, taking rows of a matrix is a third faster than of a batch of one.
    taken = rows[0].index_select(0, index)[None] if len(rows) == 1 else rows.index_select(1, index)
    return taken.to(dtype).unflatten(2, (num_heads, -1))


def _tiles(rows: Tensor, tiles: int) -> Tensor:
    """[B, tiles * L, H, ...] -> [B * tiles, H, L, ...]."""
    return rows.unflatten(1, (tiles, -1)).flatten(0, 1).transpose(1, 2)


def _untile(tensor: Tensor, batch: int) -> Tensor:
    """[B * tiles, H, L, ...] -> [B, tiles * L, H, ...]."""
    return tensor.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)


def _groups_and_partial(inputs: Inputs, grid: Sequence[int], window: Window) -> tuple[tuple[TileGroup, ...], Partial]:
    query = inputs.query
    partial = fastest_partial(query.device, query.dtype, query.shape[3])
    return window_groups(tuple(grid), window, query.device), partial


@cached_table(maxsize=8)
def window_groups(grid: Grid, window: Window, device: torch.device) -> tuple[TileGroup, ...]:
    """The groups of a window, on the device."""
    tile = query_tile(window, grid[-2], grid[-1])
    if isinstance(window, Circle):
        lists = circle_lists(grid, window.radius, window.frame_radius, query_tile=tile, key_tile=tile)
    else:
        lists = box_lists(grid, window, query_tile=tile, key_tile=tile, step=window.dilation)
    return tile_groups(lists, device)


def query_tile(window: Window, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of the tiles; with dilation, in tokens of one class."""
    if isinstance(window, Circle):
        return tile_shape(height, width, window.radius)
    height, width = -(-height // window.dilation[0]), -(-width // window.dilation[1])
    if window.cell == (1, 1):
        return tile_shape(height, width, max(window.window) / 2)
    return min(_side_of_whole_cells(window.cell[0]), height), min(_side_of_whole_cells(window.cell[1]), width)


def tile_shape(height: int, width: int, radius: float) -> tuple[int, int]:
    """(rows, columns) of the tiles that cut the grid evenly.

    Measured on a CPU: 8x8 is best up to radius 16, then 16x16. A narrow grid takes longer tiles of as many tokens.
    """
    side = 8 if radius <= 16 else 16
    rows = _even_piece(height, max(side, side * side // width))
    return rows, _even_piece(width, max(side, side * side // rows))


def _even_piece(size: int, longest: int) -> int:
    """Longest piece when `size` is cut evenly into the fewest pieces of at most `longest`."""
    return -(-size // -(-size // longest))


def _side_of_whole_cells(cell: int) -> int:
    """Side of a tile: a divisor of the cell if there is one, so that no mask is needed; a multiple of small cells."""
    if cell <= 8:
        return cell * (8 // cell)
    return next((side for side in range(16, 8, -1) if cell % side == 0), 8)
