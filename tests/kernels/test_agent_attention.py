"""Agent attention against explicit weights in float64, and the published result."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tolerance import assert_matches_reference
from torch import Tensor

from lineardit.kernels.agent import agent_attention, agent_attention_reference, agent_bias

GOLDEN = Path(__file__).parents[1] / "golden" / "agent_op_a.safetensors"


def inputs() -> list[Tensor]:
    """query, key, value on a 3 x 5 grid, and 4 agents."""
    return [torch.randn(2, count, 2, 8, dtype=torch.float64).transpose(1, 2) for count in (15, 15, 15, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"scale": 0.2, "second_scale": 0.7, "shortcut": 0.1}], ids=["plain", "all"])
def test_agent_attention_matches_the_reference(settings: dict[str, float], dtype: torch.dtype) -> None:
    def attention(*tensors: Tensor) -> Tensor:
        return agent_attention(*tensors, **settings)

    def reference(*tensors: Tensor) -> Tensor:
        # the agents' values are rounded between the two softmaxes
        query, key, value, agents = tensors
        second = {name: number for name, number in settings.items() if name == "second_scale"}
        first = {name: number for name, number in settings.items() if name == "scale"}
        gathered = _softmax(agents, key, first.get("scale", 8**-0.5)) @ _wide(value)
        weights = _softmax(query, agents, second.get("second_scale", first.get("scale", 8**-0.5)))
        out = weights @ gathered.to(value.dtype).to(weights.dtype)
        return (out + settings.get("shortcut", 0) * _wide(value)).to(value.dtype)

    # two softmaxes in sequence; the order of their sums depends on the CPU
    assert_matches_reference(attention, reference, inputs(), dtype, roundings=6)


def _softmax(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return (_wide(query) @ _wide(key).mT * scale).softmax(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def test_agent_attention_with_biases_matches_the_reference() -> None:
    query, key, value, agents = inputs()
    key_bias, query_bias = torch.randn(2, 4, 15).double(), torch.randn(2, 15, 4).double()

    def attention(*tensors: Tensor) -> Tensor:
        return agent_attention(*tensors[:4], key_bias=tensors[4], query_bias=tensors[5])

    def reference(*tensors: Tensor) -> Tensor:
        return agent_attention_reference(*tensors[:4], key_bias=tensors[4], query_bias=tensors[5])

    tensors = [query, key, value, agents, key_bias, query_bias]
    assert_matches_reference(attention, reference, tensors, torch.float64)
    assert not torch.allclose(attention(*tensors), agent_attention(*tensors[:4]), atol=1e-3)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_agent_attention_matches_the_published_result(impl: str) -> None:
    with safe_open(GOLDEN, "pt") as file:
        case = {key.split(".")[1]: file.get_tensor(key).transpose(1, 2) for key in file.keys()}  # noqa: SIM118
        settings = {key: json.loads(text) for key, text in file.metadata().items()}
    query, key, value, agents = (case[name] for name in ("query", "key", "value", "agents"))
    second_scale = query.shape[-1] ** (-0.5 * settings["second_scale_exponent"])
    out = agent_attention(
        query, key, value, agents, second_scale=second_scale, shortcut=settings["shortcut"], impl=impl
    )
    assert (out - case["hidden_states"]).abs().max() < 1e-5 * case["hidden_states"].std()


@pytest.mark.parametrize("name", ["query", "key", "agents", "impl"])
def test_agent_attention_refuses_invalid_arguments(name: str) -> None:
    query, key, value, agents = inputs()
    arguments = {"query": query, "key": key, "value": value, "agents": agents, "impl": "auto"}
    invalid = {"query": query[0], "key": key[:, :, 1:], "agents": agents[:, :, :0], "impl": "triton"}
    messages = {"query": "query must be", "key": "one shape", "agents": "agents must be", "impl": "impl must be one of"}
    with pytest.raises(ValueError, match=messages[name]):
        agent_attention(**{**arguments, name: invalid[name]})


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("name", "bias"),
    [
        ("key_bias", torch.zeros(15)),
        ("key_bias", torch.zeros(4, 15, dtype=torch.bool)),
        ("query_bias", torch.zeros(4, 15)),
        ("query_bias", torch.zeros(1, 1, 1, 15, 4)),
        ("query_bias", torch.zeros(15, 4, device="meta")),
    ],
)
def test_agent_attention_refuses_invalid_biases(name: str, bias: Tensor, impl: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        agent_attention(*inputs(), impl=impl, **{name: bias})


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_agent_attention_has_the_dtype_of_autocast(impl: str) -> None:
    tensors = [x.float() for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        out = agent_attention(*tensors, shortcut=0.1, impl=impl)
    assert out.dtype == torch.bfloat16


def test_agent_bias_operators_pass_opcheck() -> None:
    table = torch.randn(2, 3, 3, requires_grad=True)
    torch.library.opcheck(agent_bias.agent_bias, (table, 30, 3, 5, 8))
    torch.library.opcheck(agent_bias._bias_backward, (torch.randn(2, 8, 30), table.detach(), 3, 5))


def test_agent_bias_and_its_gradient_stay_float32_under_autocast() -> None:
    results = []
    for autocast in (False, True):
        table = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            bias = agent_bias.agent_bias(table, 30, 3, 5, 8)
            (grad,) = torch.autograd.grad(bias.square().sum(), table)
        results.append((bias, grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
