"""Which key tiles every query tile reads: all that an implementation needs to know about a window.

The image is cut in rectangular tiles. A builder turns the geometry of one window into `TileLists`; attention code
reads only these lists. Another window (square, dilated, groups, aligned tiles) is another builder.

    . . . . . . . .     a query tile (Q) and the key tiles of its circular window:
    . b b b b b . .         Q, i   every query of Q sees the whole tile: read without a mask
    . b i i i b . .         b      only some pairs are near enough: read through a mask
    . b i Q i b . .         .      not read
    . b i i i b . .
    . b b b b b . .
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TileLists:
    """The key tiles of every query tile, those without a mask first.

    Entry `e` of query tile `t`, for `e < counts[t]`, is key tile `key_tiles[t, e]`; its mask is
    `masks[mask_ids[t, e]]`, which is true everywhere a query exists if `e < inside[t]`.
    A slot beyond the edge of the grid repeats a token of the image and is false in every mask.
    """

    query_tokens: Tensor  # [query tiles, BLOCK_Q] index into the image, row-major
    key_tokens: Tensor  # [key tiles, BLOCK_K] likewise
    counts: Tensor  # [query tiles]
    inside: Tensor  # [query tiles]
    key_tiles: Tensor  # [query tiles, longest list]
    mask_ids: Tensor  # [query tiles, longest list], -1 beyond the count
    masks: Tensor  # [distinct masks, BLOCK_Q, BLOCK_K] bool


@dataclass(frozen=True, kw_only=True)
class SwappedLists:
    """The query tiles that read each key tile."""

    counts: Tensor  # [key tiles]
    query_tiles: Tensor  # [key tiles, longest list]
    mask_ids: Tensor  # [key tiles, longest list], -1 beyond the count


def swapped(lists: TileLists) -> SwappedLists:
    """The same pairs with the roles of the tiles swapped: what the gradients of keys and values go over."""
    query_tiles, entries = (torch.arange(lists.key_tiles.shape[1]) < lists.counts[:, None]).nonzero().unbind(1)
    key_tiles = lists.key_tiles[query_tiles, entries]
    order = key_tiles.argsort(stable=True)
    key_tiles, query_tiles, entries = key_tiles[order], query_tiles[order], entries[order]
    counts = key_tiles.bincount(minlength=len(lists.key_tokens))
    slots = torch.arange(len(key_tiles)) - (counts.cumsum(0) - counts)[key_tiles]
    shape = len(counts), int(counts.max())
    return SwappedLists(
        counts=counts,
        query_tiles=torch.zeros(shape, dtype=torch.int64).index_put((key_tiles, slots), query_tiles),
        mask_ids=torch.full(shape, -1).index_put((key_tiles, slots), lists.mask_ids[query_tiles, entries]),
    )


def mask_words(masks: Tensor) -> Tensor:
    """[masks, BLOCK_Q, BLOCK_K <= 64] bool -> [masks, BLOCK_Q] int64 whose bit j is the mask of key j."""
    return (masks.long() << torch.arange(masks.shape[2], device=masks.device)).sum(2)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of the grid: the key tiles in reach of every query tile, candidates `[query tiles, width]`."""

    key: Tensor  # index of the key tile on this axis
    exists: Tensor  # False where a query tile has fewer candidates than the widest one
    nearest: Tensor  # distance of the nearest pair of tokens
    farthest: Tensor  # distance of the farthest pair
    shape: Tensor  # [..., 3]: key start - query start, query length, key length


def circle_lists(
    grid: tuple[int, ...],
    radius: float,
    frame_radius: int | None = None,
    *,
    query_tile: tuple[int, int],
    key_tile: tuple[int, int],
) -> TileLists:
    """Lists of the window `dy**2 + dx**2 < radius**2` (CLEAR, arXiv:2412.16112), in the frames near the query's.

    Args:
        grid: (height, width) or (frames, height, width) in tokens.
        radius: in tokens, strict, > 0.
        frame_radius: in frames, strict, >= 1; None: all frames.
        query_tile: (rows, columns) of a query tile; key_tile: of a key tile.
    """
    frames, height, width = (1, *grid)[-3:]
    limit = squared_limit(radius, height, width)
    rows = _axis(height, query_tile[0], key_tile[0], limit)
    columns = _axis(width, query_tile[1], key_tile[1], limit)

    nearest, farthest = _squared(rows.nearest, columns.nearest), _squared(rows.farthest, columns.farthest)
    exists = (rows.exists[:, None, :, None] & columns.exists[None, :, None, :]).flatten(2).flatten(0, 1)
    touched = exists & (nearest < limit)
    shapes = _pair_shapes(rows.shape, columns.shape)  # [query tiles, candidates, 6]
    whole = (shapes[..., 2] == key_tile[0]) & (shapes[..., 5] == key_tile[1])
    kind = torch.where(touched, torch.where(whole & (farthest < limit), 0, 1), 2)  # 0 inside, 1 border, 2 not read

    distinct, ids = torch.unique(shapes[touched], dim=0, return_inverse=True)
    mask_ids = torch.full(kind.shape, -1).masked_scatter(touched, ids)
    num_columns = -(-width // key_tile[1])
    key_tiles = (rows.key[:, None, :, None] * num_columns + columns.key[None, :, None, :]).flatten(2).flatten(0, 1)

    # Each query tile reads the same window in all frames in reach: [frames, query tiles, frames in reach, candidates].
    in_time = _axis(frames, 1, 1, min(frame_radius or frames, frames) ** 2)
    key_frame, exists = in_time.key[:, None, :, None], in_time.exists[:, None, :, None]
    per_frame = -(-height // key_tile[0]) * num_columns
    key_tiles = (key_tiles[:, None] + per_frame * key_frame).flatten(2).flatten(0, 1)
    kind = torch.where(exists, kind[:, None], 2).flatten(2).flatten(0, 1)
    mask_ids = torch.where(exists, mask_ids[:, None], -1).flatten(2).flatten(0, 1)

    order = kind.argsort(dim=1, stable=True)[:, : int((kind < 2).sum(1).max())]
    return TileLists(
        query_tokens=_tile_tokens(frames, height, width, query_tile),
        key_tokens=_tile_tokens(frames, height, width, key_tile),
        counts=(kind < 2).sum(1),
        inside=(kind == 0).sum(1),
        key_tiles=key_tiles.gather(1, order),
        mask_ids=mask_ids.gather(1, order),
        masks=_circle_masks(distinct, query_tile, key_tile, limit),
    )


def squared_limit(radius: float, height: int, width: int) -> int:
    """The integer L with `d2 < radius**2` exactly when `d2 < L`, for every squared distance d2 on the grid."""
    bounded = min(radius, height + width)
    return math.ceil(bounded * bounded)


def _axis(size: int, query_tile: int, key_tile: int, limit: int) -> _Axis:
    reach = math.isqrt(limit - 1)
    query_start = torch.arange(0, size, query_tile)
    query_last = (query_start + query_tile).clamp(max=size) - 1
    first = (query_start - reach).clamp(min=0) // key_tile
    last = (query_last + reach).clamp(max=size - 1) // key_tile
    key = first[:, None] + torch.arange(int((last - first).max()) + 1)
    exists = key <= last[:, None]
    key = key.minimum(last[:, None])

    query_start, query_last, key_start = query_start[:, None], query_last[:, None], key * key_tile
    key_last = (key_start + key_tile).clamp(max=size) - 1
    return _Axis(
        key=key,
        exists=exists,
        nearest=torch.maximum(key_start - query_last, query_start - key_last).clamp(min=0),
        farthest=torch.maximum(key_last - query_start, query_last - key_start),
        shape=torch.stack(
            [key_start - query_start, (query_last - query_start + 1).expand_as(key), key_last - key_start + 1], dim=-1
        ),
    )


def _squared(rows: Tensor, columns: Tensor) -> Tensor:
    """[row tiles, a], [column tiles, b] distances -> squared distance [row tiles * column tiles, a * b]."""
    return (rows[:, None, :, None] ** 2 + columns[None, :, None, :] ** 2).flatten(2).flatten(0, 1)


def _pair_shapes(rows: Tensor, columns: Tensor) -> Tensor:
    """[row tiles, a, 3], [column tiles, b, 3] -> [row tiles * column tiles, a * b, 6]."""
    full = (rows.shape[0], columns.shape[0], rows.shape[1], columns.shape[1], 3)
    pair = [rows[:, None, :, None].expand(full), columns[None, :, None, :].expand(full)]
    return torch.cat(pair, dim=-1).flatten(2, 3).flatten(0, 1)


def _circle_masks(shapes: Tensor, query_tile: tuple[int, int], key_tile: tuple[int, int], limit: int) -> Tensor:
    """Mask of every distinct (offset, query length, key length) per axis: [masks, 6] -> [masks, BLOCK_Q, BLOCK_K]."""
    squares = []
    for axis in (0, 1):
        offset, query_length, key_length = shapes[:, 3 * axis : 3 * axis + 3, None, None].unbind(1)
        query, key = torch.arange(query_tile[axis])[:, None], torch.arange(key_tile[axis])
        missing = (query >= query_length) | (key >= key_length)
        squares.append(((offset + key - query) ** 2).masked_fill(missing, limit).int())
    near = squares[0][:, :, None, :, None] + squares[1][:, None, :, None, :] < limit
    return near.flatten(3).flatten(1, 2)


def _tile_tokens(frames: int, height: int, width: int, tile: tuple[int, int]) -> Tensor:
    """Tokens of every tile, tiles row-major within a frame: [tiles, BLOCK]; slots beyond an edge repeat its token."""
    row, column = (
        (torch.arange(0, size, step)[:, None] + torch.arange(step)).clamp(max=size - 1)
        for size, step in ((height, tile[0]), (width, tile[1]))
    )
    tokens = (row[:, None, :, None] * width + column[None, :, None, :]).flatten(2).flatten(0, 1)
    return (tokens + height * width * torch.arange(frames)[:, None, None]).flatten(0, 1)
