"""Cells in focus: the formula and the choice written out over dense masks, exactness, counts, the operator."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from tolerance import assert_matches_reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lineardit.kernels.window import Box, Circle, Window
from lineardit.kernels.window.reference import window_mask
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import METHODS, Clear, Hybrid, Neighborhood, ProxyTokens, SlidingTile
from lineardit.linearize.methods import focus as focus_module
from lineardit.linearize.methods.agent_tokens import agent_grid, cells_of_axis, pool_agents
from lineardit.linearize.methods.focus import cells_in_focus, focus_attention, focus_op, focus_pairs

SCALE = 0.6
CPU = torch.device("cpu")
WINDOWS = [
    Circle(radius=2.5),
    Circle(radius=math.sqrt(5)),
    Box(window=(3, 5)),
    Box(window=(3, 3), dilation=(2, 1)),
    Box(window=(1, 3), cell=(2, 3)),
]
# grid, cells, tokens in focus, side of the tiles: sides that divide, that do not, cells that overlap, narrow pictures
SHAPES = [((8, 8), 16, 16, 4), ((7, 10), 6, 25, 3), ((5, 6), 8, 12, 2), ((1, 30), 6, 10, 4), ((9, 7), 63, 9, 5)]


def inputs_of(grid: tuple[int, ...], num_cells: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key and value [2, 2, n, 8], a proxy's key and value [2, 2, C, 8]."""
    query, key, value = (torch.randn(2, 2, math.prod(grid), 8).to(dtype) for _ in range(3))
    return [query, key, value, *(pool_agents(x, *grid[-2:], num_cells).to(dtype) for x in (key, value))]


def holds(grid: tuple[int, ...], num_cells: int) -> Tensor:
    """[n, C] of 0 and 1: the cell holds the token."""
    sizes = (1, *grid)[-3:]
    axes = [cells_of_axis(size, count) for size, count in zip(sizes, agent_grid(*sizes, num_cells), strict=True)]
    held = torch.zeros(math.prod(grid), num_cells, dtype=torch.float64)
    for index, ranges in enumerate(product(*axes)):
        for frame, row, column in product(*(range(start, start + length) for start, length in ranges)):
            held[(frame * sizes[1] + row) * sizes[2] + column, index] = 1
    return held


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    grid: tuple[int, ...],
    window: Window,
    num_tokens: int,
    side: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """far [B, H, n, D], lse [B, H, n], and whether a query's tile chose a cell [B, H, n, C]; dense masks."""
    _, height, width = (1, *grid)[-3:]
    num_cells = proxy_key.shape[2]
    held = holds(grid, num_cells).to(query)
    counts = held / held.sum(1, keepdim=True)  # 1 / m of each token in each cell
    outside = (~window_mask(grid, window, 0, True, CPU)).to(query)
    rest = outside @ counts * num_cells / math.prod(grid)
    place = torch.arange(math.prod(grid))
    frame, row, column = place // (height * width), place // width % height, place % width
    tile = (frame * height + row // side) * width + column // side
    of_tile = (tile[:, None] == tile).to(query)
    of_tile /= of_tile.sum(1, keepdim=True)
    wanted = SCALE * (of_tile @ query) @ proxy_key.mT + (of_tile @ rest).log().clamp(min=-1e4)
    best = wanted.topk(cells_in_focus(num_tokens, num_cells, grid), -1).indices
    chosen = torch.zeros_like(wanted).scatter(-1, best, 1)
    of_proxies = (SCALE * query @ proxy_key.mT).exp() * rest * (1 - chosen)
    of_tokens = (SCALE * query @ key.mT).exp() * outside * (chosen @ counts.T) * num_cells / math.prod(grid)
    mass = of_proxies.sum(-1) + of_tokens.sum(-1)
    return (of_proxies @ proxy_value + of_tokens @ value) / mass[..., None], mass.log(), chosen


@pytest.mark.parametrize("chunk_bytes", [1, 2**25], ids=["tile-by-tile", "at-once"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("grid", "num_cells", "num_tokens", "side"), SHAPES)
def test_focus_is_the_formula(
    grid: tuple[int, int],
    num_cells: int,
    num_tokens: int,
    side: int,
    window: Window,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(focus_module.CHUNK_BYTES, "cpu", chunk_bytes)
    inputs = [x.requires_grad_() for x in inputs_of(grid, num_cells)]
    shape = {"grid": grid, "window": window, "num_tokens": num_tokens, "side": side}
    out, lse = focus_attention(*inputs, **shape, scale=SCALE)
    expected, expected_lse, chosen = by_hand(*inputs, **shape)
    assert 0 < chosen.mean() < 1
    seen = expected_lse > -20  # elsewhere the window leaves nothing
    assert seen.any(-1).all()
    assert torch.allclose(out[seen], expected[seen], atol=1e-6)
    assert torch.allclose(lse[seen], expected_lse[seen], atol=1e-6)
    weights = torch.randn_like(out) * seen[..., None], torch.randn_like(lse) * seen
    sums = [
        sum((x[seen] * w[seen]).sum() for x, w in zip(both, weights, strict=True))
        for both in ((out, lse), (expected, expected_lse))
    ]
    for grad, right in zip(*(torch.autograd.grad(total, inputs) for total in sums), strict=True):
        assert torch.allclose(grad, right, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focus_matches_the_formula_in_low_precision(dtype: torch.dtype) -> None:
    """One tile of queries that chooses clearly, so that rounding changes no choice."""
    grid, window = (8, 8), Circle(radius=2)
    query, key, value, *_ = inputs_of(grid, 4, torch.float32)
    key[:, :, :4] += 8 * query.mean(2, keepdim=True)
    inputs = [x.to(dtype) for x in (query, key, value)]
    inputs += [pool_agents(x, *grid, 4).to(dtype) for x in inputs[1:]]
    shape = {"grid": grid, "window": window, "num_tokens": 16, "side": 8}
    assert_matches_reference(
        lambda *x: focus_attention(*x, **shape, scale=SCALE)[0], lambda *x: by_hand(*x, **shape)[0], inputs, dtype
    )


@pytest.mark.parametrize("local", [Clear(radius=2), Neighborhood(window=3), SlidingTile(tile=2, window=1)], ids=str)
@pytest.mark.parametrize("grid", [(5, 6), (7, 10), (3, 4, 5)])
def test_with_all_cells_in_focus_a_hybrid_is_softmax_over_everything(grid: tuple[int, ...], local: Any) -> None:
    """With gradients, and text that is masked in part."""
    num_image, text_len = math.prod(grid), 3
    config = Hybrid(local=local, global_=ProxyTokens(num_proxies=6), gate=1.0, focus_tokens=num_image)
    kernel = METHODS[Hybrid](config, num_heads=2, head_dim=8).double()
    kernel.observe(grid)
    inputs = [torch.randn(2, 2, text_len + num_image, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True, False, True], [True] * 3])
    out = kernel(*inputs, Layout(grid, text_len, True, mask), scale=SCALE)
    keys = torch.cat([mask, mask.new_ones(2, num_image)], 1)[:, None, None]
    expected = scaled_dot_product_attention(*inputs, attn_mask=keys, scale=SCALE)
    assert torch.allclose(out, expected, atol=1e-10)
    grad_out = torch.randn_like(out)
    for grad, right in zip(*(torch.autograd.grad(x, inputs, grad_out) for x in (out, expected)), strict=True):
        assert torch.allclose(grad, right, atol=1e-10)


def test_a_far_token_that_outweighs_all_others_is_found() -> None:
    """One far key in 1,024 that a tile's queries want: the mean of its cell hides it, yet its cell is chosen."""
    grid, errors = (32, 32), {}
    tile = (torch.arange(4)[:, None] * 32 + torch.arange(4)).flatten()
    query, key, value = (torch.randn(1, 2, 1024, 16, dtype=torch.float64) for _ in range(3))
    wanted = torch.nn.functional.normalize(torch.randn(16, dtype=torch.float64), dim=0)
    query[:, :, tile] += 6 * wanted
    key[:, :, 900] += 6 * wanted
    expected = scaled_dot_product_attention(query, key, value)
    for focus_tokens in (0, 64):
        config = Hybrid(
            local=Clear(radius=4), global_=ProxyTokens(num_proxies=256), gate=1.0, focus_tokens=focus_tokens
        )
        kernel = METHODS[Hybrid](config, num_heads=2, head_dim=16).double()
        out = kernel(query, key, value, Layout(grid, 0, True, None))
        errors[focus_tokens] = ((out - expected)[:, :, tile].norm() / expected[:, :, tile].norm()).item()
    assert errors[0] > 0.8
    assert errors[64] < 0.3


def test_focus_ends_where_one_cell_holds_more_tokens() -> None:
    assert [cells_in_focus(64, 16, (side, side)) for side in (4, 8, 16, 32, 64)] == [16, 16, 4, 1, 0]
    config = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), gate=1.0, focus_tokens=9)
    plain = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), gate=1.0)
    for grid, differs in (((6, 6), True), ((8, 8), False)):
        inputs, layout = [torch.randn(1, 2, math.prod(grid), 8) for _ in range(3)], Layout(grid, 0, True, None)
        with_focus, without = (
            METHODS[Hybrid](one, num_heads=2, head_dim=8)(*inputs, layout) for one in (config, plain)
        )
        assert torch.equal(with_focus, without) is not differs


def test_focus_pairs_are_tokens_seen_and_cells_chosen_from() -> None:
    assert focus_pairs(16, 16, 4, (8, 8)) == 64 * 16 + 4 * 16
    assert focus_pairs(25, 6, 3, (7, 10)) == 70 * 24 + 3 * 4 * 6  # two cells of 70 / 6 tokens
    assert focus_pairs(16, 16, 4, (64, 64)) == 0
    few, many = (focus_pairs(4096, 256, 4, (side, side)) for side in (64, 256))
    assert many == 16 * few


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"focus_tokens": -1}, "focus_tokens must be an integer >= 0, got -1"),
        ({"focus_tokens": 2.5}, "focus_tokens must be an integer >= 0, got 2.5"),
        ({"focus_side": 0}, "focus_side must be an integer >= 1, got 0"),
        ({"focus_tokens": 9, "mass_cells": 3}, "focus_tokens must be 0 unless join is 'mass'"),
        ({"focus_tokens": 9, "join": "gate"}, "focus_tokens must be 0 unless join is 'mass'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), **settings)


@pytest.mark.parametrize("token_major", [False, True], ids=["head-major", "token-major"])
@pytest.mark.parametrize("box", [None, [3, 3, 1, 1, 1, 1]])
def test_focus_op_passes_opcheck(box: list[int] | None, token_major: bool) -> None:
    inputs = [x.float() for x in inputs_of((5, 6), 4)]
    if token_major:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(focus_op, (*inputs, (5, 6), 2, 2, SCALE, 2.0 if box is None else None, None, box))
