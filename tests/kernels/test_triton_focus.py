"""The focus kernel in Triton's interpreter: against dense masks and "plain", strides, precisions, fallbacks."""

from typing import Any

import pytest
import torch
from focus_case import CPU, SCALE, SHAPES, WINDOWS, by_hand, clear_choice, inputs_of
from tolerance import assert_matches_reference

from lineardit.kernels.focus import attention, choose, focus_attention, plain
from lineardit.kernels.focus.attention import focus_backward_op, focus_op
from lineardit.kernels.window import Box, Circle, Window
from lineardit.kernels.window.partial import PLAIN
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import METHODS, Clear, Hybrid, ProxyTokens

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from lineardit.kernels.focus import triton_focus, triton_probe
from lineardit.kernels.focus.choose import choose_impl, division_is_exact
from lineardit.kernels.focus.triton_focus import Blocks, backward_candidates, candidates

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


# each shape with two windows and each window with two shapes, with batches of two and of one
PAIRS = [
    (*shape, WINDOWS[(index + step) % len(WINDOWS)], batch)
    for step, batch in ((0, 2), (2, 1))
    for index, shape in enumerate(SHAPES)
]
SMALLER = {"GRID": (12, 14), "WINDOW": Circle(radius=4), "COUNT": 6, "NUM_SMALL_CELLS": 42}  # image of the trial


@pytest.mark.parametrize(("grid", "num_cells", "num_tokens", "side", "window", "batch"), PAIRS, ids=str)
def test_triton_matches_the_formula(
    grid: tuple[int, int], num_cells: int, num_tokens: int, side: int, window: Window, batch: int
) -> None:
    inputs = [x[:batch].requires_grad_() for x in inputs_of(grid, num_cells, FP32)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    shape = {"grid": grid, "window": window, "num_tokens": num_tokens, "side": side}
    out, lse = focus_attention(*inputs, **shape, scale=SCALE, impl="triton")
    expected, expected_lse, _ = by_hand(*exact, **shape)
    seen = expected_lse > -20  # elsewhere no token is outside the window
    assert torch.allclose(out[seen].double(), expected[seen], atol=1e-5)
    assert torch.allclose(lse[seen].double(), expected_lse[seen], atol=1e-5)
    weights = torch.randn_like(out)[seen], torch.randn_like(lse)[seen]
    grads = torch.autograd.grad((out[seen], lse[seen]), inputs, weights)
    expected_grads = torch.autograd.grad((expected[seen], expected_lse[seen]), exact, [x.double() for x in weights])
    for grad, exact_grad in zip(grads, expected_grads, strict=True):
        assert torch.allclose(grad.double(), exact_grad, atol=1e-5)
    plain_out, plain_lse = focus_attention(*inputs, **shape, scale=SCALE, impl="plain")
    assert torch.allclose(out, plain_out, atol=1e-5)
    assert torch.allclose(lse, plain_lse, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_triton_is_as_precise_as_the_formula_in_the_same_precision(dtype: torch.dtype, bf16_in_interpreter) -> None:
    inputs, shape = clear_choice(dtype)
    assert_matches_reference(
        lambda *x: focus_attention(*x, **shape, scale=SCALE, impl="triton")[0],
        lambda *x: by_hand(*x, **shape)[0],
        inputs,
        dtype,
    )


@pytest.mark.parametrize(
    ("grid", "num_cells", "num_tokens", "side", "head_dim", "window"),
    [
        ((24, 24), 8, 144, 8, 8, Circle(radius=3)),  # cells longer than a block, most of them outside every window
        ((3, 8, 9), 6, 72, 8, 8, Circle(radius=2.5, frame_radius=2)),
        ((2, 6, 6), 8, 18, 3, 8, Box(window=(3, 3))),
        ((9, 14), 10, 30, 4, 24, Circle(radius=2)),
        ((7, 9), 6, 21, 3, 12, Circle(radius=2)),  # rows that are not multiples of 16 bytes
        ((6, 6), 9, 12, 3, 128, Box(window=(3, 1))),
    ],
)
def test_triton_matches_plain(
    grid: tuple[int, ...], num_cells: int, num_tokens: int, side: int, head_dim: int, window: Window
) -> None:
    inputs = [x[:1].requires_grad_() for x in inputs_of(grid, num_cells, FP32, head_dim)]
    shape = {"grid": grid, "window": window, "num_tokens": num_tokens, "side": side, "scale": SCALE}
    results, weights = [], [torch.randn_like(inputs[0]), torch.randn_like(inputs[0][..., 0])]
    for impl in ("triton", "plain"):
        both = focus_attention(*inputs, **shape, impl=impl)
        results.append([*both, *torch.autograd.grad(both, inputs, weights)])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def blocks_id(blocks: Blocks) -> str:
    return f"k{blocks.keys}-w{blocks.num_warps}-s{blocks.num_stages}"


@pytest.mark.parametrize("blocks", candidates(4, torch.float16), ids=blocks_id)
def test_triton_matches_plain_with_any_blocks(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_probe, "blocks_for", lambda *_: blocks)
    inputs, shape = inputs_of((8, 7), 9, FP32), {"grid": (8, 7), "window": Circle(radius=2), "num_tokens": 20}
    one, other = (focus_attention(*inputs, **shape, side=4, scale=SCALE, impl=impl) for impl in ("triton", "plain"))
    assert torch.allclose(one[0], other[0], atol=1e-5)


FIRST, *OTHERS = backward_candidates(8, torch.float16)


@pytest.mark.parametrize(
    "blocks",
    [FIRST, *OTHERS[-1:], *(pytest.param(blocks, marks=pytest.mark.slow) for blocks in OTHERS[:-1])],
    ids=blocks_id,
)
def test_gradients_match_plain_with_any_blocks(blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 cells of one token and 4 of 72: more and fewer than a block, and the proxies' sums split over programs."""
    monkeypatch.setattr(triton_probe, "backward_blocks_for", lambda *_: blocks)
    for grid, num_cells, num_tokens in (((8, 10), 80, 9), ((18, 16), 4, 72)):
        inputs = [x[:1].requires_grad_() for x in inputs_of(grid, num_cells, FP32)]
        shape = {"grid": grid, "window": Circle(radius=2), "num_tokens": num_tokens, "side": 4, "scale": SCALE}
        grads = [
            torch.autograd.grad(focus_attention(*inputs, **shape, impl=impl)[0].square().sum(), inputs)
            for impl in ("triton", "plain")
        ]
        for actual, expected in zip(*grads, strict=True):
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_triton_accepts_any_strides() -> None:
    inputs = inputs_of((8, 8), 16, FP32)
    shape = {"grid": (8, 8), "window": Circle(radius=2), "num_tokens": 12, "side": 4, "scale": SCALE, "impl": "triton"}
    weight = torch.randn(1, 1, 1, inputs[0].shape[3]).expand_as(inputs[0])

    def results(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        *leaves, weight = (x.detach().requires_grad_() for x in tensors)
        out, _ = focus_attention(*leaves, **shape)
        return [out, *torch.autograd.grad(out, leaves, weight)]

    given = [*inputs, weight]
    expected = results(given)
    part_of_token_major = [
        torch.cat([x, x], 3).transpose(1, 2).contiguous().transpose(1, 2)[..., : x.shape[3]] for x in given
    ]
    row_in_pieces = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in given]
    for strided in (part_of_token_major, row_in_pieces):
        assert all(map(torch.equal, results(strided), expected))


def test_gradients_have_the_dtypes_of_their_inputs() -> None:
    """Half-precision queries, keys and values with float32 proxies."""
    inputs, shape = clear_choice(FP32)
    mixed = [x.half() for x in inputs[:3]] + inputs[3:]
    grads = {}
    for impl in ("triton", "plain"):
        leaves = [x.detach().requires_grad_() for x in mixed]
        out, lse = focus_attention(*leaves, **shape, scale=SCALE, impl=impl)
        grads[impl] = torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)
    assert [x.dtype for x in grads["triton"]] == [FP16] * 3 + [FP32] * 2
    for actual, expected in zip(*grads.values(), strict=True):
        assert (actual - expected).abs().max() <= 5e-3 * expected.abs().max()


@pytest.mark.parametrize("impl", ["triton", "plain"])
@pytest.mark.parametrize(("grid", "num_cells"), [((6, 4), 6), ((5, 4), 4)])  # disjoint and overlapping cells
def test_focus_backward_op_passes_opcheck(impl: str, grid: tuple[int, int], num_cells: int) -> None:
    inputs = inputs_of(grid, num_cells, FP32)
    shape = (grid, 2, 2, SCALE, impl, 1.5, None, None)
    out, lse, chosen = focus_op(*inputs, *shape)
    given = (torch.randn_like(out), torch.randn_like(lse), *inputs, out, lse, chosen, *shape)
    torch.library.opcheck(focus_backward_op, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("box", [None, pytest.param([3, 3, 1, 1, 1, 1], marks=pytest.mark.slow)])
def test_focus_op_passes_opcheck_with_triton(box: list[int] | None) -> None:
    inputs = [x.requires_grad_() for x in inputs_of((4, 3), 2, FP32)]
    radius = 1.5 if box is None else None
    torch.library.opcheck(focus_op, (*inputs, (4, 3), 1, 2, SCALE, "triton", radius, None, box))


def test_hybrid_with_triton_matches_tiled() -> None:
    config = Hybrid(local=Clear(radius=2.5), global_=ProxyTokens(num_proxies=9), gate=1.0, focus_tokens=30)
    kernel = METHODS[Hybrid](config, num_heads=2, head_dim=8)
    inputs, layout = [torch.randn(1, 2, 5 + 12 * 9, 8) for _ in range(3)], Layout((12, 9), 5, True, None)
    outs = {}
    for kernel.impl in ("tiled", "triton"):
        outs[kernel.impl] = kernel(*inputs, layout)
    assert torch.allclose(outs["triton"], outs["tiled"], atol=1e-5)


def test_choose_impl_returns_or_refuses_an_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 64, 128)
    assert choose_impl(query, 4, "auto") == choose_impl(query, 4, "plain") == "plain"
    assert choose_impl(query, 8, "triton") == "triton"
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: it takes .*got torch.float64"):
        choose_impl(query.double(), 4, "triton")
    with pytest.raises(ValueError, match=r"a tile of 16 x 16 queries of head dimension 128 is too large"):
        choose_impl(query, 16, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="it needs a CUDA device, got cpu; use 'plain', which runs anywhere"):
        choose_impl(query[..., :64], 4, "triton")


def test_query_without_visible_keys_has_the_log_sum_exp_of_plain() -> None:
    """All cells are in focus and inside the window; the plain backward reads the kernel's value."""
    inputs, shape = inputs_of((4, 4), 4, FP32), {"grid": (4, 4), "window": Circle(radius=9), "num_tokens": 16}
    lses = [focus_attention(*inputs, **shape, side=4, scale=SCALE, impl=impl)[1] for impl in ("triton", "plain")]
    assert (lses[1] < -9000).all()
    assert torch.allclose(*lses, rtol=0, atol=2e-3)


@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_device_trial_passes_with_and_without_autocast(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with the plain formula used on a GPU, on a smaller image."""
    for name, value in SMALLER.items():
        monkeypatch.setattr(triton_probe, name, value)
    monkeypatch.setattr(plain, "fastest_partial", lambda *_: PLAIN)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert triton_probe.try_blocks(CPU, FP32, 8, 8) == candidates(8, FP32)[0]
        assert triton_probe.try_backward_blocks(CPU, FP32, 8, 8) == backward_candidates(8, FP32)[0]


def test_device_trial_includes_the_larger_shared_memory_of_some_cell_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a multiple of 16, Triton uses wider loads and prefetches, which take more shared memory."""

    def narrow(inputs: list[torch.Tensor], *given: Any) -> tuple[torch.Tensor, ...]:
        if inputs[3].shape[2] % 16 == 0 and given[-1].keys > 32:
            raise OutOfResources(106_496, 101_376, "shared memory")
        return tuple(inputs)

    monkeypatch.setattr(triton_probe, "triton_forward", lambda *given: narrow(*given)[:2])
    monkeypatch.setattr(triton_probe, "triton_backward", lambda grad_out, grad_lse, *given: narrow(*given))
    monkeypatch.setattr(triton_probe, "relative_error", lambda *_: 0.0)
    assert triton_probe.try_blocks(CPU, torch.float16, 8, 8).keys == 32
    assert triton_probe.try_backward_blocks(CPU, torch.float16, 8, 8).keys == 32


def test_device_trial_detects_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: list[torch.Tensor], out: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        lse, chosen = triton_focus.triton_forward(inputs, out, *_)
        return lse + 1, chosen

    for name, value in SMALLER.items():
        monkeypatch.setattr(triton_probe, name, value)
    monkeypatch.setattr(triton_probe, "triton_forward", wrong)
    with pytest.raises(RuntimeError, match="a trial differs from the reference by"):
        triton_probe.try_blocks(CPU, FP32, 8, 8)


def test_backward_falls_back_to_plain_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> Blocks:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(triton_probe, "backward_blocks_for", fails)
    monkeypatch.setattr(attention, "backward_blocks", choose.backward_blocks.__wrapped__)  # without its cache
    inputs = [x.requires_grad_() for x in inputs_of((6, 6), 9, FP32)]
    shape = {"grid": (6, 6), "window": Circle(radius=2), "num_tokens": 8, "side": 4, "scale": SCALE}
    grads = [
        torch.autograd.grad(focus_attention(*inputs, **shape, impl=impl)[0].sum(), inputs)
        for impl in ("triton", "plain")
    ]
    assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*grads, strict=True))
    reason = "in Triton's interpreter: out of shared memory"
    assert f"Gradients of tokens in focus fall back to plain PyTorch, which is slower: {reason}" in caplog.text


def test_division_is_exact_refuses_too_large_grids_with_a_warning(caplog):
    assert division_is_exact((1024, 1024), 4096, 4) and not caplog.text
    assert not division_is_exact((1024, 8192), 1024, 1)
    assert (
        "Tokens in focus fall back to plain PyTorch, which is slower: a grid of (1024, 8192) is too large"
        in caplog.text
    )
