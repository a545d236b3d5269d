"""Hybrids: the formula, the local branch bit for bit at gate 0, exactness, settings, files and commands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, scaled_dot_product_attention

from lineardit.cli import run as run_command
from lineardit.commands.method_options import split_arguments
from lineardit.kernels.agent import agent_attention_reference
from lineardit.kernels.focus.rest_of_cells import rest_of_cells
from lineardit.kernels.linear import mala_attention_reference
from lineardit.kernels.window import Circle
from lineardit.linearize import linearize_
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods import (
    METHODS,
    Agent,
    Clear,
    Hybrid,
    LinFusion,
    Mala,
    Neighborhood,
    ProxyTokens,
    Rala,
    SlidingTile,
    config_from_dict,
    config_to_dict,
)
from lineardit.linearize.methods.hybrid import HybridAttention
from tiny_models import build

GRID, TEXT_LEN, SCALE = (5, 6), 3, 0.6
FLUX_DEV = Path(__file__).parents[1] / "data" / "flux1-dev"  # configuration in its true shape, no weights
BRANCHES = [
    Hybrid(local=Clear(radius=2), global_=Agent(num_agents=4)),
    Hybrid(local=Neighborhood(window=3), global_=Mala(conv_size=3, gate=True)),
    Hybrid(local=SlidingTile(tile=2, window=1), global_=Rala(), join="gate"),
    Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4)),
    Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), mass_cells=6),
]


def kernel_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The attention module for 2 heads of 8, after observing the grid."""
    kernel = METHODS[type(config)](config, num_heads=2, head_dim=8).to(dtype)
    kernel.prepare_for(GRID)
    return kernel


def tokens(text_len: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, key and value, [2, 2, text_len + 30, 8]."""
    return [torch.randn(2, 2, text_len + 30, 8).to(dtype) for _ in range(3)]


def masked(text_len: int) -> Tensor | None:
    return torch.tensor([[True, False, True], [False] * 3]) if text_len > 0 else None


@pytest.mark.parametrize("impl", ["auto", "masked", "tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text_len", [0, TEXT_LEN])
@pytest.mark.parametrize("config", BRANCHES, ids=str)
def test_closed_gate_gives_the_local_branch_bit_for_bit(
    config: Hybrid, text_len: int, dtype: torch.dtype, impl: str
) -> None:
    hybrid, local = kernel_of(config, dtype), kernel_of(config.local, dtype)
    hybrid.impl = local.impl = impl
    inputs, layout = tokens(text_len, dtype), Layout(GRID, text_len, True, masked(text_len))
    assert torch.equal(hybrid(*inputs, layout), local(*inputs, layout))


@pytest.mark.parametrize("join", ["mass", "gate"])
@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("global_", [Agent(num_agents=4), Mala()], ids=str)
def test_hybrid_matches_the_formula(global_: Any, text_first: bool, join: str) -> None:
    kernel = kernel_of(Hybrid(local=Clear(radius=2), global_=global_, join=join, mass_cells=4))
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    text, image = ([torch.randn(2, 2, count, 8, dtype=torch.float64) for _ in range(3)] for count in (TEXT_LEN, 30))
    mask = masked(TEXT_LEN)
    assert mask is not None
    inputs = [torch.cat((a, b) if text_first else (b, a), 2) for a, b in zip(text, image, strict=True)]
    out = kernel(*inputs, Layout(GRID, TEXT_LEN, text_first, mask), scale=SCALE)

    query, key, value = image
    positions = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij"), -1).flatten(0, 1)
    in_window = (positions[:, None] - positions).square().sum(-1) < 4
    text_logits = (query @ text[1].mT * SCALE).masked_fill(~mask[:, None, None], -torch.inf)
    window_logits = (query @ key.mT * SCALE).masked_fill(~in_window, -torch.inf)
    logits = torch.cat([text_logits, window_logits], -1)
    local = logits.softmax(-1) @ torch.cat([text[2], value], 2)
    rest = _means(query), key, value
    if isinstance(global_, Agent):
        far = agent_attention_reference(
            query, key, value, rest[0], scale=SCALE, second_scale=SCALE, shortcut=0, key_bias=None, query_bias=None
        )
    else:
        far = mala_attention_reference(query, key, value)
    share = kernel.gate[:, None, None]
    if join == "mass":
        rest = rest_of_cells(GRID, Circle(radius=2), 4, torch.device("cpu")).everywhere()
        image_mass = ((query @ _means(key).mT * SCALE).exp() * rest).sum(-1, keepdim=True)
        image_mass = image_mass * kernel.balance.exp()[:, None, None]
        share = share * image_mass / (image_mass + logits.exp().sum(-1, keepdim=True))
    expected = local + share * (far - local)
    assert torch.allclose(out[:, :, TEXT_LEN:] if text_first else out[:, :, :30], expected, atol=1e-8)


def _means(tokens: Tensor) -> Tensor:
    """Means over 2 x 2 cells of the grid, [2, 2, 30, 8] -> [2, 2, 4, 8]."""
    return adaptive_avg_pool2d(tokens.mT.reshape(2, 16, *GRID), (2, 2)).reshape(2, 2, 8, 4).mT


def test_open_gate_approximates_full_softmax_for_constant_cells() -> None:
    """Keys and values are constant within each cell, and the window holds only the query's own token."""
    kernel = kernel_of(Hybrid(local=Clear(radius=1), global_=ProxyTokens(num_proxies=4), gate=1.0))
    grid, text_len = (20, 20), 2
    kernel.prepare_for(grid)
    cells = torch.randn(3, 1, 2, 2, 2, 8, dtype=torch.float64) / 2
    image = cells.repeat_interleave(10, 3).repeat_interleave(10, 4).flatten(3, 4)
    text = torch.randn(3, 1, 2, text_len, 8, dtype=torch.float64)
    inputs = list(torch.cat([text, image], 3))
    out = kernel(*inputs, Layout(grid, text_len, True, None), scale=1.0)
    expected = scaled_dot_product_attention(*inputs, scale=1.0)
    closed = kernel.local(*inputs, Layout(grid, text_len, True, None), scale=1.0)
    error, local_error = ((x - expected).norm() / expected.norm() for x in (out, closed))
    assert error < 0.03
    assert local_error > 0.3


@pytest.mark.parametrize("text_len", [0, TEXT_LEN])
def test_proxy_tokens_and_window_share_one_softmax(text_len: int) -> None:
    """All parameters are random, and text is partly masked."""
    kernel = kernel_of(Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4)))
    for parameter in kernel.parameters():
        torch.nn.init.normal_(parameter)
    inputs, layout = tokens(text_len), Layout(GRID, text_len, True, masked(text_len))
    out = kernel(*inputs, layout, scale=SCALE)
    local, lse = kernel.local.attend_and_lse(*inputs, layout, scale=SCALE)
    query, key, value = (x[:, :, text_len:] for x in inputs)
    attended = (_means(query) @ _means(key).mT * SCALE).softmax(-1) @ _means(value)
    proxy_value = _means(value) + kernel.global_.gate[:, None, None] * (attended - _means(value))
    rest = rest_of_cells(GRID, Circle(radius=2), 4, torch.device("cpu")).everywhere()
    weights = (query @ _means(key).mT * SCALE + kernel.balance[:, None, None]).exp() * rest
    mass = lse.exp()[..., None]
    joined = (weights @ proxy_value + mass * local[:, :, text_len:]) / (weights.sum(-1, keepdim=True) + mass)
    expected = torch.lerp(local[:, :, text_len:], joined, kernel.gate[:, None, None].expand_as(joined))
    assert torch.allclose(out[:, :, text_len:], expected, atol=1e-8)
    assert torch.equal(out[:, :, :text_len], local[:, :, :text_len])


@pytest.mark.parametrize("impl", ["masked", "tiled"])
@pytest.mark.parametrize(
    "local", [Clear(radius=2), Neighborhood(window=3, dilation=2), SlidingTile(tile=2, window=1)], ids=str
)
def test_hybrid_with_one_proxy_per_token_matches_full_softmax(local: Any, impl: str) -> None:
    kernel = kernel_of(Hybrid(local=local, global_=ProxyTokens(num_proxies=30), gate=1.0))
    kernel.impl = impl
    inputs = tokens(TEXT_LEN)
    out = kernel(*inputs, Layout(GRID, TEXT_LEN, True, None), scale=SCALE)
    assert torch.allclose(out, scaled_dot_product_attention(*inputs, scale=SCALE), atol=1e-6)


def test_num_cells_defaults_to_the_proxies_agents_or_64() -> None:
    for global_, count in ((ProxyTokens(num_proxies=9), 9), (Agent(num_agents=10), 10), (Mala(), 64)):
        assert Hybrid(local=Clear(radius=2), global_=global_).num_cells == count
        assert Hybrid(local=Clear(radius=2), global_=global_, mass_cells=5).num_cells == 5


def test_hybrid_with_a_covering_window_matches_full_softmax() -> None:
    for join in ("mass", "gate"):
        kernel = kernel_of(Hybrid(local=Clear(radius=9), global_=Mala(), join=join, gate=0.7))
        inputs, layout = tokens(TEXT_LEN), Layout(GRID, TEXT_LEN, True, None)
        assert kernel.is_exact(layout)
        kernel.impl = "tiled"
        assert torch.allclose(kernel(*inputs, layout), scaled_dot_product_attention(*inputs))
        assert not kernel.is_exact(Layout((20, 20), TEXT_LEN, True, None))


@pytest.mark.parametrize("config", BRANCHES, ids=str)
def test_gradient_reaches_the_closed_gate(config: Hybrid) -> None:
    kernel = kernel_of(config)
    kernel(*tokens(TEXT_LEN), Layout(GRID, TEXT_LEN, True, None)).square().sum().backward()
    assert kernel.gate.grad.abs().min() > 0


def test_hybrid_impl_is_set_on_the_branches_that_support_it() -> None:
    kernel = kernel_of(BRANCHES[0])
    assert kernel.implementations() == kernel.local.implementations()
    for name, agent_impl in {"tiled": "auto", "reference": "reference", "auto": "auto"}.items():
        kernel.impl = name
        assert (kernel.impl, kernel.local.impl, kernel.global_.impl) == (name, name, agent_impl)


def test_hybrid_pairs_sum_both_branches_and_count_text_once() -> None:
    shape = {"num_heads": 2, "head_dim": 8}
    for config in BRANCHES:
        local = METHODS[type(config.local)].pairs(config.local, GRID, TEXT_LEN, **shape)
        far = METHODS[type(config.global_)].pairs(config.global_, GRID, 0, **shape)
        weighing = 30 * config.num_cells if config.join == "mass" and not config.is_one_softmax else 0
        assert METHODS[Hybrid].pairs(config, GRID, TEXT_LEN, **shape) == local + far + weighing


def test_hybrid_mixes_frames_through_the_global_branch() -> None:
    """Each frame's window holds only that frame, so any effect of the other is from the global branch."""
    kernel = METHODS[Hybrid](
        Hybrid(local=Clear(radius=9, frame_radius=1), global_=Agent(num_agents=4), gate=1), num_heads=2, head_dim=8
    ).double()
    layout = Layout((2, 3, 5), 0, True, None)
    kernel.prepare_for(layout.grid)
    query, key, value = tokens(0)
    later = torch.cat([value[:, :, :15], value[:, :, 15:] + 1], 2)
    assert torch.equal(*(kernel.local(query, key, x, layout)[:, :, :15] for x in (value, later)))
    change = kernel(query, key, later, layout) - kernel(query, key, value, layout)
    assert change[:, :, :15].abs().min() > 1e-3


@pytest.mark.parametrize("config", BRANCHES, ids=str)
def test_config_round_trips_through_json(config: Hybrid) -> None:
    entries = config_to_dict(config)
    assert entries["local"]["method"] == type(config.local).__name__.lower()
    assert "global_" not in entries
    assert config_from_dict(json.loads(json.dumps(entries))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local": Mala()}, "local must be a config of Clear, Neighborhood, SlidingTile, got Mala"),
        ({"local": None}, "local must be a config of"),
        ({"local": Clear(radius=2, pool_tokens=4)}, "local must have no pooled tokens"),
        ({"global_": Clear(radius=2)}, "global must be a config of Agent, Mala, Rala, ProxyTokens, got Clear"),
        ({"global_": LinFusion()}, "global must be a config of"),
        ({"global_": Mala(balance=True)}, "global must not have balance"),
        ({"join": "sum"}, "join must be one of mass, gate, got 'sum'"),
        ({"gate": True}, "gate must be a finite number"),
        ({"gate": float("nan")}, "gate must be a finite number"),
        ({"mass_cells": 0}, "mass_cells must be an integer >= 1 or None, got 0"),
    ],
)
def test_hybrid_refuses_invalid_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hybrid(**{"local": Clear(radius=2), "global_": Mala(), **change})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"local": {"method": "clear", "radius": 2}}, "lacks required settings: global$"),
        ({"local": "clear", "global": {"method": "mala"}}, "a method must look like"),
        ({"local": {"method": "clear", "raduis": 2}, "global": {"method": "mala"}}, r"did you mean radius\?"),
        ({"local": {"method": "clear", "radius": 2}, "globol": {"method": "mala"}}, r"did you mean global\?"),
    ],
)
def test_config_from_dict_refuses_invalid_branches(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"method": "hybrid", **entries})


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("mala", {"method": "mala"}),
        ("clear:radius=8", {"method": "clear", "radius": 8}),
        ("neighborhood:window=[7,9],dilation=2", {"method": "neighborhood", "window": [7, 9], "dilation": 2}),
        ("proxytokens:num-proxies=64", {"method": "proxytokens", "num_proxies": 64}),
        ('{"method": "clear", "radius": 8}', {"method": "clear", "radius": 8}),
    ],
)
def test_split_arguments_parses_a_method_as_a_setting(text: str, method: dict[str, Any]) -> None:
    options, others = split_arguments(["--local", text, "BASE"], {"local"}, frozenset({"local"}))
    assert options == {"local": method}
    assert others == ["BASE"]
    with pytest.raises(ValueError, match="METHOD:SETTING=VALUE"):
        split_arguments([f"--local={text.partition(':')[0].strip('{')}:x"], {"local"}, frozenset({"local"}))


def test_convert_takes_a_hybrid(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    branches = ["--local", "clear:radius=8", "--global=agent:num-agents=64", "--mass-cells", "16"]
    arguments = ["convert", str(FLUX_DEV), "--method", "hybrid", *branches, "--offline", "-o", str(adapter)]
    assert run_command(arguments) == 0
    methods = json.loads((adapter / "lineardit.json").read_text())["methods"]
    expected = Hybrid(local=Clear(radius=8), global_=Agent(num_agents=64), mass_cells=16)
    assert {config_from_dict(method) for method in methods.values()} == {expected}


def test_report_prints_both_branches_in_command_line_syntax() -> None:
    report = linearize_(build("flux"), Hybrid(local=Neighborhood(window=(3, 5)), global_=Mala(gate=True)))
    assert "x Hybrid(local=neighborhood:window=[3,5], global=mala:gate=true)" in str(report)
    options, _ = split_arguments(["--global=mala:gate=true"], {"global"}, frozenset({"global"}))
    assert config_from_dict(options["global"]) == Mala(gate=True)


@pytest.mark.parametrize(
    ("local", "num_proxies", "grid", "expected"),
    [
        (Clear(radius=4), 256, (128, 128), "reaches 4 tokens, and each proxy covers 8 x 8 tokens"),
        (Clear(radius=8), 1024, (256, 512), "reaches 8 tokens, and each proxy covers 16 x 8 tokens"),
        (Clear(radius=16), 64, (16, 1024), "16 x 16"),  # the window spans the height
        (Neighborhood(window=9), 64, (64, 64), "reaches 4"),
        (Neighborhood(window=(33, 3)), 256, (64, 64), "reaches 1 tokens"),
        (Neighborhood(window=(3, 33)), 256, (64, 64), "reaches 1 tokens"),
        (Neighborhood(window=33, dilation=2), 1024, (64, 64), "reaches 0"),
        (SlidingTile(tile=16, window=1), 1024, (64, 64), "reaches 0"),
        (SlidingTile(tile=2, window=3), 64, (8, 64, 64), "reaches 2 tokens, and each proxy covers 8 x 8 tokens"),
        (Clear(radius=8), 1024, (128, 128), None),
        (Clear(radius=33), 1, (32, 32), None),
        (Neighborhood(window=33), 16, (32, 32), None),
        (Neighborhood(window=(33, 17)), 64, (32, 64), None),
        (Clear(radius=1), 256, (16, 16), None),  # every token is its own proxy
    ],
    ids=str,
)
def test_advice_is_given_where_proxy_cells_exceed_the_window_reach(
    local: Any, num_proxies: int, grid: tuple[int, ...], expected: str | None
) -> None:
    advice = HybridAttention.advice(Hybrid(local=local, global_=ProxyTokens(num_proxies=num_proxies)), grid)
    assert advice is None if expected is None else advice is not None and expected in advice
    assert HybridAttention.advice(Hybrid(local=local, global_=Mala()), grid) is None


NO_FOCUS = Hybrid(local=Clear(radius=64), global_=ProxyTokens(num_proxies=256), gate=1.0, focus_tokens=200)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (
            (256, 256),
            "focus_tokens=200 has no effect at 256 x 256 tokens: only whole cells are in focus, and one of 256 has",
        ),
        ((4, 128, 128), "at 4 x 128 x 128 tokens"),
        ((128, 128), None),
        ((40, 40), None),
    ],
    ids=str,
)
def test_advice_is_given_where_focus_tokens_has_no_effect(grid: tuple[int, ...], expected: str | None) -> None:
    advice = HybridAttention.advice(NO_FOCUS, grid)
    assert advice is None if expected is None else advice is not None and expected in advice
    covering = replace(NO_FOCUS, local=Clear(radius=400))  # no token is outside the window
    assert HybridAttention.advice(covering, grid) is None


def test_grid_without_focus_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    kernels = [METHODS[Hybrid](NO_FOCUS, num_heads=2, head_dim=8) for _ in range(2)]
    for kernel in kernels:
        kernel.prepare_for((250, 260))
        kernel.prepare_for((40, 40))
    assert [record.message.count("set focus_tokens to 254 or more") for record in caplog.records] == [1]
