"""Cells in focus: formula and choice against dense masks, exactness, counts, the operator."""

import math
from typing import Any

import pytest
import torch
from focus_case import SCALE, SHAPES, WINDOWS, by_hand, clear_choice, inputs_of
from tolerance import assert_matches_reference
from torch.nn.functional import scaled_dot_product_attention

from lineardit.kernels.focus import plain, tables
from lineardit.kernels.focus.attention import cells_in_focus, focus_attention, focus_op, focus_pairs
from lineardit.kernels.window import Window
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import METHODS, Clear, Hybrid, Neighborhood, ProxyTokens, SlidingTile

ALL = [(*shape, window, 2**25) for shape in SHAPES for window in WINDOWS]
TILE_BY_TILE = [(*shape, window, 1) for shape, window in zip(SHAPES, WINDOWS, strict=True)]

SEVEN_AND_FIVE = (*SHAPES[1], WINDOWS[0], 2**18)  # tiles in its two chunks


@pytest.mark.parametrize(
    ("grid", "num_cells", "num_tokens", "side", "window", "chunk_bytes"), [*ALL, *TILE_BY_TILE, SEVEN_AND_FIVE], ids=str
)
def test_focus_matches_the_formula(
    grid: tuple[int, int],
    num_cells: int,
    num_tokens: int,
    side: int,
    window: Window,
    chunk_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(plain.CHUNK_BYTES, "cpu", chunk_bytes)
    inputs = [x.requires_grad_() for x in inputs_of(grid, num_cells)]
    shape = {"grid": grid, "window": window, "num_tokens": num_tokens, "side": side}
    out, lse = focus_attention(*inputs, **shape, scale=SCALE)
    expected, expected_lse, chosen = by_hand(*inputs, **shape)
    assert 0 < chosen.mean() < 1
    seen = expected_lse > -20  # elsewhere no token is outside the window
    assert seen.any(-1).all()
    assert torch.allclose(out[seen], expected[seen], atol=1e-6)
    assert torch.allclose(lse[seen], expected_lse[seen], atol=1e-6)
    weights = torch.randn_like(out) * seen[..., None], torch.randn_like(lse) * seen
    sums = [
        sum((x[seen] * w[seen]).sum() for x, w in zip(both, weights, strict=True))
        for both in ((out, lse), (expected, expected_lse))
    ]
    for grad, expected_grad in zip(*(torch.autograd.grad(total, inputs) for total in sums), strict=True):
        assert torch.allclose(grad, expected_grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focus_matches_the_formula_in_low_precision(dtype: torch.dtype) -> None:
    inputs, shape = clear_choice(dtype)
    assert_matches_reference(
        lambda *x: focus_attention(*x, **shape, scale=SCALE)[0], lambda *x: by_hand(*x, **shape)[0], inputs, dtype
    )


@pytest.mark.parametrize("local", [Clear(radius=2), Neighborhood(window=3), SlidingTile(tile=2, window=1)], ids=str)
@pytest.mark.parametrize("grid", [(5, 6), (7, 10), (3, 4, 5)])
def test_hybrid_with_all_cells_in_focus_matches_full_softmax(grid: tuple[int, ...], local: Any) -> None:
    """Includes gradients and partly masked text."""
    num_image, text_len = math.prod(grid), 3
    config = Hybrid(local=local, global_=ProxyTokens(num_proxies=6), gate=1.0, focus_tokens=num_image)
    kernel = METHODS[Hybrid](config, num_heads=2, head_dim=8).double()
    kernel.prepare_for(grid)
    inputs = [torch.randn(2, 2, text_len + num_image, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True, False, True], [True] * 3])
    out = kernel(*inputs, Layout(grid, text_len, True, mask), scale=SCALE)
    keys = torch.cat([mask, mask.new_ones(2, num_image)], 1)[:, None, None]
    expected = scaled_dot_product_attention(*inputs, attn_mask=keys, scale=SCALE)
    assert torch.allclose(out, expected, atol=1e-10)
    grad_out = torch.randn_like(out)
    for grad, expected_grad in zip(*(torch.autograd.grad(x, inputs, grad_out) for x in (out, expected)), strict=True):
        assert torch.allclose(grad, expected_grad, atol=1e-10)


def test_focus_finds_a_dominant_far_token() -> None:
    """One far key of 1,024 dominates a tile's queries: its cell's mean hides it, but the cell is chosen."""
    grid, errors = (32, 32), {}
    tile = (torch.arange(4)[:, None] * 32 + torch.arange(4)).flatten()
    query, key, value = (torch.randn(1, 2, 1024, 16, dtype=torch.float64) for _ in range(3))
    direction = torch.nn.functional.normalize(torch.randn(16, dtype=torch.float64), dim=0)
    query[:, :, tile] += 6 * direction
    key[:, :, 900] += 6 * direction
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


def test_rest_of_cells_is_computed_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, count = [], tables.rest_of_cells
    monkeypatch.setattr(tables, "rest_of_cells", lambda *shapes: counted.append(shapes) or count(*shapes))
    config = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=6), gate=1.0, focus_tokens=30)
    kernel, grid = METHODS[Hybrid](config, num_heads=2, head_dim=8), (7, 17)  # no other test uses this grid
    inputs = [torch.randn(1, 2, 119, 8, requires_grad=True) for _ in range(3)]
    for _ in range(2):
        kernel(*inputs, Layout(grid, 0, True, None)).sum().backward()
    assert len(counted) == 1


@pytest.mark.parametrize(("batch", "num_heads"), [(0, 2), (2, 0)])
def test_focus_of_an_empty_batch_is_empty(batch: int, num_heads: int) -> None:
    inputs = [x.new_zeros(batch, num_heads, *x.shape[2:]).requires_grad_() for x in inputs_of((5, 6), 8)]
    out, lse = focus_attention(*inputs, grid=(5, 6), window=WINDOWS[0], num_tokens=12, side=2, scale=SCALE)
    assert out.shape == inputs[0].shape and lse.shape == out.shape[:3]
    for grad, given in zip(torch.autograd.grad(out.sum() + lse.sum(), inputs), inputs, strict=True):
        assert grad.shape == given.shape


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"impl": "flash"}, r"impl must be one of \('auto', 'plain', 'triton'\), got 'flash'"),
        ({"grid": (5, 7)}, r"grid must hold the 30 tokens of query, .* got grid=\(5, 7\)"),
        ({"side": 0}, r"side be positive .* side=0"),
        ({"num_tokens": 3}, r"num_tokens enough for one of the 8 cells, got .* num_tokens=3"),
        ({"key": (1, 2, 29, 8)}, r"query, key and value must have one shape"),
        ({"proxy_key": (1, 2, 0, 8)}, r"proxy_key must be \[B, H, C, D\] like query, C > 0, got \(1, 2, 0, 8\)"),
        ({"proxy_value": (1, 2, 7, 8)}, r"proxy_value must be \[B, H, C, D\] like query"),
    ],
)
def test_focus_refuses_arguments_that_do_not_match(changed: dict[str, Any], message: str) -> None:
    tensors = dict.fromkeys(("query", "key", "value"), torch.zeros(1, 2, 30, 8))
    tensors |= dict.fromkeys(("proxy_key", "proxy_value"), torch.zeros(1, 2, 8, 8))
    shape = {"grid": (5, 6), "window": WINDOWS[0], "num_tokens": 12, "side": 2, "scale": SCALE}
    changed = {name: torch.zeros(one) if name in tensors else one for name, one in changed.items()}
    focus_attention(**tensors, **shape)
    with pytest.raises(ValueError, match=message):
        focus_attention(**{**tensors, **shape, **changed})


def test_focus_is_off_where_one_cell_exceeds_focus_tokens() -> None:
    assert [cells_in_focus(64, 16, (side, side)) for side in (4, 8, 16, 32, 64)] == [16, 16, 4, 1, 0]
    config = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), gate=1.0, focus_tokens=9)
    plain = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), gate=1.0)
    for grid, differs in (((6, 6), True), ((8, 8), False)):
        inputs, layout = [torch.randn(1, 2, math.prod(grid), 8) for _ in range(3)], Layout(grid, 0, True, None)
        with_focus, without = (
            METHODS[Hybrid](hybrid, num_heads=2, head_dim=8)(*inputs, layout) for hybrid in (config, plain)
        )
        assert torch.equal(with_focus, without) is not differs


def test_focus_pairs_count_seen_tokens_and_candidate_cells() -> None:
    assert focus_pairs(16, 16, 4, (8, 8)) == 64 * 16 + 4 * 16
    assert focus_pairs(25, 6, 3, (7, 10)) == 70 * 24 + 3 * 4 * 6  # two cells of 70 / 6 tokens
    assert focus_pairs(16, 16, 4, (64, 64)) == 0
    small, large = (focus_pairs(4096, 256, 4, (side, side)) for side in (64, 256))
    assert large == 16 * small


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"focus_tokens": -1}, "focus_tokens must be an integer >= 0, got -1"),
        ({"focus_tokens": 2.5}, "focus_tokens must be an integer >= 0, got 2.5"),
        ({"focus_side": 0}, "focus_side must be an integer >= 1, got 0"),
        ({"focus_tokens": 9, "mass_cells": 3}, "focus_tokens must be 0 unless join is 'mass'"),
        ({"focus_tokens": 9, "join": "gate"}, "focus_tokens must be 0 unless join is 'mass'"),
    ],
)
def test_hybrid_refuses_invalid_focus_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), **settings)


@pytest.mark.parametrize("token_major", [False, True], ids=["head-major", "token-major"])
@pytest.mark.parametrize("box", [None, [3, 3, 1, 1, 1, 1]])
def test_focus_op_passes_opcheck(box: list[int] | None, token_major: bool) -> None:
    inputs = [x.float() for x in inputs_of((5, 6), 4)]
    if token_major:
        inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(focus_op, (*inputs, (5, 6), 2, 2, SCALE, "plain", 2.0 if box is None else None, None, box))
