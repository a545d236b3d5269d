"""Pooled cells of a grid, and `Clear` with them, against the definition, forward and backward."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from window_case import pairs_by_hand

from impls import PORTABLE
from lineardit.linearize import Clear, LayoutError
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods.clear import ClearAttention
from lineardit.linearize.methods.pooling import cell_side, cell_sums, count_cells, mean_pool, weighted_pool

GRIDS = [(5, 7), (6, 4), (1, 5), (3, 2), (3, 3, 5)]


def pooled_by_hand(tokens: Tensor, weight: Tensor, grid: tuple[int, ...]) -> Tensor:
    """The definition, cell by cell in each frame."""
    frames, height, width = (1, *grid)[-3:]
    side = len(weight)
    cells = []
    for frame, top, left in itertools.product(range(frames), range(0, height, side), range(0, width, side)):
        rows, cols = range(top, min(top + side, height)), range(left, min(left + side, width))
        held = [(frame * height + row) * width + col for row, col in itertools.product(rows, cols)]
        weights = weight[: len(rows), : len(cols)].flatten()
        cells.append((tokens[:, :, held] * weights[:, None]).sum(2) * weight.sum() / weights.sum())
    return torch.stack(cells, dim=2)


@pytest.mark.parametrize(
    ("grid", "pool_tokens", "side"),
    [
        ((64, 64), 1024, 2),
        ((64, 64), 1023, 3),
        ((128, 64), 1024, 3),
        ((512, 512), 1024, 16),
        ((5, 7), 1, 7),
        ((1, 1), 9, 2),
        ((3, 8, 8), 48, 2),
        ((3, 8, 8), 47, 3),
        ((3, 5, 7), 3, 7),
        ((4, 64, 64), 4096, 2),
        ((1, 5, 7), 12, 2),
    ],
)
def test_cell_side_is_the_smallest_within_pool_tokens(grid: tuple[int, ...], pool_tokens: int, side: int) -> None:
    assert cell_side(grid, pool_tokens) == side


def test_cell_side_refuses_more_frames_than_cells() -> None:
    with pytest.raises(LayoutError, match=r"got 2 for 3: raise pool_tokens, or pool by pool_size"):
        ClearAttention(Clear(radius=2, pool_tokens=2), num_heads=1, head_dim=4).prepare_for((3, 3, 5))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [2, 3, 4])
def test_pools_match_the_definition(grid: tuple[int, ...], side: int) -> None:
    tokens = torch.randn(2, 3, math.prod(grid), 4, dtype=torch.float64)
    weight = torch.randn(side, side, dtype=torch.float64)
    (out,) = weighted_pool([tokens], weight, grid, count_cells(grid, side))
    assert torch.allclose(out, pooled_by_hand(tokens, weight, grid))
    (mean,) = mean_pool([tokens], side, grid, count_cells(grid, side))
    assert torch.allclose(mean, pooled_by_hand(tokens, torch.full_like(weight, 1 / side**2), grid))


def test_weighted_pool_of_full_cells_accepts_weights_that_sum_to_zero() -> None:
    weight = torch.tensor([[1.0, -1.0], [2.0, -2.0]], requires_grad=True)
    tokens = torch.randn(1, 1, 24, 2)
    (out,) = weighted_pool([tokens], weight, (4, 6), 6)
    assert out.isfinite().all()
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("grid", [(5, 7), (4, 4), (2, 3, 5)])
def test_pooling_passes_gradcheck(grid: tuple[int, ...]) -> None:
    tokens = torch.randn(2, 1, math.prod(grid), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: weighted_pool([x], w, grid, count_cells(grid, 3)), (tokens, weight))
    torch.autograd.gradcheck(lambda x: mean_pool([x], 3, grid, count_cells(grid, 3)), (tokens,))


def test_cell_sums_passes_opcheck() -> None:
    tokens, weight = torch.randn(1, 2, 35, 4, requires_grad=True), torch.rand(2, 2, requires_grad=True)
    torch.library.opcheck(cell_sums, (tokens, weight, 5, 7, 12))


@pytest.mark.parametrize("impl", [*PORTABLE, "auto"])
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize(
    ("config", "grid"),
    [
        (Clear(radius=2.3, pool_size=2), (5, 7)),
        (Clear(radius=2.3, pool_tokens=5), (5, 7)),
        (Clear(radius=1.5, pool_size=2, frame_radius=1), (3, 3, 5)),
        (Clear(radius=1.5, pool_tokens=9), (3, 3, 5)),
    ],
    ids=str,
)
def test_clear_with_pooled_cells_matches_the_definition(
    config: Clear, grid: tuple[int, ...], text_first: bool, impl: str
) -> None:
    text_len, num_image = 3, math.prod(grid)
    kernel = ClearAttention(config, num_heads=2, head_dim=4).double()
    kernel.impl = impl
    kernel.prepare_for(grid)
    side = config.pool_size or cell_side(grid, config.pool_tokens or 1)
    weight = torch.ones(side, side, dtype=torch.float64) / side**2
    if config.pool_size is not None:
        weight = torch.nn.init.uniform_(kernel.pool_weight)
    query, key, value = torch.randn(3, 2, 2, text_len + num_image, 4, dtype=torch.float64)
    text_mask = torch.tensor([[True, True, False], [True, True, True]])
    out = kernel(query, key, value, Layout(grid, text_len, text_first, text_mask), scale=0.7)

    image = slice(text_len, None) if text_first else slice(0, num_image)
    text = slice(0, text_len) if text_first else slice(num_image, num_image + text_len)
    cells = [pooled_by_hand(part[:, :, image], weight, grid) for part in (key, value)]
    key, value = (torch.cat(both, 2) for both in zip((key, value), cells, strict=True))
    mask = torch.ones(2, 1, query.shape[2], key.shape[2], dtype=torch.bool)
    mask[:, :, image, : query.shape[2]][..., image] = pairs_by_hand(grid, config.shape)
    mask[:, :, :, text] &= text_mask[:, None, None]
    mask[:, :, text, query.shape[2] :] = False
    assert torch.allclose(out, scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.7))


@pytest.mark.parametrize("frame_radius", [1, 2, 9, None])
@pytest.mark.parametrize(("pools", "num_cells"), [({"pool_size": 2}, 18), ({"pool_tokens": 3}, 3)], ids=str)
def test_clear_with_pooled_cells_counts_them_in_pairs_and_never_covers(
    frame_radius: int | None, pools: dict[str, int], num_cells: int
) -> None:
    config, grid = Clear(radius=2.5, frame_radius=frame_radius, **pools), (3, 3, 5)
    pairs = ClearAttention.pairs(config, grid, 4, num_heads=1, head_dim=4)
    assert pairs == pairs_by_hand(grid, config.shape).sum() + 45 * (4 + num_cells) + 4 * (4 + 45)
    wide = Clear(radius=50, frame_radius=frame_radius, **pools)
    assert not ClearAttention(wide, num_heads=1, head_dim=4).is_exact(Layout(grid, 3, True))
