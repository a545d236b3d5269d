"""Linear attention against all pairs in float64: outputs, gradients, precision, and the published results."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import assert_matches_reference
from torch import Tensor

from lineardit.kernels.linear import (
    features,
    log_mass,
    log_mass_reference,
    mala,
    mala_attention,
    mala_attention_reference,
    mass,
    rala,
    rala_attention,
    rala_attention_reference,
)
from lineardit.kernels.pieces.extra_key import attend_with_extra_key

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = {
    "mala": (mala_attention, mala_attention_reference),
    "rala": (rala_attention, rala_attention_reference),
}
Attention = Callable[..., Tensor]


def tokens(number: int, *, offset: float = 0) -> list[Tensor]:
    """`number` tensors [2, 2, 15, 8], tokens of a 3 x 5 grid in the memory order of a projection."""
    return [torch.randn(2, 15, 2, 8, dtype=torch.float64).transpose(1, 2) + offset for _ in range(number)]


@pytest.fixture(params=[4, 15], ids=["chunks", "one-chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK_NUMBERS", request.param * 2 * 2 * 8)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("attention", "reference"), PAIRS.values(), ids=PAIRS)
def test_linear_attention_matches_the_reference(attention: Attention, reference: Attention, dtype: torch.dtype) -> None:
    assert_matches_reference(attention, reference, tokens(3), dtype)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(("attention", "reference"), PAIRS.values(), ids=PAIRS)
def test_linear_attention_in_float64_matches_the_reference(attention: Attention, reference: Attention) -> None:
    inputs = [x.requires_grad_() for x in tokens(3)]
    assert torch.allclose(attention(*inputs), reference(*inputs), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(attention, inputs, fast_mode=True)


@pytest.mark.parametrize(("attention", "reference"), PAIRS.values(), ids=PAIRS)
def test_references_match_the_formulas_token_by_token(attention: Attention, reference: Attention) -> None:
    query, key, value = (x[0, 0] for x in tokens(3))
    phi_query, phi_key = (torch.nn.functional.elu(x) + 1 for x in (query, key))
    out = torch.zeros_like(value)
    mean_query = phi_query.mean(0)
    importance = torch.tensor([torch.dot(mean_query, phi) / 8**0.5 for phi in phi_key]).double().softmax(0)
    for i in range(15):
        scores = torch.stack([torch.dot(phi_query[i], phi) for phi in phi_key])
        if attention is mala_attention:
            scores = scores / 8**0.5
            z = scores.sum() / 15
            weights = (1 + 1 / (z + 1e-6)) * scores / 15 - z / 15
        else:
            weights = importance * scores
            weights = weights / (weights.sum() + 1e-6)
        for j in range(15):
            out[i] += weights[j] * value[j]
    assert torch.allclose(reference(*(x[None, None] for x in (query, key, value)))[0, 0], out, atol=1e-12)


@pytest.mark.parametrize(("attention", "reference"), PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_linear_attention_matches_the_published_results(attention: Attention, reference: Attention, impl: str) -> None:
    name = attention.__name__.removesuffix("_attention")
    case = {key.split(".")[1]: x.transpose(1, 2) for key, x in load_file(GOLDEN / f"{name}_op_a.safetensors").items()}
    out = attention(case["query"], case["key"], case["value"], impl=impl)
    assert (out - case["hidden_states"]).abs().max() < 1e-5 * case["hidden_states"].std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mala_attention_stays_precise_for_values_with_a_large_mean(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 1, 1, 1024, 16)
    inputs = [x.to(dtype) for x in (query, key, value + 8)]
    exact = mala_attention_reference(*(x.double() for x in inputs))
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (mala_attention(*inputs).double() - exact).abs().max() <= 2 * rounding


@pytest.mark.parametrize(("attention", "reference"), PAIRS.values(), ids=PAIRS)
def test_linear_attention_of_equal_values_is_that_value(attention: Attention, reference: Attention) -> None:
    query, key, _ = tokens(3)
    assert torch.allclose(attention(query, key, torch.full_like(key, 7.0)), torch.full_like(key, 7.0), rtol=1e-5)


@pytest.mark.parametrize(("attention", "reference"), PAIRS.values(), ids=PAIRS)
def test_linear_attention_sums_in_float32_under_autocast(attention: Attention, reference: Attention) -> None:
    inputs = [x.float() for x in tokens(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = attention(*inputs), attention(*inputs, impl="reference")
    assert torch.equal(out, attention(*inputs))
    assert torch.allclose(out, expected, atol=1e-4 * expected.abs().max().item())


def test_operators_pass_opcheck() -> None:
    inputs = [x.float().requires_grad_() for x in tokens(3)]
    torch.library.opcheck(mala.mala_op, (*inputs, 1e-6))
    torch.library.opcheck(rala.rala_op, (*inputs, 1e-6))
    torch.library.opcheck(mass._log_mass_op, (*inputs[:2], 0.3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"impl": "triton"}, r"impl must be one of \('auto', 'reference', 'torch'\)"),
        ({"eps": 0}, "eps must be > 0"),
        ({"key": torch.zeros(2, 2, 14, 8)}, "must have one shape"),
        ({"query": torch.zeros(2, 15, 8)}, "query must be floating point"),
        ({"value": torch.zeros(2, 2, 15, 8, device="meta")}, "value must be on the device of query, cpu, got meta"),
        (dict.fromkeys(("query", "key", "value"), torch.zeros(2, 2, 0, 8)), "there must be a token"),
    ],
)
def test_linear_attention_refuses_invalid_arguments(changed: dict, message: str) -> None:
    arguments = {name: torch.zeros(2, 2, 15, 8) for name in ("query", "key", "value")}
    for attention in (mala_attention, rala_attention):
        with pytest.raises(ValueError, match=message):
            attention(**{**arguments, **changed})


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.2, 1.5], ids=["normal", "spread"])
def test_log_mass_matches_the_reference(scale: float, dtype: torch.dtype) -> None:
    def of(function: Attention) -> Attention:
        # the helper compares outputs of one dtype
        return lambda query, key: function(query, key, scale=scale).to(query.dtype)

    assert_matches_reference(of(log_mass), of(log_mass_reference), tokens(2, offset=0.2), dtype)


def test_log_mass_is_accurate_for_normal_logits() -> None:
    query, key = torch.randn(2, 1, 1, 20000, 16, dtype=torch.float64)
    exact = (query[:, :, :50] @ key.mT * 0.3).logsumexp(-1)
    assert (log_mass(query, key, scale=0.3)[:, :, :50] - exact).abs().mean() < 0.02


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_log_mass_of_spread_logits_has_a_small_relative_error(scale: float) -> None:
    query, key = torch.randn(2, 1, 1, 2000, 16, dtype=torch.float64)
    exact = (query[:, :, :50] @ key.mT * scale).logsumexp(-1)  # standard deviation 4, 8, 16
    error = log_mass(query, key, scale=scale)[:, :, :50] - exact
    assert error.mean().abs() < 0.05 * exact.mean()
    assert error.abs().mean() < 0.1 * exact.mean()


def test_log_mass_of_one_key_is_its_logit() -> None:
    query, key = torch.randn(2, 1, 2, 1, 8, dtype=torch.float64, requires_grad=True)
    out = log_mass(query, key, scale=0.5)
    assert torch.allclose(out, (query * key).sum(-1) * 0.5)
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert torch.allclose(gradient, key * 0.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attend_with_extra_key_matches_one_softmax(masked: bool, dtype: torch.dtype) -> None:
    query, image_out = tokens(2)
    text_key, text_value = (x[:, :, :4] for x in tokens(2))
    text_mask = torch.tensor([[True, False, True, True], [False] * 4]) if masked else None
    log_mass = torch.randn(2, 2, 15, dtype=torch.float64) + 1

    def by_hand(*inputs: Tensor) -> Tensor:
        query, text_key, text_value, log_mass, image_out = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in inputs
        )
        logits = query @ text_key.mT * 0.4
        if text_mask is not None:
            logits = logits.masked_fill(~text_mask[:, None, None], -torch.inf)
        weights = torch.cat([logits, log_mass[..., None]], -1).softmax(-1)
        return (weights[..., :-1] @ text_value + weights[..., -1:] * image_out).to(inputs[0].dtype)

    def joined(*inputs: Tensor) -> Tensor:
        return attend_with_extra_key(*inputs, mask=text_mask, scale=0.4)

    inputs = [query, text_key, text_value, log_mass, image_out]
    assert_matches_reference(joined, by_hand, inputs, dtype)
    if masked:
        assert torch.equal(joined(*inputs)[1], image_out[1])


def test_attend_with_extra_key_handles_products_beyond_float16() -> None:
    """As softmax attention does: queries and keys without a norm have such products, as in Stable Diffusion 2."""
    query = key = torch.full((1, 1, 1, 64), 40.0, dtype=torch.float16)  # product 102,400, logit an eighth of it
    value, extra = torch.randn(2, 1, 1, 1, 64).half()
    logit = torch.tensor([[[12_801.0]]])
    out = attend_with_extra_key(query, key, value, logit, extra, scale=64**-0.5)
    share = torch.sigmoid(torch.tensor(1.0))
    torch.testing.assert_close(out.float(), torch.lerp(value.float(), extra.float(), share), atol=2e-3, rtol=2e-3)
