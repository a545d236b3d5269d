"""Compiled blocks beside other tools, and configs for each layer under inductor."""

import copy
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters

from lineardit import Clear, dense, linearize_
from lineardit.linearize import compile_
from lineardit.linearize.weights.training import add_lora_
from tiny_models import build, inputs_of, run

SIZES = [(6, 6), (8, 8), (8, 11), (11, 8), (5, 13), (9, 7)]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _check_sizes(model: nn.Module, eager: nn.Module, family: str, sizes: list[tuple[int, int]] = SIZES) -> None:
    """Every size equal to eager, twice; no graph more after the second size."""
    graphs = []
    for grid in sizes:
        arguments = inputs_of(family, grid=grid)
        for _ in range(2):
            assert torch.allclose(run(model, arguments), run(eager, arguments), atol=1e-5), grid
            graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1]
    assert graphs[:3][-1] == graphs[-1]


@pytest.mark.parametrize("sizes", [SIZES[:1], pytest.param(SIZES, marks=pytest.mark.slow)], ids=["one", "all"])
def test_inductor_equals_eager(sizes: list[tuple[int, int]]) -> None:
    model = build("pixart", num_layers=4)
    linearize_(model, Clear(radius=2.3))
    eager = copy.deepcopy(model)
    assert compile_(model) == 4
    _check_sizes(model, eager, "pixart", sizes)


@pytest.mark.slow
def test_inductor_takes_a_config_for_each_layer() -> None:
    model = build("pixart", num_layers=4)
    linearize_(model, {f"*.{i}.attn1": Clear(radius=radius) for i, radius in enumerate((1.5, 4.2, 4.2, 1.5))})
    eager = copy.deepcopy(model)
    compile_(model)
    _check_sizes(model, eager, "pixart")


@pytest.mark.slow
def test_repeated_blocks_of_diffusers_compile_alike() -> None:
    model = build("flux", num_layers=2)
    linearize_(model, Clear(radius=2.3))
    eager = copy.deepcopy(model)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    _check_sizes(model, eager, "flux")


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_original_call_in_small_pictures_is_one_graph_more(family: str) -> None:
    model = build(family, num_layers=1) if family == "flux" else build(family)
    linearize_(model, Clear(radius=2.3), dense_below=50)
    eager = copy.deepcopy(model)
    compile_(model, backend="eager")
    graphs = []
    for grid in [(5, 7), (6, 8), (8, 11), (11, 8), (6, 5), (9, 13), (4, 7), (12, 7)]:
        arguments = inputs_of(family, grid=grid)
        assert torch.allclose(run(model, arguments), run(eager, arguments), atol=1e-5), grid
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] < graphs[2]
    assert graphs[3] == graphs[-1]


def test_compiled_blocks_follow_styles_and_dense() -> None:
    model, arguments = build("sd3", num_layers=1), inputs_of("sd3")
    base = run(model, arguments)
    linearize_(model, Clear(radius=1.5))
    trained = add_lora_(model, rank=2, targets=("to_q",))
    with torch.no_grad():
        for factor in trained.values():
            factor.normal_()
    student = run(model, arguments)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name="style")
    styled = run(model, arguments)
    compile_(model, backend="eager")
    assert torch.allclose(run(model, arguments), styled, atol=1e-6)
    model.disable_adapters()
    assert torch.allclose(run(model, arguments), student, atol=1e-6)
    with dense(model):
        assert torch.allclose(run(model, arguments), base, atol=1e-6)
    model.enable_adapters()
    assert torch.allclose(run(model, arguments), styled, atol=1e-6)
