"""FlexAttention's masks without visiting every pair: equal to `create_block_mask`, in every order."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from benchmarks.gpu.bench import Shape
from benchmarks.gpu.competitors import pairs_attending
from benchmarks.gpu.flex_window import (
    TileOrder,
    analytic_block_mask,
    pairs_computed,
    row_major,
    row_major_mask_mod,
    tile_mask_mod,
)
from benchmarks.gpu.model_step import extrapolate
from lineardit.kernels.window.reference import window_mask
from lineardit.kernels.window.windows import Circle

CPU = torch.device("cpu")
ORDERS = {
    "tiles": TileOrder(grid=(32, 48), query_tile=(8, 16), key_tile=(8, 16)),
    "small-tiles": TileOrder(grid=(32, 48), query_tile=(8, 16), key_tile=(8, 8)),
    "rows": row_major((48, 32)),
    "parts-of-rows": row_major((4, 256)),
}


def assert_same(analytic: BlockMask, searched: BlockMask) -> None:
    """The blocks of every row and column, as sets: their order in a list is free."""
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, expected = (getattr(mask, f"{kind}_num_blocks") for mask in (analytic, searched))
        assert torch.equal(counts, expected), kind
        lists = [getattr(mask, f"{kind}_indices").flatten(0, 2) for mask in (analytic, searched)]
        for count, blocks, expected_blocks in zip(counts.flatten().tolist(), *lists, strict=True):
            assert sorted(blocks[:count].tolist()) == sorted(expected_blocks[:count].tolist()), kind
    assert analytic.shape == searched.shape and analytic.BLOCK_SIZE == searched.BLOCK_SIZE


@pytest.mark.parametrize("radius", [5, 16])
@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_analytic_block_mask_equals_the_searched_one(order: TileOrder, text_queries: bool, radius: int) -> None:
    text_len, image_len = 128, order.grid[0] * order.grid[1]
    mask_mod = tile_mask_mod(order, radius, text_len, text_queries=text_queries)
    analytic = analytic_block_mask(order, radius, text_len, mask_mod, CPU, text_queries=text_queries)
    queries = image_len + text_len * text_queries
    searched = create_block_mask(
        mask_mod, None, None, queries, text_len + image_len, device="cpu", BLOCK_SIZE=order.block_size
    )
    assert_same(analytic, searched)
    assert pairs_computed(analytic) <= queries * (text_len + image_len)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_place_is_a_permutation(order: TileOrder) -> None:
    row, column = order.row_and_column(torch.arange(order.grid[0] * order.grid[1]))
    tokens = row * order.grid[1] + column
    assert torch.equal(tokens.sort().values, torch.arange(len(tokens)))


@pytest.mark.parametrize("grid", [(16, 8), (48, 32), (2, 128), (3, 384)])
def test_row_major_is_the_order_of_the_picture(grid: tuple[int, int]) -> None:
    slots = torch.arange(grid[0] * grid[1])
    row, column = row_major(grid).row_and_column(slots)
    assert torch.equal(row * grid[1] + column, slots)


def test_row_major_mask_mod_is_the_window() -> None:
    height, width, text_len, radius = 6, 10, 4, 3
    tokens = torch.arange(text_len + height * width)
    mask_mod = row_major_mask_mod(width, radius, text_len)
    mask = mask_mod(tokens, tokens, tokens[:, None], tokens[None])
    assert torch.equal(mask, window_mask((height, width), Circle(radius=radius), text_len, True, CPU))


@pytest.mark.parametrize(("side", "radius", "text_len"), [(7, 3, 0), (12, 5, 4), (6, 16, 9)])
def test_pairs_attending_counts_the_mask(side: int, radius: int, text_len: int) -> None:
    shape = Shape(side=side, radius=radius, text_len=text_len, num_heads=1, head_dim=16)
    assert pairs_attending(shape) == window_mask((side, side), Circle(radius=radius), text_len, True, CPU).sum()


def test_extrapolated_steps_are_linear_in_the_blocks() -> None:
    before, unit = 0.25, 1.5
    one, two, nineteen = (before + count * unit for count in (1, 2, 19))
    assert extrapolate(one, two, 19) == pytest.approx(nineteen)
