"""Triton's window attention in the interpreter: outputs and gradients against float64, tiles, fallbacks."""

import math
from subprocess import CalledProcessError
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from window_case import Case

from lineardit.kernels.window import Box, Circle, choose, choose_impl, window_attention

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from lineardit.kernels.pieces.launch import with_strides
from lineardit.kernels.pieces.trial import MAX_ERROR, device_seconds, fastest_that_fits, first_that_fits
from lineardit.kernels.window import operator, triton_probe, triton_window
from lineardit.kernels.window.lists import circle_lists, mask_words, transposed
from lineardit.kernels.window.reference import window_mask
from lineardit.kernels.window.triton_window import BACKWARD_TILES, FORWARD_TILES, SMALLER_TILES, candidates

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    (
        Case(grid=(13, 21), radius=5, text_len=7, text_first=False, masked=True, batch=2, num_pooled=3, head_dim=24),
        FP32,
    ),
    (Case(grid=(16, 25), radius=26, text_len=77, num_heads=1, head_dim=16), FP32),  # tiles that need no mask
    (Case(grid=(2, 9, 20), radius=2.5, head_dim=16), FP16),
    (Case(grid=(1, 40), radius=4, text_len=77, num_heads=1, head_dim=72), BF16),
    (Case(grid=(20, 9), radius=4, text_len=64, num_heads=1, head_dim=128, contiguous=False), BF16),
    (Case(grid=(5, 9), radius=3.3, text_len=5, num_heads=1, head_dim=256), FP16),
    (Case(grid=(3, 2, 4), radius=2.5, frame_radius=1, text_len=5, num_heads=1, head_dim=16), FP32),
    (Case(grid=(3, 2, 4), radius=2.5, frame_radius=2, num_heads=1, head_dim=16), FP32),
    (Case(grid=(3, 11), box=Box(window=(3, 3)), num_heads=1, head_dim=16), FP32),
    (Case(grid=(9, 5), box=Box(window=(3, 3), dilation=(2, 3)), text_len=5, num_heads=1, head_dim=16), FP32),
    (Case(grid=(9, 17), box=Box(window=(1, 1), cell=(8, 8)), num_heads=1, head_dim=16), FP32),  # ragged tiles as well
    (Case(grid=(2, 3, 5), box=Box(window=(1, 3), frame_radius=1), text_len=5, num_heads=1, head_dim=16), FP32),
]


@pytest.mark.parametrize("case, dtype", CASES, ids=lambda item: str(item).removeprefix("torch."))
def test_window_attention_triton_matches_reference(case, dtype, bf16_in_interpreter):
    case.matches_reference(dtype, impl="triton")


@settings(max_examples=6)
@given(
    case=st.builds(
        Case,
        grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
        radius=st.floats(0.5, 12),
        text_len=st.integers(1, 70),
        text_first=st.booleans(),
        masked=st.booleans(),
        num_heads=st.just(1),
        batch=st.integers(1, 2),
        head_dim=st.sampled_from([3, 16, 40]),
    ),
    dtype=st.sampled_from([FP32, FP16]),
)
def test_window_attention_triton_matches_reference_on_random_cases(case, dtype):
    case.matches_reference(dtype, impl="triton")


@pytest.mark.parametrize("tiles", SMALLER_TILES, ids=lambda t: f"{t.owned}-{t.read}-s{t.num_stages}")
def test_window_attention_triton_matches_reference_with_smaller_tiles(tiles, monkeypatch):
    for name in ("forward_tiles_for", "backward_tiles_for"):
        monkeypatch.setattr(triton_probe, name, lambda *_: tiles)
    monkeypatch.setattr(operator, "backward_tiles", choose.backward_tiles.__wrapped__)  # without its cache
    Case(grid=(9, 11), radius=3, text_len=5, num_heads=1, head_dim=16).matches_reference(FP32, impl="triton")


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # in sums that are masked out
def test_masked_text_has_zero_gradient_even_for_huge_keys():
    case = Case(grid=(5, 9), radius=2, text_len=140, masked=True, num_heads=1, head_dim=16, batch=2)
    query, key, value = case.tensors(FP32)
    masked = F.pad(~case.text_mask(), (0, 45))[:, None, :, None]
    key = torch.where(masked, 1e4 * key, key)  # if attended, its weights would be infinite
    grads = []
    for impl in ("triton", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        out = case.run(*leaves, impl=impl)[:, :, 140:]  # masked text still attends as a query
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
    torch.testing.assert_close(*grads)
    assert all(grad.masked_select(masked).eq(0).all() for grad in grads[0][1:])


def test_window_attention_op_returns_the_log_sum_exp():
    case = Case(grid=(9, 14), radius=4, num_heads=2, head_dim=16)
    query, key, value = case.tensors(FP32)
    text = query[:, :, :0]
    arguments = (text, True, query, key, value, text, text, None, case.grid, 4.0, 0.3, "triton")
    _, lse = operator.window_attention_op(*arguments)
    logits = (0.3 * query.double() @ key.double().transpose(2, 3)).masked_fill(
        ~window_mask(case.grid, Circle(radius=4.0), 0, True, query.device), -math.inf
    )
    torch.testing.assert_close(lse, logits.logsumexp(-1).float())


def test_window_attention_op_passes_opcheck_with_triton():
    case = Case(grid=(3, 9), radius=2, text_len=4, masked=True, num_heads=1, head_dim=16)
    tensors = case.tensors(FP32)
    text, image = zip(*(tensor.split([4, 27], dim=2) for tensor in tensors), strict=True)
    text, image = ([tensor.detach().requires_grad_() for tensor in part] for part in (text, image))
    arguments = (text[0], True, *image, *text[1:], case.text_mask(), case.grid, 2.0, 0.5, "triton")
    torch.library.opcheck(operator.window_attention_op, arguments)


def test_window_attention_triton_compiles_as_one_graph_and_is_deterministic():
    case = Case(grid=(5, 9), radius=2, text_len=3, num_heads=1, head_dim=16)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(FP32)]

    def attend(*tensors: Tensor) -> Tensor:
        return case.run(*tensors, impl="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = [
        (out := function(*leaves), *torch.autograd.grad(out.square().sum(), leaves)) for function in (attend, compiled)
    ]
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)


@pytest.mark.parametrize(("batch", "num_heads"), [(0, 2), (1, 0)])
def test_window_attention_triton_of_an_empty_batch_has_empty_gradients(batch, num_heads):
    case = Case(grid=(4, 6), radius=2, text_len=5, num_pooled=3, batch=batch, num_heads=num_heads)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(FP32)]
    grads = torch.autograd.grad(case.run(*leaves, impl="triton").sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]


def test_transposed_lists_hold_the_same_pairs_of_tiles():
    lists = circle_lists((20, 23), 9, query_tile=(4, 8), key_tile=(3, 2))
    other = transposed(lists)
    pairs = {
        (tile, int(key), int(mask))
        for tile, count in enumerate(lists.counts)
        for key, mask in zip(lists.key_tiles[tile, :count], lists.mask_ids[tile, :count], strict=True)
    }
    swapped_pairs = [
        (int(query), tile, int(mask))
        for tile, count in enumerate(other.counts)
        for query, mask in zip(other.query_tiles[tile, :count], other.mask_ids[tile, :count], strict=True)
    ]
    assert len(swapped_pairs) == len(pairs) and set(swapped_pairs) == pairs


def test_scale_must_be_positive_for_the_kernels():
    query = torch.randn(1, 1, 15, 16)
    with pytest.raises(ValueError, match=r"needs a scale > 0, got -1.0: use 'tiled', which takes any scale"):
        window_attention(query, query, query, grid=(3, 5), radius=2, impl="triton", scale=-1.0)


def test_mask_words_hold_each_bit():
    masks = torch.rand(3, 5, 64) > 0.5
    words = mask_words(masks)
    assert torch.equal((words[..., None] >> torch.arange(64)) & 1 == 1, masks)


def test_candidates_keep_the_sums_in_registers():
    half = torch.float16
    assert candidates(FORWARD_TILES, 128, 80, half)[0].owned == (8, 16)
    assert candidates(FORWARD_TILES, 129, 80, half)[0].owned == (8, 8)
    assert [one.owned for one in candidates(BACKWARD_TILES, 128, 90, half)[:2]] == [(8, 16), (8, 8)]
    for arch in (80, 120):
        assert candidates(BACKWARD_TILES, 128, arch, half)[0].owned == (8, 8)
    for head_dim in (1, 16, 128, 256):
        assert candidates(BACKWARD_TILES, head_dim, 80, half)


def test_candidates_for_float32_are_small_and_unpipelined():
    for tiles in (FORWARD_TILES, BACKWARD_TILES):
        assert candidates(tiles, 64, 90, torch.float32) == list(SMALLER_TILES[2:])
        for head_dim in (128, 256):
            assert candidates(tiles, head_dim, 90, torch.float32) == [SMALLER_TILES[-1]]


@pytest.mark.parametrize(
    "problem", [OutOfResources(200_000, 101_376, "shared memory"), RuntimeError("PassManager::run failed")]
)
def test_first_that_fits_takes_the_next_smaller_tiles(problem):
    def error_of(tiles: triton_window.Tiles) -> float:
        if tiles is FORWARD_TILES[0]:
            raise problem
        return 0.01

    assert first_that_fits(list(FORWARD_TILES), error_of) is FORWARD_TILES[1]
    with pytest.raises(RuntimeError, match=r"shared memory|PassManager"):
        first_that_fits(list(FORWARD_TILES[:1]), error_of)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        first_that_fits(list(FORWARD_TILES), lambda _: (_ for _ in ()).throw(RuntimeError("illegal memory access")))
    with pytest.raises(RuntimeError, match="differs from the reference"):
        first_that_fits(list(FORWARD_TILES), lambda _: 0.3)


@pytest.mark.parametrize(
    "shape, unit, strides",
    [
        ((2, 7, 16, 72), 8, [7 * 16 * 9, 9, 16 * 9]),  # PixArt's heads, token-major
        ((1, 7, 16, 72), 8, [0, 9, 16 * 9]),  # the stride of a batch of one is not used
        ((2, 7, 3, 20), 1, [7 * 3 * 20, 20, 3 * 20]),
    ],
)
def test_with_strides_counts_in_units_of_16_bytes_where_possible(shape, unit, strides):
    tensor = torch.empty(shape).transpose(1, 2)
    assert with_strides(tensor, tensor) == ([tensor, *strides] * 2, unit)
    unaligned = torch.empty(1, 2, 3, 5)
    assert with_strides(tensor, unaligned)[1] == 1
    assert with_strides(tensor, unaligned)[0][1:4] == [
        step if size > 1 else 0 for step, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    ]


@pytest.mark.parametrize(
    "seconds, winner",
    [
        ((1.0, 0.9, 0.7, 2.0), 2),
        ((1.0, 0.97, 0.96, 2.0), 0),  # noise
        ((1.0, 0.9, 0.87, 0.5), 3),
    ],
)
def test_fastest_that_fits_prefers_earlier_tiles_unless_clearly_slower(seconds, winner):
    def error_of(tiles: triton_window.Tiles) -> float:
        if tiles is FORWARD_TILES[0]:
            raise OutOfResources(200_000, 101_376, "shared memory")
        return 0.01

    times = dict(zip(FORWARD_TILES[1:], seconds, strict=False))
    chosen, report = fastest_that_fits(
        list(FORWARD_TILES), error_of, lambda tiles: {candidate: times[candidate] for candidate in tiles}
    )
    assert chosen is FORWARD_TILES[1 + winner]
    assert all(f"{candidate} {1e3 * time:.3f} ms" in report for candidate, time in times.items())


@pytest.mark.parametrize(
    "problem", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_fastest_that_fits_takes_the_first_where_none_is_timed(problem):
    def no_memory(_: object) -> dict:
        raise problem

    alone = fastest_that_fits(list(FORWARD_TILES[:1]), lambda _: 0.01, no_memory)
    assert alone == (FORWARD_TILES[0], "the only one that runs")
    first = fastest_that_fits(list(FORWARD_TILES), lambda _: 0.01, no_memory)
    assert first == (FORWARD_TILES[0], f"not raced: {problem}")
    with pytest.raises(RuntimeError, match="differs from the reference"):
        fastest_that_fits(list(FORWARD_TILES), lambda _: 0.3, no_memory)


def test_fastest_that_fits_leaves_out_wrong_tiles(caplog):
    errors = dict.fromkeys(FORWARD_TILES, 0.01) | {FORWARD_TILES[1]: 0.3}
    raced = []
    chosen, _ = fastest_that_fits(
        list(FORWARD_TILES), errors.__getitem__, lambda tiles: raced.extend(tiles) or dict.fromkeys(tiles, 1.0)
    )
    assert chosen is FORWARD_TILES[0]
    assert raced == [FORWARD_TILES[0], *FORWARD_TILES[2:4]]
    assert f"skipping {FORWARD_TILES[1]}: a trial differs from the reference by 0.3" in caplog.text


def test_race_runs_the_forward_and_the_backward(monkeypatch):
    """On smaller sizes than a GPU's, with each call made once."""
    monkeypatch.setattr(triton_probe, "RACE_GRID", (9, 8))
    monkeypatch.setattr(triton_probe, "RACE_SHARED", 5)
    monkeypatch.setattr(triton_probe, "RACE_HEADS", 1)
    monkeypatch.setattr(triton_probe, "device_seconds", lambda calls: [call() for call in calls.values()])
    race = triton_probe._Race(torch.device("cpu"), FP32, 16)
    lses = race.forward_seconds(FORWARD_TILES[:2])
    assert [lse.shape for lse in lses] == [(1, 1, 72)] * 2
    torch.testing.assert_close(*lses)
    grads = race.backward_seconds(BACKWARD_TILES[:2])
    assert [[grad.shape[2] for grad in tile_grads] for tile_grads in grads] == [[72, 72, 72, 5, 5]] * 2
    for grad, other in zip(*grads, strict=True):  # up to 4,000 here, as the log-sum-exp is not the true one
        roundings = 4 * torch.finfo(FP32).eps * grad.abs().max().item()
        torch.testing.assert_close(grad, other, rtol=0, atol=roundings)


def test_device_seconds_is_the_median_of_alternating_calls(monkeypatch):
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    order = []

    def call(name: str, duration: float) -> None:
        order.append(name)
        clock[0] += duration if len(order) > 8 else 100 * duration  # the first calls are slow

    def too_large() -> None:
        raise OutOfResources(200_000, 101_376, "shared memory")

    calls = {"a": lambda: call("a", 2.0), "too large": too_large, "b": lambda: call("b", 3.0)}
    assert device_seconds(calls, rounds=4) == {"a": 2e-3, "b": 3e-3}
    assert order == ["a", "b"] * 8


@pytest.mark.slow
def test_trial_accepts_the_kernels_and_detects_a_wrong_scale(monkeypatch: pytest.MonkeyPatch):
    trial = triton_probe._Trial(torch.device("cpu"), FP32, 16)
    tiles = FORWARD_TILES[0]
    assert trial.forward_error(tiles) < 1e-5 and trial.backward_error(tiles) < 1e-5
    for name in ("triton_forward", "triton_backward"):
        kernel = getattr(triton_window, name)
        monkeypatch.setattr(
            triton_probe, name, lambda *given, kernel=kernel: kernel(*given[:-2], 1.5 * given[-2], given[-1])
        )
    assert trial.forward_error(tiles) > MAX_ERROR
    assert trial.backward_error(tiles) > MAX_ERROR


@pytest.mark.parametrize(
    "device, dtype, head_dim, reason",
    [
        ("meta", FP32, 64, "needs a CUDA device, got meta"),
        ("cpu", torch.float64, 64, "got torch.float64"),
        ("cpu", FP32, 257, "head dimensions up to 256, got 257"),
    ],
)
def test_require_triton_error_names_the_reason(device, dtype, head_dim, reason):
    query = torch.empty(1, 1, 15, head_dim, dtype=dtype, device=device)
    with pytest.raises(ValueError, match=reason):
        window_attention(query, query, query, grid=(3, 5), radius=2, impl="triton")


def test_why_not_triton_requires_cuda_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a CUDA device, got cpu" in choose._why_not_triton.__wrapped__(torch.device("cpu"), FP32, 64)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (RuntimeError("out of resource: shared memory"), "out of resource: shared memory"),
        (CalledProcessError(1, "gcc"), "Command 'gcc' returned non-zero exit status 1."),  # Python headers are missing
        (AssertionError("libcuda.so cannot be found"), "libcuda.so cannot be found"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_why_not_triton_warns_once_where_the_trial_fails(monkeypatch, caplog, problem, reason):
    def failing(*_: object) -> None:
        raise problem

    monkeypatch.setattr(triton_probe, "forward_tiles_for", failing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tiny GPU")
    choose._why_not_triton.cache_clear()
    for _ in range(2):
        assert choose.why_not_triton(torch.device("cuda"), BF16, 64) == f"on Tiny GPU: {reason}"
    choose._why_not_triton.cache_clear()
    assert caplog.text.count("falls back to plain PyTorch") == 1


def test_backward_falls_back_to_tiled_with_a_warning(monkeypatch, caplog):
    def failing(*_: object) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(triton_probe, "backward_tiles_for", failing)
    monkeypatch.setattr(operator, "backward_tiles", choose.backward_tiles.__wrapped__)  # without its cache
    Case(grid=(9, 11), radius=3, text_len=5, num_heads=1, head_dim=16).matches_reference(FP32, impl="triton")
    reason = "in Triton's interpreter: out of shared memory"
    assert f"Gradients of window attention fall back to plain PyTorch, which is slower: {reason}" in caplog.text


@pytest.mark.parametrize("reason, expected", [(None, "triton"), ("it broke", "tiled")])
def test_choose_impl_prefers_triton_on_cuda(reason, expected, monkeypatch):
    monkeypatch.setattr(choose, "why_not_triton", lambda *_: reason)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=BF16, shape=(1, 24, 4608, 128))
    assert choose_impl(query, grid=(64, 64), window=Circle(radius=8), text_len=512) == expected
