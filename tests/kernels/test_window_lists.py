"""Tile lists of a window hold exactly the pairs of image tokens that attend, for any tiles."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from window_case import any_boxes, pairs_by_hand

from lineardit.kernels.focus.rest_of_cells import rest_of_cells
from lineardit.kernels.focus.tables import focus_tables
from lineardit.kernels.window import Box, Circle
from lineardit.kernels.window.lists import TileLists, box_lists, circle_lists, window_lists
from lineardit.kernels.window.reference import window_mask
from lineardit.kernels.window.tiled import tile_groups, tile_shape, window_groups

CPU = torch.device("cpu")


def listed_pairs(lists: TileLists, tokens: int) -> Tensor:
    """How often the lists hold each pair, [tokens, tokens]."""
    pairs = torch.zeros(tokens, tokens, dtype=torch.int)
    for tile, count in enumerate(lists.counts.tolist()):
        for key_tile, mask_id in zip(lists.key_tiles[tile, :count], lists.mask_ids[tile, :count], strict=True):
            query, key = lists.masks[mask_id].nonzero().unbind(1)
            index = (lists.query_tokens[tile, query], lists.key_tokens[key_tile, key])
            pairs.index_put_(index, torch.ones((), dtype=torch.int), accumulate=True)
    return pairs


sizes = st.integers(1, 11)
grids = st.tuples(st.integers(1, 4), sizes, sizes)
circles = st.builds(Circle, radius=st.floats(0.1, 14), frame_radius=st.none() | st.integers(1, 5))
tiles = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=30)
@given(grid=grids, window=circles | any_boxes, query_tile=tiles, key_tile=tiles, by_class=st.booleans())
def test_lists_hold_each_pair_once_with_unmasked_tiles_first(grid, window, query_tile, key_tile, by_class):
    if by_class and isinstance(window, Box):
        lists = box_lists(grid, window, query_tile=query_tile, key_tile=key_tile, step=window.dilation)
    else:
        lists = window_lists(grid, window, query_tile=query_tile, key_tile=key_tile)
    assert torch.equal(listed_pairs(lists, math.prod(grid)), window_mask(grid, window, 0, True, CPU).int())
    for tile, count in enumerate(lists.counts.tolist()):
        masks = lists.masks[lists.mask_ids[tile, :count]]
        full = masks[:, masks.any(2).any(0)].flatten(1).all(1).tolist()
        # at the border of the grid, a circle's whole tile may be read with a mask
        assert all(inside >= (entry < lists.inside[tile]) for entry, inside in enumerate(full))
        assert isinstance(window, Circle) or sum(full) == lists.inside[tile]
        assert (lists.mask_ids[tile, count:] == -1).all()


def test_circle_lists_read_tiles_inside_without_a_mask():
    lists = circle_lists((20, 23), 9, query_tile=(4, 4), key_tile=(3, 2))
    assert lists.inside.max() > 0
    for tile, count in enumerate(lists.counts.tolist()):
        masks = lists.masks[lists.mask_ids[tile, :count]]
        full = masks[:, masks.any(2).any(0)].flatten(1).all(1)
        assert full.tolist() == [entry < lists.inside[tile] for entry in range(count)]


@pytest.mark.parametrize("radius", [5**0.5, 5.000000001**0.5, 1, 1.0000001, 1e200])
def test_circle_lists_match_the_definition_at_the_border(radius):
    lists = circle_lists((5, 6), radius, query_tile=(5, 6), key_tile=(5, 6))
    assert torch.equal(listed_pairs(lists, 30), pairs_by_hand((5, 6), Circle(radius=radius)).int())


@pytest.mark.parametrize(("frame_radius", "frames_read"), [(1, [1, 1, 1, 1]), (2, [2, 3, 3, 2]), (9, [4, 4, 4, 4])])
def test_circle_lists_read_no_tile_of_a_frame_out_of_reach(frame_radius: int, frames_read: list[int]) -> None:
    tiling = {"query_tile": (4, 8), "key_tile": (4, 4)}
    image = circle_lists((11, 13), 3, **tiling)
    lists = circle_lists((4, 11, 13), 3, frame_radius, **tiling)
    times = torch.tensor(frames_read)[:, None]
    assert torch.equal(lists.counts.unflatten(0, (4, -1)), times * image.counts)
    assert torch.equal(lists.inside.unflatten(0, (4, -1)), times * image.inside)
    assert torch.equal((lists.mask_ids >= 0).sum(1), lists.counts)
    assert torch.equal(lists.masks, image.masks)


@settings(max_examples=20)
@given(grid=grids, window=circles, tile=tiles)
def test_tile_groups_hold_the_same_pairs_without_padding(grid, window, tile):
    groups = tile_groups(window_lists(grid, window, query_tile=tile, key_tile=tile), CPU)
    pairs = torch.zeros(math.prod(grid), math.prod(grid), dtype=torch.int)
    for group in groups:
        mask = torch.ones(group.queries.shape[1], group.keys.shape[1], dtype=torch.bool)
        mask = mask if group.mask is None else group.mask
        assert mask.any(0).all() and mask.any(1).all()
        for queries, keys in zip(group.queries, group.keys, strict=True):
            pairs[queries[:, None], keys] += mask.int()
    assert torch.equal(pairs, window_mask(grid, window, 0, True, CPU).int())
    every_query = torch.cat([group.queries.flatten() for group in groups])
    assert torch.equal(every_query.sort().values, torch.arange(math.prod(grid)))


def test_window_groups_of_whole_cells_need_no_mask() -> None:
    for cell in ((8, 8), (32, 24), (6, 5)):
        grid = (2, 6 * cell[0], 5 * cell[1])
        (group,) = window_groups(grid, Box(window=(3, 3), cell=cell), CPU)
        assert group.mask is None
        assert len(group.queries) * group.queries.shape[1] == math.prod(grid)
        assert group.keys.shape[1] % (cell[0] * cell[1]) == 0
    lists = window_lists((48, 64), Box(window=(3, 3), cell=(8, 16)), query_tile=(8, 16), key_tile=(8, 8))
    assert (lists.inside == 18).all() and (lists.counts == 18).all()


def test_window_groups_of_a_dilated_box_gather_only_its_residue_class() -> None:
    for group in window_groups((45, 50), Box(window=(5, 5), dilation=(4, 3)), CPU):
        rows, columns = group.queries // 50, group.queries % 50
        key_rows, key_columns = group.keys // 50, group.keys % 50
        assert (rows % 4 == key_rows[:, :1] % 4).all() and (key_rows % 4 == key_rows[:, :1] % 4).all()
        assert (columns % 3 == key_columns[:, :1] % 3).all() and (key_columns % 3 == key_columns[:, :1] % 3).all()
        assert group.keys.shape[1] <= 12 * 12


@pytest.mark.parametrize("grid", [(1, 1), (1, 1000), (1000, 1), (7, 5), (3, 400), (37, 29), (512, 511)])
@pytest.mark.parametrize("radius", [0.5, 4, 8, 32])
def test_tile_shape_cuts_evenly_into_bounded_tiles(grid, radius):
    rows, columns = tile_shape(*grid, radius)
    assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1]
    assert rows * columns <= 256
    # No row or column of tiles is superfluous.
    for size, side in zip(grid, (rows, columns), strict=True):
        assert -(-size // side) * side - size < -(-size // side)


# On a grid of 36 x 222 two tokens are sqrt(50066) apart, and `radius**2` rounds to another number than radius * radius.
@pytest.mark.parametrize("radius", [50066**0.5, 50065.5**0.5, 9, 5**0.5, 1e-200])
def test_circle_border_is_the_same_in_every_implementation(radius):
    grid = height, width = 36, 222
    window = Circle(radius=radius)
    steps = ((dy, dx) for dy in range(1 - height, height) for dx in range(1 - width, width))
    offsets = [(dy, dx) for dy, dx in steps if dy * dy + dx * dx < radius * radius] or [(0, 0)]
    pairs = sum((height - abs(dy)) * (width - abs(dx)) for dy, dx in offsets)
    assert window.num_pairs(height, width) == pairs
    assert window.covers(height, width) == (pairs == (height * width) ** 2)

    lists = circle_lists(grid, radius, query_tile=(8, 16), key_tile=(8, 16))
    listed = torch.arange(lists.key_tiles.shape[1]) < lists.counts[:, None]
    assert lists.masks.sum((1, 2))[lists.mask_ids[listed]].sum() == pairs

    tables = focus_tables(grid, window, 1, 4, torch.float32, CPU, torch.float32)
    axes = (axis.flatten().unique(return_counts=True) for axis in tables.distances[1:])
    (rows, row_counts), (columns, column_counts) = axes
    assert (row_counts[:, None] * column_counts)[rows[:, None] + columns < tables.limit].sum() == pairs
    assert (height * width) ** 2 - rest_of_cells(grid, window, 1, CPU).everywhere().double().sum() == pairs


@given(radius=st.floats(1e-3, 1e9))
def test_squared_limit_matches_the_definition_for_integers(radius):
    limit = Circle(radius=radius).squared_limit
    assert limit - 1 < radius * radius <= limit


@settings(max_examples=15)
@given(grid=st.tuples(sizes, sizes), box=any_boxes.filter(lambda box: box.frame_radius is None))
def test_box_span_and_covers_match_the_mask(grid, box):
    pairs = window_mask(grid, box, 0, True, CPU)
    assert box.span(0, grid[0]).num_pairs() * box.span(1, grid[1]).num_pairs() == pairs.sum()
    assert box.covers(*grid) == pairs.all()


@pytest.mark.parametrize("grid", [(5, 7), (8, 5), (12, 6)], ids=str)
def test_boxes_give_every_query_equally_many_keys(grid: tuple[int, int]) -> None:
    assert (window_mask(grid, Box(window=(5, 3)), 0, True, CPU).sum(1) == 15).all()


@pytest.mark.parametrize(
    ("settings_of", "message"),
    [
        ({"window": (4, 3)}, r"window must be odd along both axes, got \(4, 3\)"),
        ({"window": 3}, "window must be .along the height, along the width., integers >= 1, got 3"),
        ({"window": (3, 3, 3)}, "window must be .along the height"),
        ({"window": (3, 3.0)}, "window must be .along the height"),
        ({"window": (3, 3), "dilation": (0, 1)}, r"dilation must be .*, got \(0, 1\)"),
        ({"window": (3, 3), "cell": (True, 1)}, r"cell must be .*, got \(True, 1\)"),
        ({"window": (3, 3), "frame_radius": 0}, "frame_radius must be an integer >= 1 or None, got 0"),
    ],
)
def test_box_refuses_invalid_settings(settings_of: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Box(**settings_of)
