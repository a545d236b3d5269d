"""Attention profiles against loops over the base's own calls, and budgets against brute force."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_distill import build_tiny
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from lineardit.linearize import Agent, Clear, LinFusion, Mala, Proposal, linearize_, profile_attention, propose, swapped
from lineardit.linearize.measures import probe as probe_module
from lineardit.linearize.measures.attention_profile import LayerProfile, Profile, read_profile
from lineardit.linearize.measures.budget import describe_choice, knapsack, parse_budget, parse_choices
from lineardit.linearize.measures.profiling import probed
from lineardit.linearize.methods import METHODS as kernels_of_methods
from lineardit.linearize.methods import ClearAttention, Hybrid, ProxyTokens
from tiny_models import FAMILIES, build, inputs_of, run

RADII = (1.5, 2, 3.2)
GRID, TEXT_LEN = (5, 7), 3
GRIDS = {math.prod(grid): grid for grid in (GRID, (3, 4), (2, 2))}  # the levels of a UNet
TEXT_FIRST = {"flux": True, "sd3": False, "unet": True}


class Recorder(TorchFunctionMode):
    """Keeps what each self-attention module of an unconverted model passes to softmax attention."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.module = ""
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "module", name))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        if func is scaled_dot_product_attention and given["query"].shape == given["key"].shape:
            self.calls[self.module] = (given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


def loops(call: tuple[Tensor, Tensor, Tensor], text_first: bool) -> dict[str, Tensor]:
    """mass [H, R], text [H], distance [H], error [R] of [B, H, N, D], query by query in float64."""
    query, key, value = (x.double() for x in call)
    batch, heads, num_tokens, head_dim = query.shape
    text_len = TEXT_LEN if num_tokens - TEXT_LEN in GRIDS else 0
    _, width = GRIDS[num_tokens - text_len]
    image = range(text_len, num_tokens) if text_first else range(num_tokens - text_len)
    places = {token: divmod(index, width) for index, token in enumerate(image)}
    mass, text, distance = torch.zeros(heads, len(RADII)), torch.zeros(heads), torch.zeros(heads)
    error, norm = torch.zeros(len(RADII)), 0.0
    for b, h, i in itertools.product(range(batch), range(heads), image):
        scores = (query[b, h, i] * key[b, h]).sum(-1) / math.sqrt(head_dim)
        weights = scores.exp() / scores.exp().sum()
        distances = [math.dist(places[i], places[j]) if j in places else -1.0 for j in range(num_tokens)]
        out = (weights[:, None] * value[b, h]).sum(0)
        norm += float(out.square().sum())
        text[h] += sum(weights[j] for j in range(num_tokens) if j not in places)
        distance[h] += sum(weights[j] * distances[j] for j in places)
        for r, radius in enumerate(RADII):
            in_window = torch.tensor([distances[j] < radius for j in range(num_tokens)])
            mass[h, r] += sum(weights[j] for j in places if distances[j] < radius)
            seen = weights * in_window / (weights * in_window).sum()
            error[r] += ((seen[:, None] * value[b, h]).sum(0) - out).square().sum()
    count = batch * len(image)
    return {"mass": mass / count, "text": text / count, "distance": distance / (count - text), "error": error / norm}


@pytest.mark.parametrize("entries", [probe_module.MAX_ENTRIES, 2000])
@pytest.mark.parametrize("family", TEXT_FIRST)
def test_probe_matches_loops(family: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "MAX_ENTRIES", entries)
    model, arguments = build(family), inputs_of(family, grid=GRID, text_len=TEXT_LEN)
    generator = torch.Generator().manual_seed(0)
    with probed(model, RADII, num_queries=10**6, generator=generator) as probes:
        out = run(model, arguments)
    with Recorder({name: model.get_submodule(name) for name in probes}) as recorder:
        base = run(model, arguments)
    assert torch.allclose(out, base, atol=1e-5)
    for name, probe in probes.items():
        expected, sums = loops(recorder.calls[name], TEXT_FIRST[family]), probe.sums
        actual = {
            "mass": sums.mass / sums.queries,
            "text": sums.text / sums.queries,
            "distance": sums.distance / (sums.queries - sums.text),
            "error": sums.error / sums.norm,
        }
        for figure in expected:
            assert torch.allclose(actual[figure].float(), expected[figure], atol=1e-5), (name, figure)


@pytest.mark.parametrize("family", FAMILIES)
def test_probed_model_gives_the_base_output_and_is_restored(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    with probed(model, RADII, num_queries=4, generator=torch.Generator().manual_seed(0)) as probes:
        assert torch.allclose(run(model, arguments), base, atol=1e-5)
        assert all(probe.sums.queries == 4 * 2 for probe in probes.values())
        inside = [(probe.sums.mass[:, -1] + probe.sums.text) / probe.sums.queries for probe in probes.values()]
        assert all((shares <= 1 + 1e-5).all() for shares in inside)
    assert not swapped(model)
    assert torch.equal(run(model, arguments), base)


def test_probe_ignores_masked_text() -> None:
    query, key, value = torch.randn(3, 2, 2, 3 + 12, 8)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    layout = probe_module.Layout((3, 4), 3, True, mask)
    one = _probe()
    one(query, key, value, layout)
    other = key.clone()
    other[0, :, 1], other[1, :, 2] = 100, -100
    two = _probe()
    two(query, other, value, layout)
    assert torch.equal(one.sums.text, two.sums.text)
    assert torch.equal(one.sums.error, two.sums.error)


def _probe() -> probe_module.Probe:
    shape = {"num_heads": 2, "head_dim": 8, "num_queries": 99}
    return probe_module.Probe(RADII, generator=torch.Generator(), call_counter=itertools.count(), **shape)


def _profile(**changes: Any) -> Profile:
    call: dict[str, Any] = {"size": (24, 32), "radii": RADII, "steps": 2, "max_sequence_length": 8}
    return profile_attention(build_tiny(), ["a red circle", "a blue cross"], **{**call, **changes})


METHODS = (
    Clear(radius=2),
    Mala(),
    Agent(num_agents=4, conv_size=3, balance=True),
    Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), gate=1.0),
)


@pytest.mark.parametrize("entries", [probe_module.MAX_ENTRIES, 2000])
@pytest.mark.parametrize("family", TEXT_FIRST)
def test_probe_error_matches_converting_one_layer(family: str, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of converting this layer alone, on its inputs in the base."""
    monkeypatch.setattr(probe_module, "MAX_ENTRIES", entries)
    model, arguments = build(family), inputs_of(family, grid=GRID, text_len=TEXT_LEN)
    generator = torch.Generator().manual_seed(0)
    with probed(model, RADII, METHODS, num_queries=10**6, generator=generator) as probes:
        run(model, arguments)
    name = min(probes, key=lambda name: probes[name].first_call)
    error = probes[name].sums.error / probes[name].sums.norm
    assert torch.allclose(error[len(RADII)], error[RADII.index(2)], atol=1e-6)  # the same window both ways
    layer = model.get_submodule(name)
    layer.to_out[0], layer.residual_connection = nn.Identity(), False
    outs: list[Tensor] = []
    layer.register_forward_hook(
        lambda _module, _args, out: outs.append((out[0] if isinstance(out, tuple) else out).double())
    )
    run(model, arguments)
    for index, method in enumerate(METHODS, start=len(RADII)):
        linearize_(model, method, layers=name)
        run(model, arguments)
        expected = (outs[-1] - outs[0]).square().sum() / outs[0].square().sum()
        assert expected > 0.001 and torch.allclose(error[index], expected, rtol=1e-4)


def test_profile_attention_merges_windows_into_radii_and_drops_duplicates() -> None:
    profile = _profile(methods=(Mala(), Clear(radius=2.5), Clear(radius=2), Mala()))
    assert (profile.radii, profile.methods) == ((1.5, 2, 2.5, 3.2), (Mala(),))
    assert all(len(layer.output_error) == 5 for layer in profile.layers)


def test_profile_attention_refuses_unsupported_methods() -> None:
    with pytest.raises(ValueError, match=r"LinFusion.* cannot be profiled layer by layer"):
        _profile(methods=(LinFusion(),))
    with pytest.raises(ValueError, match="expected a method config"):
        _profile(methods=("mala",))


def test_profile_attention_lists_layers_in_forward_order() -> None:
    names = [layer.module for layer in _profile().layers]
    assert names == ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]


def test_profile_attention_is_reproducible_and_round_trips(tmp_path: Path) -> None:
    profile = _profile(queries=5, methods=METHODS[1:])
    assert profile == _profile(queries=5, methods=METHODS[1:])
    assert profile != _profile(queries=5, methods=METHODS[1:], seed=1)
    profile.write(tmp_path / "profile.json")
    assert read_profile(tmp_path / "profile.json") == profile
    assert profile.layers[0].grid == (6, 8) and profile.layers[0].text_len == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"radii": ()}, "radii must hold at least one"),
        ({"radii": (-1,)}, "radius must be > 0"),
        ({"queries": 0}, "queries must be >= 1"),
    ],
)
def test_profile_attention_refuses_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _profile(**changes)


def test_profile_attention_refuses_a_converted_pipeline() -> None:
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=2))
    with pytest.raises(ValueError, match="original pipeline"):
        profile_attention(pipe, ["a red circle"], size=(24, 32))


ITEMS = st.integers(1, 4).flatmap(
    lambda options: st.lists(
        st.tuples(
            st.lists(st.integers(1, 20), min_size=options, max_size=options),
            st.lists(st.integers(0, 9), min_size=options, max_size=options),
        ),
        min_size=1,
        max_size=5,
    )
)


@given(items=ITEMS, spare=st.integers(0, 40))
def test_knapsack_matches_brute_force(items: list[tuple[list[int], list[int]]], spare: int) -> None:
    costs, errors = [list(column) for column in zip(*items, strict=True)]
    limit = sum(map(min, costs)) + spare
    chosen = knapsack(costs, errors, limit)

    def total(table: list[list[int]], options: tuple[int, ...] | list[int]) -> int:
        return sum(row[option] for row, option in zip(table, options, strict=True))

    selections = itertools.product(*(range(len(row)) for row in costs))
    least = min(total(errors, options) for options in selections if total(costs, options) <= limit)
    assert total(costs, chosen) <= limit
    assert total(errors, chosen) == least


def _profile_with(*errors: tuple[float, ...]) -> Profile:
    """A profile of 16 x 16 image tokens and 10 text tokens."""
    layers = tuple(
        LayerProfile(
            module=f"blocks.{index}.attn",
            grid=(16, 16),
            text_len=10,
            head_dim=8,
            mass=((0.5,) * 3,) * 2,
            text=(0.1,) * 2,
            distance=(3.0,) * 2,
            output_error=one,
        )
        for index, one in enumerate(errors)
    )
    numbers: dict[str, Any] = {"prompts": 1, "steps": 1, "queries": 1, "seed": 0}
    return Profile(
        base="/base",
        revision=None,
        model_class="Model",
        size=(256, 256),
        radii=(2, 4, 8),
        layers=layers,
        versions={},
        **numbers,
    )


WINDOWS = (Clear(radius=2), Clear(radius=4), Clear(radius=8))
ERRORS = ((0.9, 0.5, 0.1), (0.9, 0.8, 0.7), (0.01, 0.005, 0.001), (0.3, 0.01, 0.001))


def test_propose_beats_a_uniform_window_within_the_budget() -> None:
    proposal = propose(_profile_with(*ERRORS), Clear(radius=4))
    uniform = sum(error[1] for error in ERRORS)
    assert proposal.error < uniform
    assert proposal.flops <= proposal.budget == 4 * _flops((16, 16), 4)
    assert proposal.chosen["blocks.2.attn"] == Clear(radius=2)
    assert proposal.configs.keys() <= {f"blocks.{index}.attn" for index in range(4)} | {"blocks.*.attn"}


def _flops(grid: tuple[int, int], radius: float) -> int:
    return 4 * ClearAttention.pairs(Clear(radius=radius), grid, 10, num_heads=2, head_dim=8) * 2 * 8


def test_propose_counts_operations_at_the_given_size() -> None:
    proposal = propose(_profile_with(*ERRORS), Clear(radius=4), size=(512, 384))
    assert proposal.budget == 4 * _flops((32, 24), 4)
    assert proposal.dense_flops == 4 * 4 * (32 * 24 + 10) ** 2 * 2 * 8


def test_propose_counts_no_text_queries_where_text_has_only_keys() -> None:
    profile = replace(_profile_with(*ERRORS), model_class="PRXTransformer2DModel")
    assert propose(profile, Clear(radius=4)).dense_flops == 4 * 4 * 256 * (256 + 10) * 2 * 8


def test_propose_keeps_full_attention_only_where_choices_allow_it() -> None:
    profile = _profile_with(*ERRORS)
    assert propose(profile, 0.9).chosen["blocks.1.attn"] is None
    assert "blocks.1.attn" not in propose(profile, 0.9).configs
    assert None not in propose(profile, 0.9, choices=profile.candidates).chosen.values()
    assert set(propose(profile, 0.9, choices=WINDOWS[:2]).chosen.values()) == {Clear(radius=4)}


def test_propose_mixes_methods() -> None:
    agent = Agent(num_agents=4)
    errors = ((0.9, 0.5, 0.1, 0.02), (0.9, 0.8, 0.7, 0.9), (0.01, 0.005, 0.001, 0.3), (0.3, 0.01, 0.001, 0.2))
    profile = replace(_profile_with(*errors), methods=(agent,))
    assert agent not in propose(profile, 0.9).chosen.values()  # only where choices name it
    window = Clear(radius=8)
    proposal = propose(profile, 0.9, choices=(window, agent))
    assert list(proposal.chosen.values()) == [agent, window, window, window]
    assert set(proposal.configs.values()) == {agent, window}
    assert str(proposal).startswith("3 x radius 8, 1 x agent:num_agents=4; operations at 256x256")
    costs = [4 * pairs * 2 * 8 for pairs in (_pairs(window), _pairs(agent))]
    assert costs[1] < costs[0] and proposal.flops == 3 * costs[0] + costs[1]
    cheaper = propose(profile, agent, choices=(window, agent))
    assert set(cheaper.chosen.values()) == {agent} and cheaper.flops == 4 * costs[1]


def _pairs(config: Any) -> int:
    return kernels_of_methods[type(config)].pairs(config, (16, 16), 10, num_heads=2, head_dim=8)


def test_parse_choices_takes_radii_methods_and_full_attention() -> None:
    agents = Agent(num_agents=4), Agent(num_agents=16)
    pooled = Clear(radius=4, pool_tokens=4)
    profile = replace(_profile_with(), radii=(2, 2.5, 8), methods=(*agents, pooled))
    assert parse_choices(profile, "2.5, agent,full") == [Clear(radius=2.5), *agents, None]
    assert parse_choices(profile, "clear,8") == [pooled, Clear(radius=8)]
    assert parse_choices(profile, "2.0") == [Clear(radius=2)]
    for text, word in (("2,mala", "mala"), ("4", "4"), ("2,", ""), ("", ""), ("nan", "nan")):
        with pytest.raises(ValueError, match=f"'{word}' was not profiled: choices are 2, 2.5, 8, agent, clear, full"):
            parse_choices(profile, text)
    assert describe_choice(pooled) == "clear:radius=4,pool_tokens=4"


def test_propose_refuses_errors_that_are_not_finite() -> None:
    with pytest.raises(ValueError, match=r"no finite error for every candidate in blocks.1.attn"):
        propose(_profile_with((0.9, 0.5, 0.1), (0.9, math.nan, 0.1)), 0.9)


@pytest.mark.parametrize(
    ("budget", "choices", "message"),
    [
        (0.01, None, "the cheapest choices need"),
        (1.5, None, "between 0 and 1, got 1.5"),
        (0.9999999, (Clear(radius=8), None), "nothing to convert"),
        (0.5, (Clear(radius=3),), "radius 3 was not profiled; profiled choices: radius 2, radius 4, radius 8"),
        (0.5, (Mala(),), "mala was not profiled"),
        (0.5, (), "choices must hold at least one"),
    ],
)
def test_propose_refuses_invalid_budgets_and_choices(
    budget: float, choices: tuple[Any, ...] | None, message: str
) -> None:
    profile = _profile_with(*ERRORS)
    if message == "nothing to convert":
        profile = replace(profile, layers=profile.layers[:1])
        budget = Clear(radius=99)  # costs as much as full attention
    with pytest.raises(ValueError, match=message):
        propose(profile, budget, choices=choices)


def test_proposal_converts_the_model(tmp_path: Path) -> None:
    pipe, profile = build_tiny(), _profile(methods=METHODS[1:])
    proposal: Proposal = propose(profile, 0.9, choices=[Mala(), Clear(radius=2)])
    report = linearize_(pipe, proposal.configs)
    assert report.swapped == proposal.chosen
    assert "operations at 32x24" in str(proposal)


@pytest.mark.parametrize(
    ("text", "budget"), [("0.25", 0.25), ("radius:8", Clear(radius=8)), ("radius:2.5", Clear(radius=2.5))]
)
def test_parse_budget_reads_shares_and_radii(text: str, budget: float | Clear) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["much", "radius:", "window:8", "radius:x", "nan"])
def test_parse_budget_refuses_invalid_text(text: str) -> None:
    with pytest.raises(ValueError, match="budget must be a share such as"):
        parse_budget(text)
