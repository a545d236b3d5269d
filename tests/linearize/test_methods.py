"""Properties of every registered method; a new one adds its entry to EXAMPLES."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from no_float64 import NoFloat64
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from trained import move_, trained_

from lineardit.linearize import dense, linearize_, restore_, swapped
from lineardit.linearize.adapters.adapter import load_adapter_, save_adapter
from lineardit.linearize.compiling import compile_
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
from tiny_models import build, inputs_of, run

# each method with all its learned parts, and without them where that takes another path
EXAMPLES: dict[type, list[Any]] = {
    Clear: [Clear(radius=2), Clear(radius=2, pool_tokens=4), Clear(radius=2, pool_size=2)],
    LinFusion: [LinFusion(projection_channels=4)],
    Neighborhood: [Neighborhood(window=3), Neighborhood(window=3, dilation=2)],
    SlidingTile: [SlidingTile(tile=2, window=3)],
    Agent: [Agent(num_agents=4), Agent(num_agents=4, conv_size=3, bias_size=3, balance=True)],
    Mala: [Mala(), Mala(conv_size=3, gate=True, balance=True)],
    Rala: [Rala(), Rala(conv_size=3, gate=True, balance=True)],
    ProxyTokens: [ProxyTokens(num_proxies=4, balance=True)],
    Hybrid: [
        Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), gate=1.0),
        Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=4), focus_tokens=8, focus_side=2, gate=1.0),
        Hybrid(local=Clear(radius=2), global_=Agent(num_agents=4), mass_cells=4),
        Hybrid(local=Neighborhood(window=(3, 3)), global_=Mala(gate=True), join="gate", gate=0.5),
    ],
}
CONFIGS = [config for configs in EXAMPLES.values() for config in configs]
IMAGE_ONLY = (LinFusion,)  # these refuse text
JOINT = [config for config in CONFIGS if not isinstance(config, IMAGE_ONLY)]
LEARNED = [
    config
    for config in CONFIGS
    if next(iter(METHODS[type(config)](config, num_heads=2, head_dim=8).parameters()), None) is not None
]
# linear in time and memory; a method meant to cost more is excluded here
LINEAR = [config for config in CONFIGS if getattr(config, "pool_size", None) is None]
GRIDS = [(3, 5), (1, 6), (7, 2), (2, 3, 5)]
TEXT_LEN = 3


def kernel_of(config: Any, *, randomized: bool = False) -> Any:
    """The method's module for 2 heads of 8, with its initial parameters, or changed ones if `randomized`."""
    kernel = METHODS[type(config)](config, num_heads=2, head_dim=8)
    if randomized:
        move_(kernel.parameters())
    return kernel


def tokens(grid: tuple[int, ...], text_len: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """query, key and value, [2, 2, N, 8]."""
    num_tokens = text_len + torch.Size(grid).numel()
    return [torch.randn(2, num_tokens, 2, 8, dtype=dtype).transpose(1, 2) for _ in range(3)]


def attend(kernel: Any, inputs: list[Tensor], layout: Layout, *, scale: float | None = None) -> Tensor:
    kernel.prepare_for(layout.grid)
    return kernel(*inputs, layout, scale=scale)


def test_every_method_has_examples() -> None:
    assert EXAMPLES.keys() == METHODS.keys()
    assert all(type(config) is cls for cls, configs in EXAMPLES.items() for config in configs)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configs_round_trip(config: Any) -> None:
    loaded = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert loaded == config
    assert hash(loaded) == hash(config)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"method": "claer", "radius": 4}, r"unknown method 'claer' \(did you mean clear\?\)"),
        ({"method": "clear", "raduis": 4}, r"unknown setting 'raduis' of clear \(did you mean radius\?\)"),
        ({"method": "clear"}, "lacks required settings: radius"),
        ({"radius": 4}, "must look like"),
        ({"method": ["clear"]}, "must look like"),
        ("clear", "must look like"),
    ],
)
def test_config_from_dict_refuses_invalid_entries_with_suggestions(entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict(entries)


def test_method_configs_are_frozen_and_keyword_only() -> None:
    for cls in METHODS:
        assert cls.__dataclass_params__.frozen
        assert all(field.kw_only for field in cls.__dataclass_fields__.values())


@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("text_len", [0, TEXT_LEN])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_attention_weights_sum_to_one(config: Any, text_len: int, text_first: bool) -> None:
    if text_len > 0 and isinstance(config, IMAGE_ONLY):
        pytest.skip("for the image alone")
    kernel = kernel_of(config)
    mask = torch.tensor([[True, False, True], [False] * 3]) if text_len > 0 else None
    for grid in GRIDS:
        query, key, value = tokens(grid, text_len)
        out = attend(kernel, [query, key, torch.full_like(value, 5)], Layout(grid, text_len, text_first, mask))
        assert out.shape == query.shape
        assert torch.allclose(out, torch.full_like(out, 5), rtol=1e-3), grid


@pytest.mark.parametrize("config", JOINT, ids=str)
def test_text_first_and_text_last_give_the_same_output(config: Any) -> None:
    kernel = kernel_of(config, randomized=True)
    mask = torch.tensor([[True, False, True], [True] * 3])
    for grid in GRIDS:
        inputs = tokens(grid, TEXT_LEN)
        first = attend(kernel, inputs, Layout(grid, TEXT_LEN, True, mask))
        text_last = [torch.cat([x[:, :, TEXT_LEN:], x[:, :, :TEXT_LEN]], 2) for x in inputs]
        last = attend(kernel, text_last, Layout(grid, TEXT_LEN, False, mask))
        assert torch.allclose(torch.cat([last[:, :, -TEXT_LEN:], last[:, :, :-TEXT_LEN]], 2), first, atol=1e-5)


@pytest.mark.parametrize("config", JOINT, ids=str)
def test_text_queries_use_full_softmax_attention(config: Any) -> None:
    kernel, grid = kernel_of(config, randomized=True), (3, 5)
    inputs = tokens(grid, TEXT_LEN)
    mask = torch.tensor([[True, False, True], [True] * 3])
    out = attend(kernel, inputs, Layout(grid, TEXT_LEN, True, mask), scale=0.6)
    keys = torch.cat([mask, mask.new_ones(2, 15)], 1)[:, None, None]
    expected = scaled_dot_product_attention(*inputs, attn_mask=keys, scale=0.6)
    assert torch.allclose(out[:, :, :TEXT_LEN], expected[:, :, :TEXT_LEN], atol=1e-5)


@pytest.mark.parametrize("config", JOINT, ids=str)
def test_masked_text_is_not_attended(config: Any) -> None:
    kernel, grid = kernel_of(config, randomized=True), (3, 5)
    inputs = tokens(grid, TEXT_LEN)
    mask = torch.tensor([[True, False, True], [False] * 3])
    out = attend(kernel, inputs, Layout(grid, TEXT_LEN, True, mask))
    changed = [torch.where(torch.cat([mask, mask.new_ones(2, 15)], 1)[:, None, :, None], x, x + 1) for x in inputs]
    again = attend(kernel, [inputs[0], *changed[1:]], Layout(grid, TEXT_LEN, True, mask))
    assert torch.allclose(again, out, atol=1e-6)
    alone = attend(kernel, [x[:, :, TEXT_LEN:] for x in inputs], Layout(grid, 0, True, None))
    assert torch.allclose(out[1, :, TEXT_LEN:], alone[1], atol=1e-5)
    assert not torch.allclose(out[0, :, TEXT_LEN:], alone[0], atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_pass_gradcheck_and_reach_every_parameter(config: Any) -> None:
    kernel, grid = kernel_of(config, randomized=True).double(), (3, 5)
    text_len = 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    inputs = [x.requires_grad_() for x in tokens(grid, text_len, torch.float64)]
    layout = Layout(grid, text_len, False, None)
    assert torch.autograd.gradcheck(lambda *x: attend(kernel, list(x), layout), inputs, fast_mode=True)
    if isinstance(config, LinFusion):  # its networks are applied before the projections
        return
    attend(kernel, inputs, layout).square().sum().backward()
    for name, parameter in kernel.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("config", [config for config in LEARNED if isinstance(config, Agent | Mala | Rala)], ids=str)
def test_learned_terms_start_without_effect(config: Any) -> None:
    plain = type(config)(num_agents=4) if isinstance(config, Agent) else type(config)()
    for text_len in (0, TEXT_LEN):
        inputs, layout = tokens((3, 5), text_len), Layout((3, 5), text_len, True, None)
        out, expected = (attend(kernel_of(settings), inputs, layout) for settings in (config, plain))
        assert torch.allclose(out, expected, atol=1e-6)  # a bias of zeros may select another kernel


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_output_does_not_depend_on_earlier_resolutions(config: Any) -> None:
    kernel = kernel_of(config, randomized=True)
    fresh = copy.deepcopy(kernel)
    small, large = tokens((3, 5), 0), tokens((8, 6), 0)
    layouts = Layout((3, 5), 0, True, None), Layout((8, 6), 0, True, None)
    before = attend(kernel, small, layouts[0])
    assert torch.equal(attend(kernel, large, layouts[1]), attend(fresh, large, layouts[1]))
    assert torch.equal(attend(kernel, small, layouts[0]), before)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_implementations_agree(config: Any) -> None:
    kernel = kernel_of(config, randomized=True)
    text_len = 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    inputs, layout = tokens((3, 5), text_len), Layout((3, 5), text_len, True, None)
    expected = attend(kernel, inputs, layout)
    for name in kernel.implementations():
        if name != "triton":
            kernel.impl = name
            assert torch.allclose(attend(kernel, inputs, layout), expected, atol=1e-5), name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_covers_only_where_the_method_equals_the_base_attention(config: Any) -> None:
    """On a large image, `covers` would run the base's quadratic attention instead."""
    kernel = kernel_of(config)
    text_len = 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    for grid in [(32, 33), (33, 32), (33, 35)]:
        kernel.prepare_for(grid)
        assert not kernel.is_exact(Layout(grid, text_len, True, None)), grid
    for grid in [(2, 2), (2, 3), *GRIDS]:
        inputs, layout = tokens(grid, text_len), Layout(grid, text_len, True, None)
        kernel.prepare_for(grid)
        if kernel.is_exact(layout):
            assert torch.allclose(kernel(*inputs, layout), scaled_dot_product_attention(*inputs), atol=1e-5), grid


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_auto_impl_is_an_implementation(config: Any) -> None:
    kernel = kernel_of(config)
    auto_impl = kernel.auto_impl(config, torch.empty(1, 2, 15 + TEXT_LEN, 8), (3, 5), TEXT_LEN)
    # such as "tiled (focus: plain)"
    assert auto_impl.split(" ")[0] in kernel.implementations()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bfloat16_is_close_to_float32(config: Any) -> None:
    kernel = kernel_of(config, randomized=True).bfloat16()
    text_len = 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    inputs, layout = [x.bfloat16() for x in tokens((6, 7), text_len)], Layout((6, 7), text_len, True, None)
    out = attend(kernel, inputs, layout)
    expected = attend(kernel.float(), [x.float() for x in inputs], layout)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 2**-6 * expected.abs().max()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_empty_batch_gives_an_empty_output(config: Any) -> None:
    grid, text_len = (3, 5), 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    kernel, inputs = kernel_of(config), [x[:0].requires_grad_() for x in tokens(grid, text_len)]
    out = attend(kernel, inputs, Layout(grid, text_len, True, None))
    assert [tensor.shape for tensor in (out, *torch.autograd.grad(out.sum(), inputs))] == [inputs[0].shape] * 4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_output_does_not_depend_on_the_default_device(config: Any) -> None:
    """Nor on the one under which tables are made: no other test uses this grid."""
    grid, text_len = (3, 11), 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    kernel, inputs = kernel_of(config, randomized=True), [x.requires_grad_() for x in tokens(grid, text_len)]
    layout = Layout(grid, text_len, True, None)
    with torch.device("meta"):
        out = attend(kernel, inputs, layout)
        out.sum().backward()
    assert torch.equal(out, attend(kernel, inputs, layout))
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_float32_inputs_use_no_float64(config: Any) -> None:
    """Apple GPUs have none. No other test uses this grid, so that its tables are made here."""
    kernel, grid = kernel_of(config, randomized=True), (2, 13)
    text_len = 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    mask = torch.tensor([[True, False, True], [True] * 3]) if text_len > 0 else None
    for name in kernel.implementations():
        if name != "triton":
            kernel.impl = name
            inputs = [x.requires_grad_() for x in tokens(grid, text_len)]
            with NoFloat64():
                attend(kernel, inputs, Layout(grid, text_len, True, mask)).square().sum().backward()
            assert all(x.grad is not None for x in inputs), name


@pytest.mark.parametrize("config", JOINT, ids=str)
def test_methods_receive_the_autocast_dtype(config: Any) -> None:
    """Norms return float32 queries and keys next to half-precision values; methods compute in what they get."""
    model, seen = build("flux"), []
    linearize_(model, config)
    for module in swapped(model).values():
        module.norm_q.register_forward_hook(lambda *arguments: arguments[-1].float())
        module.norm_k.register_forward_hook(lambda *arguments: arguments[-1].float())
        module.linear_kernel.register_forward_pre_hook(lambda _, inputs: seen.append([x.dtype for x in inputs[:3]]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out = run(model, inputs_of("flux"))
    assert seen
    assert {dtype for dtypes in seen for dtype in dtypes} == {torch.bfloat16}
    assert out.isfinite().all()


@pytest.mark.parametrize("config", LINEAR, ids=str)
def test_memory_and_pairs_grow_linearly_with_the_image(config: Any) -> None:
    """Twice the sides, four times the tokens: about four times the bytes at the peak of a forward and backward."""
    kernel = METHODS[type(config)](config, num_heads=1, head_dim=4)
    kernel.impl = next(
        impl for impl in kernel.implementations() if impl not in ("auto", "reference", "masked", "triton")
    )
    text_len = 0 if isinstance(config, IMAGE_ONLY) else TEXT_LEN
    small, large = (_peak(kernel, (side, side), text_len) for side in (24, 48))
    assert large < 5 * small  # tiles at the border see less
    shape = {"num_heads": 1, "head_dim": 4}
    small_pairs, large_pairs = (kernel.pairs(config, (side, side), text_len, **shape) for side in (64, 256))
    assert 0 < large_pairs < 16.5 * small_pairs


def _peak(kernel: Any, grid: tuple[int, int], text_len: int) -> int:
    """Peak of allocated bytes, including those inside operators."""
    inputs = [torch.randn(1, 1, text_len + grid[0] * grid[1], 4, requires_grad=True) for _ in range(3)]
    attend(kernel, inputs, Layout(grid, text_len, True, None))  # makes the tables kept per grid
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        attend(kernel, inputs, Layout(grid, text_len, True, None)).sum().backward()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("family", ["flux", "unet"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_models_convert_save_load_and_restore(config: Any, family: str, tmp_path: Path) -> None:
    if family == "flux" and isinstance(config, IMAGE_ONLY):
        pytest.skip("for the image alone")
    model, arguments = build(family), inputs_of(family, grid=(8, 10))
    base = run(model, arguments)
    other = copy.deepcopy(model)
    linearize_(model, config)
    trained_(model, "kernels")
    student = run(model, arguments)
    assert student.isfinite().all()
    assert not torch.allclose(student, base, atol=1e-4)
    save_adapter(model, tmp_path / "adapter")
    load_adapter_(other, tmp_path / "adapter")
    assert torch.equal(run(other, arguments), student)
    with dense(model):
        assert torch.equal(run(model, arguments), base)
    restore_(model)
    assert torch.equal(run(model, arguments), base)


@pytest.mark.parametrize(
    "config",
    [
        EXAMPLES[Agent][-1],
        pytest.param(EXAMPLES[Mala][-1], marks=pytest.mark.slow),
        pytest.param(EXAMPLES[Hybrid][0], marks=pytest.mark.slow),
        EXAMPLES[Hybrid][1],
    ],
    ids=str,
)
def test_compiled_blocks_add_no_graph_after_the_second_size(config: Any) -> None:
    torch._dynamo.reset()
    model = build("flux", num_layers=1)
    linearize_(model, config)
    eager = copy.deepcopy(model)
    compile_(model, backend="eager")
    graphs = []
    for grid in ((6, 6), (5, 7), (9, 4)):
        arguments = inputs_of("flux", grid=grid)
        assert torch.allclose(run(model, arguments), run(eager, arguments), atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[1] == graphs[-1]
