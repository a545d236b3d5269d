"""The lists of a window name every pair of image tokens that attend, and no other, whatever the tiles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineardit.kernels.focus.rest_of_cells import rest_of_cells
from lineardit.kernels.focus.tables import focus_tables
from lineardit.kernels.window import Circle
from lineardit.kernels.window.lists import TileLists, circle_lists
from lineardit.kernels.window.tiled import tile_groups, tile_shape


def near_pairs(grid: tuple[int, ...], radius: float) -> Tensor:
    """[tokens, tokens] bool by the definition."""
    frames, height, width = (1, *grid)[-3:]
    tokens = [divmod(index, width) for index in range(height * width)] * frames
    return torch.tensor([[(row - y) ** 2 + (col - x) ** 2 < radius * radius for y, x in tokens] for row, col in tokens])


def listed_pairs(lists: TileLists, tokens: int) -> Tensor:
    """How often the lists name every pair, [tokens, tokens]."""
    pairs = torch.zeros(tokens, tokens, dtype=torch.int)
    for tile, count in enumerate(lists.counts.tolist()):
        for key_tile, mask_id in zip(lists.key_tiles[tile, :count], lists.mask_ids[tile, :count], strict=True):
            query, key = lists.masks[mask_id].nonzero().unbind(1)
            index = (lists.query_tokens[tile, query], lists.key_tokens[key_tile, key])
            pairs.index_put_(index, torch.ones((), dtype=torch.int), accumulate=True)
    return pairs


sizes = st.integers(1, 11)
tiles = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=15)
@given(grid=st.tuples(sizes, sizes), radius=st.floats(0.1, 14), query_tile=tiles, key_tile=tiles)
def test_circle_lists_name_each_pair_of_the_window_once(grid, radius, query_tile, key_tile):
    lists = circle_lists(grid, radius, query_tile=query_tile, key_tile=key_tile)
    assert torch.equal(listed_pairs(lists, grid[0] * grid[1]), near_pairs(grid, radius).int())


def test_circle_lists_reach_all_frames():
    grid = (3, 4, 7)
    lists = circle_lists(grid, 2.5, query_tile=(3, 4), key_tile=(2, 3))
    assert torch.equal(listed_pairs(lists, 84), near_pairs(grid, 2.5).int())


def test_circle_lists_have_the_unmasked_tiles_first():
    lists = circle_lists((20, 23), 9, query_tile=(4, 4), key_tile=(3, 2))
    assert lists.inside.max() > 0
    for tile, count in enumerate(lists.counts.tolist()):
        masks = lists.masks[lists.mask_ids[tile, :count]]
        whole = masks[:, masks.any(2).any(0)].flatten(1).all(1)
        assert whole.tolist() == [entry < lists.inside[tile] for entry in range(count)]
        assert (lists.mask_ids[tile, count:] == -1).all()


@pytest.mark.parametrize("radius", [5**0.5, 5.000000001**0.5, 1, 1.0000001, 1e200])
def test_circle_lists_decide_the_border_as_the_definition(radius):
    lists = circle_lists((5, 6), radius, query_tile=(5, 6), key_tile=(5, 6))
    assert torch.equal(listed_pairs(lists, 30), near_pairs((5, 6), radius).int())


@settings(max_examples=15)
@given(grid=st.tuples(st.integers(1, 2), sizes, sizes), radius=st.floats(0.1, 14), tile=tiles)
def test_tile_groups_hold_the_same_pairs_without_padding(grid, radius, tile):
    lists = circle_lists(grid, radius, query_tile=tile, key_tile=tile)
    tokens = grid[0] * grid[1] * grid[2]
    pairs = torch.zeros(tokens, tokens, dtype=torch.bool)
    groups = tile_groups(lists, torch.device("cpu"))
    for group in groups:
        mask = torch.ones(group.queries.shape[1], group.keys.shape[1], dtype=torch.bool)
        mask = mask if group.mask is None else group.mask
        assert mask.any(0).all() and mask.any(1).all()
        for queries, keys in zip(group.queries, group.keys, strict=True):
            pairs[queries[:, None], keys] |= mask
    assert torch.equal(pairs, near_pairs(grid, radius))
    every_query = torch.cat([group.queries.flatten() for group in groups])
    assert torch.equal(every_query.sort().values, torch.arange(tokens))


@pytest.mark.parametrize("grid", [(1, 1), (1, 1000), (1000, 1), (7, 5), (3, 400), (37, 29), (512, 511)])
@pytest.mark.parametrize("radius", [0.5, 4, 8, 32])
def test_tile_shape_cuts_evenly_into_bounded_tiles(grid, radius):
    rows, columns = tile_shape(*grid, radius)
    assert 1 <= rows <= grid[0] and 1 <= columns <= grid[1]
    assert rows * columns <= 256
    # No row or column of tiles could be left out.
    for size, side in zip(grid, (rows, columns), strict=True):
        assert -(-size // side) * side - size < -(-size // side)


# On a grid of 36 x 222 two tokens are sqrt(50066) apart, and `radius**2` rounds to another number than radius * radius.
@pytest.mark.parametrize("radius", [50066**0.5, 50065.5**0.5, 9, 5**0.5, 1e-200])
def test_circles_have_one_border_everywhere(radius):
    grid = height, width = 36, 222
    window, cpu = Circle(radius=radius), torch.device("cpu")
    steps = ((dy, dx) for dy in range(1 - height, height) for dx in range(1 - width, width))
    near = [(dy, dx) for dy, dx in steps if dy * dy + dx * dx < radius * radius] or [(0, 0)]
    pairs = sum((height - abs(dy)) * (width - abs(dx)) for dy, dx in near)
    assert window.num_pairs(height, width) == pairs
    assert window.covers(height, width) == (pairs == (height * width) ** 2)

    lists = circle_lists(grid, radius, query_tile=(8, 16), key_tile=(8, 16))
    listed = torch.arange(lists.key_tiles.shape[1]) < lists.counts[:, None]
    assert lists.masks.sum((1, 2))[lists.mask_ids[listed]].sum() == pairs

    tables = focus_tables(grid, window, 1, 4, torch.float32, cpu, torch.float32)
    axes = (axis.flatten().unique(return_counts=True) for axis in tables.distances[1:])
    (rows, of_row), (columns, of_column) = axes
    assert (of_row[:, None] * of_column)[rows[:, None] + columns < tables.limit].sum() == pairs
    assert (height * width) ** 2 - rest_of_cells(grid, window, 1, cpu).everywhere().double().sum() == pairs


@given(radius=st.floats(1e-3, 1e9))
def test_squared_limit_is_the_definition_for_integers(radius):
    limit = Circle(radius=radius).squared_limit
    assert limit - 1 < radius * radius <= limit
