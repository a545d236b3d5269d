"""Ulysses context parallelism on two processes equals one process; all other kinds are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import run_forks
from torch import nn

from lineardit import (
    Agent,
    Clear,
    LayoutError,
    LinFusion,
    Mala,
    Neighborhood,
    Rala,
    SlidingTile,
    dense,
    linearize_,
)
from lineardit.linearize.seam.parallel import join_shares, share_sizes, split_shares
from tiny_models import FAMILIES, build, inputs_of, run

diffusers = pytest.importorskip("diffusers", minversion="0.36", reason="context parallelism came with diffusers 0.36")

DEGREE = 2
WEIGHTS_SHARED = {
    "flux": (
        Neighborhood(window=(3, 5)),
        SlidingTile(window=(3, 3), tile=(2, 2)),
        Agent(num_agents=4),
        Mala(),
        Rala(),
    ),
    "wan": (LinFusion(),),
}
WEIGHTS_BY_HEAD = (Agent(num_agents=4, bias_size=3), Mala(conv_size=3), Rala(gate=True))
CONFIGS = (Clear(radius=2.3), Clear(radius=2.3, pool_size=2), Clear(radius=20))


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize(("first", "second"), [(5, 7), (0, 6), (3, 2)])
def test_share_sizes_are_those_of_tensor_split(first: int, second: int, degree: int) -> None:
    text, image = torch.randn(2, first, 3), torch.randn(2, second, 3)
    parts = zip(text.tensor_split(degree, 1), image.tensor_split(degree, 1), strict=True)
    shares = [part for pair in parts for part in pair]
    sizes = share_sizes(first, second, degree)
    assert torch.equal(join_shares(torch.cat(shares, 1), sizes, dim=1), torch.cat([text, image], 1))
    assert torch.equal(split_shares(torch.cat([text, image], 1), sizes, dim=1), torch.cat(shares, 1))


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (2, 2)])
def test_ring_attention_is_refused(ring: int, ulysses: int) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    base = run(model, arguments)
    linearize_(model, CONFIGS[0])
    context = SimpleNamespace(ring_degree=ring, ulysses_degree=ulysses)
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    for processor in processors:
        processor._parallel_config = SimpleNamespace(context_parallel_config=context)
    with pytest.raises(LayoutError, match=r"ring attention.*use ulysses_degree"):
        run(model, arguments)
    for processor in processors:
        processor._parallel_config = None
    with dense(model):
        assert torch.equal(run(model, arguments), base)


@pytest.mark.parametrize("family", [name for name in FAMILIES if getattr(build(name), "_cp_plan", None)])
def test_ulysses_equals_one_process(family: str, tmp_path: Path) -> None:
    _in_processes(_compare, family, tmp_path)


def test_ulysses_supports_uneven_shares(tmp_path: Path) -> None:
    _in_processes(_compare_uneven, "flux", tmp_path)


def test_ulysses_supports_a_text_mask(tmp_path: Path) -> None:
    _in_processes(_compare_masked, "flux", tmp_path)


@pytest.mark.parametrize("family", WEIGHTS_SHARED)
def test_ulysses_supports_or_refuses_every_method(family: str, tmp_path: Path) -> None:
    _in_processes(_try_methods, family, tmp_path)


def test_gradients_under_ulysses_are_refused(tmp_path: Path) -> None:
    _in_processes(_differentiate, "flux", tmp_path)


def _share_tokens(model: nn.Module, plan: dict | None = None, **options: bool) -> None:
    config = diffusers.ContextParallelConfig(ulysses_degree=DEGREE, **options)
    model.enable_parallelism(config=config, cp_plan=plan)


def _compare(rank: int, family: str) -> None:
    base, arguments = build(family), inputs_of(family, grid=(4, 6), text_len=4)
    if family == "flux2":  # its plan needs position ids with a batch, as in its pipeline
        arguments |= {name: arguments[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    parallel = copy.deepcopy(base)
    _share_tokens(parallel)
    parallel_dense = run(parallel, arguments)
    for config in CONFIGS:
        alone = copy.deepcopy(base)
        linearize_(alone, config)
        expected = run(alone, arguments)
        linearize_(parallel, config)
        assert torch.allclose(run(parallel, arguments), expected, atol=1e-5), config
        with dense(parallel):
            assert torch.equal(run(parallel, arguments), parallel_dense), config
        _share_tokens(alone)
        assert torch.allclose(run(alone, arguments), expected, atol=1e-5), (config, "converted first")


def _compare_uneven(rank: int, family: str) -> None:
    base, arguments = build(family), inputs_of(family, grid=(5, 7), text_len=5)
    # gloo cannot gather uneven shares, so each process keeps its own
    plan = {name: part for name, part in base._cp_plan.items() if name != "proj_out"}
    for config in CONFIGS:
        alone, parallel = copy.deepcopy(base), copy.deepcopy(base)
        _share_tokens(parallel, plan, ulysses_anything=True)
        for model in (alone, parallel):
            linearize_(model, config)
        expected = run(alone, arguments).tensor_split(DEGREE, 1)[rank]
        assert torch.allclose(run(parallel, arguments), expected, atol=1e-5), config


def _compare_masked(rank: int, family: str) -> None:
    model, arguments = build(family), inputs_of(family, grid=(4, 6), text_len=4)
    mask = torch.ones(2, 4 + 24, dtype=torch.bool)
    mask[1, 1:4] = False
    linearize_(model, CONFIGS[0])
    expected = run(model, {**arguments, "joint_attention_kwargs": {"attention_mask": mask}})
    _share_tokens(model)
    share = split_shares(mask, share_sizes(4, 24, DEGREE), dim=1).chunk(DEGREE, 1)[rank]
    out = run(model, {**arguments, "joint_attention_kwargs": {"attention_mask": share}})
    assert torch.allclose(out, expected, atol=1e-5)
    with pytest.raises(LayoutError, match="image tokens"):
        run(model, {**arguments, "joint_attention_kwargs": {"attention_mask": mask}})


def _try_methods(rank: int, family: str) -> None:
    base, arguments = build(family), inputs_of(family, grid=(4, 6), text_len=4)
    for config in (*WEIGHTS_SHARED[family], *WEIGHTS_BY_HEAD):
        model = copy.deepcopy(base)
        linearize_(model, config)
        expected = run(model, arguments)
        _share_tokens(model)
        if config in WEIGHTS_SHARED[family]:
            assert torch.allclose(run(model, arguments), expected, atol=1e-5), config
        else:
            with pytest.raises(LayoutError, match=r"weights for each of 2 heads, but only 1 are on this device"):
                run(model, arguments)


def _differentiate(rank: int, family: str) -> None:
    model = build(family)
    linearize_(model, CONFIGS[0])
    _share_tokens(model)
    with pytest.raises(LayoutError, match="train without enable_parallelism"):
        model(**inputs_of(family, grid=(4, 6), text_len=4))


def _in_processes(work: Callable[[int, str], None], family: str, folder: Path) -> None:
    def enter(rank: int) -> None:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and it is 0 on a CPU
        store = torch.distributed.FileStore(str(folder / "store"), DEGREE)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=DEGREE)
        torch.manual_seed(0)
        work(rank, family)

    run_forks(DEGREE, enter, folder)
