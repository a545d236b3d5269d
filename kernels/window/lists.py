"""Lists of the key tiles that every query tile reads: all that an implementation needs to know about a window.

The image is cut into rectangular tiles. A builder, `circle_lists` or `box_lists`, turns the geometry of one window into
`TileLists`; attention code reads only these lists. A new kind of window needs a new builder.

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

from ..pieces.cells import Grid, sizes_of
from .windows import Box, Circle, Span, Window

INSIDE, BORDER, OUTSIDE = 0, 1, 2  # a key tile is read without a mask, through a mask, not at all


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
class TransposedLists:
    """The query tiles that read each key tile."""

    counts: Tensor  # [key tiles]
    query_tiles: Tensor  # [key tiles, longest list]
    mask_ids: Tensor  # [key tiles, longest list], -1 beyond the count


def transposed(lists: TileLists) -> TransposedLists:
    """The same pairs with the roles of the tiles swapped, for the gradients of keys and values."""
    query_tiles, entries = (torch.arange(lists.key_tiles.shape[1]) < lists.counts[:, None]).nonzero().unbind(1)
    key_tiles = lists.key_tiles[query_tiles, entries]
    order = key_tiles.argsort(stable=True)
    key_tiles, query_tiles, entries = key_tiles[order], query_tiles[order], entries[order]
    counts = key_tiles.bincount(minlength=len(lists.key_tokens))
    slots = torch.arange(len(key_tiles)) - (counts.cumsum(0) - counts)[key_tiles]
    shape = len(counts), int(counts.max())
    return TransposedLists(
        counts=counts,
        query_tiles=torch.zeros(shape, dtype=torch.int64).index_put((key_tiles, slots), query_tiles),
        mask_ids=torch.full(shape, -1).index_put((key_tiles, slots), lists.mask_ids[query_tiles, entries]),
    )


def mask_words(masks: Tensor) -> Tensor:
    """[masks, BLOCK_Q, BLOCK_K <= 64] bool -> [masks, BLOCK_Q] int64 whose bit j is the mask of key j."""
    return (masks.long() << torch.arange(masks.shape[2], device=masks.device)).sum(2)


def window_lists(grid: Grid, window: Window, *, query_tile: tuple[int, int], key_tile: tuple[int, int]) -> TileLists:
    """Lists of any window whose tiles are rectangles of the image."""
    if isinstance(window, Circle):
        return circle_lists(grid, window.radius, window.frame_radius, query_tile=query_tile, key_tile=key_tile)
    return box_lists(grid, window, query_tile=query_tile, key_tile=key_tile)


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The pairs of tiles of one frame: each query tile with its candidates among the key tiles."""

    key_tiles: Tensor  # [query tiles, candidates]
    kind: Tensor  # [query tiles, candidates] INSIDE, BORDER or OUTSIDE
    mask_ids: Tensor  # [query tiles, candidates], -1 where OUTSIDE
    masks: Tensor  # [distinct masks, BLOCK_Q, BLOCK_K] bool


def _repeat_in_frames(
    pairs: _Pairs, query_tokens: Tensor, key_tokens: Tensor, frames: int, frame_radius: int | None
) -> TileLists:
    """Each query tile reads the same window in all frames in reach; tokens are those of all frames."""
    in_time = _axis(frames, 1, 1, min(frame_radius or frames, frames) ** 2)
    # [frames, query tiles, frames in reach, candidates]
    key_frame, exists = in_time.key[:, None, :, None], in_time.exists[:, None, :, None]
    per_frame = len(key_tokens) // frames
    key_tiles = (pairs.key_tiles[:, None] + per_frame * key_frame).flatten(2).flatten(0, 1)
    kind = torch.where(exists, pairs.kind[:, None], OUTSIDE).flatten(2).flatten(0, 1)
    mask_ids = torch.where(exists, pairs.mask_ids[:, None], -1).flatten(2).flatten(0, 1)

    counts = (kind != OUTSIDE).sum(1)
    order = kind.argsort(dim=1, stable=True)[:, : int(counts.max())]
    return TileLists(
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        counts=counts,
        inside=(kind == INSIDE).sum(1),
        key_tiles=key_tiles.gather(1, order),
        mask_ids=mask_ids.gather(1, order),
        masks=pairs.masks,
    )


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One axis of the grid: the key tiles in reach of every query tile, candidates `[query tiles, width]`."""

    key: Tensor  # index of the key tile on this axis
    exists: Tensor  # False where a query tile has fewer candidates than the widest one
    nearest: Tensor  # distance of the nearest pair of tokens
    farthest: Tensor  # distance of the farthest pair
    shape: Tensor  # [..., 3]: key start - query start, query length, key length


def circle_lists(
    grid: Grid,
    radius: float,
    frame_radius: int | None = None,
    *,
    query_tile: tuple[int, int],
    key_tile: tuple[int, int],
) -> TileLists:
    """Lists of the window `dy**2 + dx**2 < radius**2` (CLEAR, arXiv:2412.16112), in the frames near the query's.

    Args:
        grid: (height, width) or (frames, height, width) in tokens.
        radius: In tokens, strict, > 0.
        frame_radius: In frames, strict, >= 1; None: all frames.
        query_tile: (rows, columns) of a query tile; key_tile: of a key tile.
    """
    frames, height, width = sizes_of(grid)
    limit = min(Circle(radius=radius).squared_limit, height**2 + width**2)
    rows = _axis(height, query_tile[0], key_tile[0], limit)
    columns = _axis(width, query_tile[1], key_tile[1], limit)

    nearest, farthest = (
        torch.add(*_outer(a**2, b**2)) for a, b in ((rows.nearest, columns.nearest), (rows.farthest, columns.farthest))
    )
    touched = torch.logical_and(*_outer(rows.exists, columns.exists)) & (nearest < limit)
    shapes = torch.cat(_outer(rows.shape, columns.shape), dim=-1)  # [query tiles, candidates, 6]
    whole = (shapes[..., 2] == key_tile[0]) & (shapes[..., 5] == key_tile[1])
    distinct, ids = torch.unique(shapes[touched], dim=0, return_inverse=True)
    key_rows, key_columns = _outer(rows.key, columns.key)
    pairs = _Pairs(
        key_tiles=key_rows * -(-width // key_tile[1]) + key_columns,
        kind=torch.where(touched, torch.where(whole & (farthest < limit), INSIDE, BORDER), OUTSIDE),
        mask_ids=torch.full(touched.shape, -1).masked_scatter(touched, ids),
        masks=_circle_masks(distinct, query_tile, key_tile, limit),
    )
    query_tokens, key_tokens = (
        _tile_tokens(frames, height, width, _cut(height, tile[0])[0], _cut(width, tile[1])[0])
        for tile in (query_tile, key_tile)
    )
    return _repeat_in_frames(pairs, query_tokens, key_tokens, frames, frame_radius)


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


@dataclass(frozen=True, kw_only=True)
class _BoxAxis:
    """One axis of the grid under a box: each query tile with its candidates among the key tiles."""

    query_places: Tensor  # [query tiles, query tile]
    key_places: Tensor  # [key tiles, key tile]
    key: Tensor  # [query tiles, candidates]
    touched: Tensor  # [query tiles, candidates] some pairs attend
    inside: Tensor  # [query tiles, candidates] all pairs attend
    mask_ids: Tensor  # [query tiles, candidates]
    masks: Tensor  # [distinct masks, query tile, key tile]


def box_lists(
    grid: Grid,
    box: Box,
    *,
    query_tile: tuple[int, int],
    key_tile: tuple[int, int],
    step: tuple[int, int] = (1, 1),
) -> TileLists:
    """Lists of a box, built for each axis by itself: a mask is a product of two.

    Args:
        grid: (height, width) or (frames, height, width) in tokens.
        query_tile: (rows, columns) of a query tile; key_tile: of a key tile.
        step: Distance of neighbours in a tile, per axis. 1: tiles are rectangles of the image. The box's dilation:
            tiles hold tokens that see each other.
    """
    frames, height, width = sizes_of(grid)
    rows, columns = (
        _box_axis(box.span(axis, size), query_tile[axis], key_tile[axis], step[axis])
        for axis, size in enumerate((height, width))
    )
    touched = torch.logical_and(*_outer(rows.touched, columns.touched))
    inside = torch.logical_and(*_outer(rows.inside, columns.inside))
    key_rows, key_columns = _outer(rows.key, columns.key)
    row_masks, column_masks = _outer(rows.mask_ids, columns.mask_ids)
    distinct, ids = torch.unique((row_masks * len(columns.masks) + column_masks)[touched], return_inverse=True)
    by_row, by_column = rows.masks[distinct // len(columns.masks)], columns.masks[distinct % len(columns.masks)]
    pairs = _Pairs(
        key_tiles=key_rows * len(columns.key_places) + key_columns,
        kind=torch.where(touched, torch.where(inside, INSIDE, BORDER), OUTSIDE),
        mask_ids=torch.full(touched.shape, -1).masked_scatter(touched, ids),
        masks=(by_row[:, :, None, :, None] & by_column[:, None, :, None, :]).flatten(3).flatten(1, 2),
    )
    query_tokens = _tile_tokens(frames, height, width, rows.query_places, columns.query_places)
    key_tokens = _tile_tokens(frames, height, width, rows.key_places, columns.key_places)
    return _repeat_in_frames(pairs, query_tokens, key_tokens, frames, box.frame_radius)


def _box_axis(span: Span, query_tile: int, key_tile: int, step: int) -> _BoxAxis:
    size = len(span.first)
    (queries, query_exists), (keys, key_exists) = _cut(size, query_tile, step), _cut(size, key_tile, step)
    tile_of = torch.empty(size, dtype=torch.int64)
    tile_of[keys] = torch.arange(len(keys))[:, None].expand_as(keys)
    first, last = span.first[queries], span.last[queries]  # [query tiles, query tile]
    first_tile, last_tile = tile_of[first].amin(1, keepdim=True), tile_of[last].amax(1, keepdim=True)
    key = first_tile + torch.arange(int((last_tile - first_tile).max()) + 1)
    exists = key <= last_tile
    key = key.minimum(last_tile)

    first, last, place = first[:, None, :, None], last[:, None, :, None], keys[key][:, :, None]
    seen = (first <= place) & (place <= last) & ((place - first) % span.step == 0)
    seen &= exists[..., None, None] & key_exists[key][:, :, None] & query_exists[:, None, :, None]
    masks, ids = torch.unique(seen.flatten(0, 1), dim=0, return_inverse=True)
    return _BoxAxis(
        query_places=queries,
        key_places=keys,
        key=key,
        touched=seen.flatten(2).any(2),
        inside=(seen | ~query_exists[:, None, :, None]).flatten(2).all(2),
        mask_ids=ids.view(key.shape),
        masks=masks,
    )


def _cut(size: int, tile: int, step: int = 1) -> tuple[Tensor, Tensor]:
    """Places of the tiles of an axis, `step` apart within a tile, and whether they exist: [tiles, tile] each.

    A slot beyond the end repeats the last place of its tile.
    """
    places, exists = [], []
    for residue in range(min(step, size)):
        count = len(range(residue, size, step))
        slot = torch.arange(0, count, tile)[:, None] + torch.arange(tile)
        places.append(residue + step * slot.clamp(max=count - 1))
        exists.append(slot < count)
    return torch.cat(places), torch.cat(exists)


def _outer(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """[row tiles, a, ...], [column tiles, b, ...] -> both as [row tiles * column tiles, a * b, ...]."""
    shape = (rows.shape[0], columns.shape[0], rows.shape[1], columns.shape[1], *rows.shape[2:])
    pair = rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)
    return pair[0].flatten(2, 3).flatten(0, 1), pair[1].flatten(2, 3).flatten(0, 1)


def _tile_tokens(frames: int, height: int, width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Tokens of every tile, [tiles, BLOCK], tiles row-major within a frame, from the places along each axis."""
    tokens = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return (tokens + height * width * torch.arange(frames)[:, None, None]).flatten(0, 1)
