"""Window attention: every implementation against the reference, its window, its errors, autograd."""

import math

import efficient_stand_in
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_matches_reference
from torch.utils.checkpoint import checkpoint
from window_case import BOXES, Case, any_boxes

from impls import PORTABLE
from lineardit.kernels.window import Box, tiled, window_attention, windowed_attention
from lineardit.kernels.window.partial import EFFICIENT, FLASH, PLAIN
from lineardit.kernels.window.reference import window_mask

CASES = [
    Case(grid=(3, 5), radius=1.5, text_len=4, masked=True, batch=2),
    Case(grid=(7, 5), radius=99, text_len=3, num_heads=3),
    Case(grid=(1, 150), radius=4, text_len=77, head_dim=16),
    Case(grid=(12, 20), radius=2, batch=2, contiguous=False),
    Case(grid=(13, 37), radius=5, text_len=7, text_first=False, masked=True, batch=2, num_pooled=3),
    Case(grid=(37, 11), radius=3.3, text_len=77, num_pooled=6, contiguous=False),
    Case(grid=(2, 9, 20), radius=2.5, text_len=5, batch=2),
    Case(grid=(3, 5, 9), radius=2.5, frame_radius=1, text_len=5),
    Case(grid=(3, 5, 9), radius=2.5, frame_radius=2),
    *(Case(grid=(7, 10), box=box, text_len=5, text_first=False, masked=True, batch=2) for box in BOXES),
    Case(grid=(7, 10), box=BOXES[-1]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=["masked", "tiled-flash", "tiled-plain"])
def fast_impl(request, monkeypatch):
    """An implementation other than the reference; "tiled" once with each of its partial attentions."""
    impl, _, partial = request.param.partition("-")
    if partial:
        monkeypatch.setattr(tiled, "fastest_partial", lambda *_: {"flash": FLASH, "plain": PLAIN}[partial])
    return impl


@on_cases
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_window_attention_matches_reference(case, dtype, fast_impl):
    case.matches_reference(dtype, impl=fast_impl)


@pytest.fixture
def efficient(monkeypatch):
    """Tiles as on a CUDA device without Triton, with a stand-in for its kernel that checks its requirements."""
    monkeypatch.setattr(tiled, "fastest_partial", lambda *_: EFFICIENT)
    name = "_scaled_dot_product_efficient_attention"
    monkeypatch.setattr(torch.ops.aten, name, efficient_stand_in.forward)
    monkeypatch.setattr(torch.ops.aten, f"{name}_backward", efficient_stand_in.backward)


@on_cases
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.usefixtures("efficient")
def test_window_attention_matches_reference_with_products_in_half_precision(case, dtype):
    case.matches_reference(dtype, impl="tiled")


@pytest.mark.parametrize("rows", ["columns first", "every second", "expanded"])
def test_window_attention_accepts_non_contiguous_rows(rows, fast_impl):
    case = Case(grid=(20, 23), radius=3, text_len=7, head_dim=16)
    contiguous = case.tensors(torch.float32)
    if rows == "columns first":
        strided = [tensor.mT.contiguous().mT for tensor in contiguous]
    elif rows == "every second":
        strided = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in contiguous]
    else:
        contiguous = [tensor[..., :1].expand_as(tensor).contiguous() for tensor in contiguous]
        strided = [tensor[..., :1].expand_as(tensor) for tensor in contiguous]
    assert all(tensor.stride(-1) != 1 for tensor in strided)
    results = []
    for tensors in (strided, contiguous):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = case.run(*leaves, impl=fast_impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch, num_heads", [(0, 2), (2, 0)])
def test_window_attention_of_an_empty_batch_is_empty(batch, num_heads, fast_impl):
    case = Case(grid=(20, 23), radius=3, text_len=7, batch=batch, num_heads=num_heads)
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    out = case.run(*leaves, impl=fast_impl)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [result.shape for result in (out, *grads)] == [leaves[0].shape] * 4


@settings(max_examples=30)
@given(
    case=st.builds(
        Case,
        grid=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
        radius=st.floats(0.5, 12),
        frame_radius=st.none() | st.integers(1, 6),
        box=st.none() | any_boxes,
        text_len=st.integers(1, 9),
        text_first=st.booleans(),
        masked=st.booleans(),
        num_pooled=st.integers(0, 3),
        batch=st.integers(1, 2),
        head_dim=st.sampled_from([1, 4, 24]),
    ),
    dtype=st.sampled_from(DTYPES),
    impl=st.sampled_from(["masked", "tiled", "auto"]),
)
def test_window_attention_matches_reference_on_random_cases(case, dtype, impl):
    case.matches_reference(dtype, impl=impl)


@pytest.mark.parametrize("impl", PORTABLE)
def test_window_attention_equals_a_circle_and_one_frame_equals_an_image(impl):
    image, frame = (Case(grid=grid, radius=3, text_len=2) for grid in ((5, 9), (1, 5, 9)))
    tensors = image.tensors()
    expected = image.run(*tensors, impl=impl)
    assert torch.equal(window_attention(*tensors, grid=(5, 9), radius=3, text_len=2, impl=impl), expected)
    for frame_radius in (1, 2, None):
        options = {"grid": frame.grid, "radius": 3, "frame_radius": frame_radius, "text_len": 2, "impl": impl}
        assert torch.equal(window_attention(*tensors, **options), expected)


@pytest.mark.parametrize("impl", PORTABLE)
def test_window_attention_beyond_the_diagonal_is_dense_attention(impl):
    case = Case(grid=(6, 9), radius=math.hypot(5, 8) + 1e-6, text_len=4)
    assert_matches_reference(
        lambda *tensors: case.run(*tensors, impl=impl, scale=0.3),
        lambda *tensors: F.scaled_dot_product_attention(*tensors, scale=0.3),
        case.tensors(),
        torch.float32,
    )


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize(
    "case",
    [
        Case(grid=(9, 40), radius=3, text_len=2, num_pooled=1),
        Case(grid=(9, 40), radius=3, text_len=2, num_pooled=1, text_first=False),
        Case(grid=(5, 4, 9), radius=3, frame_radius=2, text_len=2, num_pooled=1),
        Case(grid=(9, 20), box=Box(window=(3, 5), dilation=(2, 1)), text_len=2, num_pooled=1),
    ],
    ids=str,
)
def test_window_attention_changes_only_where_a_token_is_seen(case, impl):
    query, key, value, pooled_key, pooled_value = case.tensors()
    out = case.run(query, key, value, pooled_key, pooled_value, impl=impl)
    seen = window_mask(case.grid, case.window, 0, True, torch.device("cpu"))  # [image, image]
    token = 2 * len(seen) // 5
    perturbed = value.clone()
    perturbed[:, :, case.image.start + token] += 1
    changed = (case.run(query, key, perturbed, pooled_key, pooled_value, impl=impl) != out).all(dim=3)
    expected = torch.ones(case.num_tokens, dtype=torch.bool)
    expected[case.image] = seen[:, token]
    assert torch.equal(changed, expected.expand_as(changed))

    changed = (case.run(query, key, value, pooled_key, pooled_value + 1, impl=impl) != out).all(dim=3)
    expected = torch.zeros(case.num_tokens, dtype=torch.bool)
    expected[case.image] = True
    assert torch.equal(changed, expected.expand_as(changed))


@pytest.mark.parametrize("impl", PORTABLE)
def test_window_attention_ignores_masked_text(impl):
    case = Case(grid=(4, 30), radius=3, text_len=4, masked=True, batch=2)
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    out = case.run(*tensors, impl=impl)
    assert out.isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    masked = ~case.text_mask()
    for grad in grads[1:]:
        text_grad = grad[:, :, :4].transpose(1, 2)
        assert (text_grad[masked] == 0).all() and (text_grad[~masked] != 0).any()


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_window_attention_stays_finite_for_extreme_logits(impl, size):
    case = Case(grid=(5, 40), radius=3, text_len=4, masked=True)
    query, key, value = case.tensors(torch.float32)
    assert case.run(query * size, key * size, value, impl=impl).isfinite().all()


@pytest.mark.parametrize(
    "case",
    [
        Case(grid=(3, 5), radius=1.5, text_len=2, masked=True, batch=2, head_dim=3),
        Case(grid=(1, 70), radius=2, text_len=1, num_pooled=1, num_heads=1, head_dim=2),
    ],
    ids=str,
)
def test_window_attention_passes_gradcheck(case, fast_impl):
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    assert torch.autograd.gradcheck(lambda *t: case.run(*t, impl=fast_impl), tensors, fast_mode=True)


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 4])
def test_window_attention_gives_the_gradient_of_one_input_alone(needed, fast_impl):
    case = CASES[4]
    tensors = case.tensors()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    all_grads = torch.autograd.grad(case.run(*leaves, impl=fast_impl).square().sum(), leaves)
    alone = tensors[needed].detach().requires_grad_()
    out = case.run(*tensors[:needed], alone, *tensors[needed + 1 :], impl=fast_impl)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), alone)[0], all_grads[needed])


def test_window_attention_is_the_same_without_gradients(fast_impl):
    case = CASES[4]
    tensors = case.tensors(torch.float32)
    with torch.no_grad():
        out = case.run(*tensors, impl=fast_impl)
    with torch.inference_mode():
        inferred = case.run(*tensors, impl=fast_impl)
    assert not out.requires_grad and torch.equal(out, inferred)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    assert torch.equal(out, case.run(*leaves, impl=fast_impl))


def test_window_attention_trains_on_a_grid_first_used_in_inference_mode(fast_impl):
    case = Case(grid=(6, 43), radius=3)
    tiled.window_groups.cache_clear()
    tensors = case.tensors(torch.float32)
    with torch.inference_mode():
        case.run(*tensors, impl=fast_impl)
    case.matches_reference(torch.float32, impl=fast_impl)


def test_window_attention_refuses_a_second_derivative(fast_impl):
    case = Case(grid=(3, 5), radius=1.5)
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]
    out = case.run(*tensors, impl=fast_impl).square().sum()
    (grad,) = torch.autograd.grad(out, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), tensors[1])


def test_window_attention_works_under_gradient_checkpointing(fast_impl):
    case = CASES[5]
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    expected = torch.autograd.grad(case.run(*tensors, impl=fast_impl).square().sum(), tensors)
    out = checkpoint(lambda *t: case.run(*t, impl=fast_impl), *tensors, use_reentrant=False)
    for grad, other in zip(torch.autograd.grad(out.square().sum(), tensors), expected, strict=True):
        assert torch.equal(grad, other)


def test_window_attention_under_autocast_casts_as_sdpa_does(fast_impl):
    case = CASES[4]
    leaves = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run(leaves[0], leaves[1].bfloat16(), *leaves[2:], impl=fast_impl)
        assert out.dtype == F.scaled_dot_product_attention(*leaves[:3]).dtype
        grads = torch.autograd.grad(out.float().square().sum(), leaves)
    expected = case.run(*(tensor.bfloat16() for tensor in leaves), impl=fast_impl)
    assert torch.equal(out, expected)
    for grad, other in zip(grads, torch.autograd.grad(expected.float().square().sum(), leaves), strict=True):
        assert torch.equal(grad, other)


def test_window_attention_under_autocast_keeps_float64():
    case = CASES[0]
    tensors = case.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run(*tensors, impl="tiled")
    assert torch.equal(out, case.run(*tensors, impl="tiled"))


TENSOR = torch.zeros(2, 3, 11, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": TENSOR[0]}, r"query must be floating point \[B, H, N, D\], got torch.float32 \(3, 11, 4\)"),
        ({"query": TENSOR.int()}, "query must be floating point"),
        ({"key": TENSOR[:, :, :5]}, "query, key and value must have one shape"),
        ({"value": TENSOR.double()}, "query, key, value and pooled must have one dtype"),
        ({"grid": (2, 3)}, r"text_len \+ height \* width must equal N, got 3 \+ 2 \* 3 != 11"),
        ({"grid": (8,)}, "grid must be .*got .8,"),
        ({"grid": (0, 8)}, r"integers >= 1, got \(0, 8\)"),
        ({"grid": (2.0, 4.0)}, r"integers >= 1, got \(2.0, 4.0\)"),
        ({"grid": (2, 1, 5), "frame_radius": 1}, r"frames \* height \* width must equal N, got 3 \+ 2 \* 1 \* 5 != 11"),
        ({"frame_radius": 1}, r"frame_radius=1 needs grid = \(frames, height, width\), got \(2, 4\)"),
        ({"frame_radius": 0}, "frame_radius must be an integer >= 1 or None, got 0"),
        ({"frame_radius": 1.0}, "frame_radius must be an integer >= 1 or None, got 1.0"),
        ({"frame_radius": True}, "frame_radius must be an integer >= 1 or None, got True"),
        ({"radius": 0}, "radius must be a finite number > 0, got 0"),
        ({"radius": math.nan}, "radius must be a finite number > 0, got nan"),
        ({"text_len": -1}, "text_len must be >= 0, got -1"),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, r"\(2, 3\), got torch.bool \(2, 4\)"),
        ({"text_mask": torch.ones(2, 3)}, "text_mask must be bool"),
        ({"pooled": (TENSOR[:, :2], TENSOR[:, :2])}, "pooled must be"),
        ({"pooled": (TENSOR, TENSOR[:, :, :4])}, "pooled must be"),
        ({"pooled": ()}, "pooled must be"),
        ({"pooled": (TENSOR[0, 0, 0], TENSOR[0, 0, 0])}, "pooled must be"),
        ({"value": TENSOR.to("meta")}, "value must be on the device of query, cpu, got meta"),
        ({"text_mask": torch.ones(2, 3, dtype=torch.bool, device="meta")}, "text_mask must be on the device of query"),
        (
            {"impl": "triton2"},
            r"impl must be one of \('auto', 'reference', 'masked', 'tiled', 'triton'\), got 'triton2'",
        ),
    ],
)
def test_window_attention_refuses_invalid_arguments(change, message):
    arguments = {"query": TENSOR, "key": TENSOR, "value": TENSOR, "grid": (2, 4), "radius": 2, "text_len": 3}
    with pytest.raises(ValueError, match=message):
        window_attention(**(arguments | change))


def test_windowed_attention_refuses_an_invalid_window():
    with pytest.raises(ValueError, match=r"window must be a Circle or a Box, got \(3, 3\)"):
        windowed_attention(TENSOR, TENSOR, TENSOR, grid=(1, 11), window=(3, 3))


def test_window_attention_masked_refuses_a_mask_beyond_2_to_31_entries():
    query = torch.empty(1, 1, 46342, 1, device="meta")
    options = {"grid": (1, 46341), "radius": 2, "text_len": 1}
    with pytest.raises(ValueError, match="a dense mask must have at most"):
        window_attention(query, query, query, **options, impl="masked")
    assert window_attention(query, query, query, **options).shape == query.shape
