"""Offloading and layerwise casting of a student, enabled before or after its trained weights are loaded.

The execution device is the CPU: these test hooks, orders of calls and placement, not transfers between devices.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import group_offloading
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from trained import trained_

from lineardit import (
    Agent,
    Clear,
    Hybrid,
    LinFusion,
    ProxyTokens,
    dense,
    linearize_,
    load_adapter_,
    restore_,
    save_adapter,
)
from lineardit.linearize import swapped
from lineardit.linearize.networks import denoiser
from tiny_models import build, inputs_of

CPU = torch.device("cpu")
flux = pytest.mark.parametrize("family", ["flux"], indirect=True)
group_offload = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42") and torch.accelerator.current_accelerator() is None,
    reason="before diffusers 0.42, group offloading needs an accelerator",
)


@pytest.fixture(params=["lora", "full"])
def adapter(request: pytest.FixtureRequest, pipe: Any, tmp_path: Path) -> Path:
    """An adapter of trained weights for `pipe`, which is restored."""
    linearize_(pipe, Clear(radius=1.5, pool_size=2))
    trained_(pipe, request.param)
    save_adapter(pipe, tmp_path / "adapter")
    restore_(pipe)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("family", "adapter"), [("flux", "lora"), ("flux", "full"), ("unet", "lora")], indirect=["family", "adapter"]
)
@pytest.mark.parametrize("offloaded_first", [True, False])
def test_model_offload_keeps_the_student(
    pipe: Any, paint: Callable[..., Tensor], adapter: Path, offloaded_first: bool
) -> None:
    base = paint(pipe)
    load_adapter_(pipe, adapter)
    student = paint(pipe)
    if offloaded_first:
        restore_(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        load_adapter_(pipe, adapter)
    else:
        pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(paint(pipe), student)
    with dense(pipe):
        assert torch.equal(paint(pipe), base)
    pipe.remove_all_hooks()
    assert torch.equal(paint(pipe), student)
    restore_(pipe)
    assert torch.equal(paint(pipe), base)


@flux
@pytest.mark.parametrize("adapter", ["lora"], indirect=True)
@pytest.mark.parametrize("offloaded_first", [True, False])
def test_sequential_offload_keeps_the_student(
    pipe: Any, forward: Callable[[Any], Tensor], adapter: Path, offloaded_first: bool
) -> None:
    base, model = forward(pipe), denoiser(pipe)[1]
    load_adapter_(pipe, adapter)
    student = forward(pipe)
    if offloaded_first:
        restore_(pipe)
        cpu_offload(model, execution_device=CPU)
        load_adapter_(pipe, adapter)
    else:
        cpu_offload(model, execution_device=CPU)
    assert model.transformer_blocks[0].attn.to_q.weight.is_meta
    assert torch.equal(forward(pipe), student)
    with dense(pipe):
        assert torch.equal(forward(pipe), base)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(forward(pipe), student)
    restore_(pipe)
    assert torch.equal(forward(pipe), base)


@flux
@pytest.mark.parametrize("adapter", ["full"], indirect=True)
def test_sequential_offload_keeps_whole_weights_loaded_before_it(
    pipe: Any, forward: Callable[[Any], Tensor], adapter: Path
) -> None:
    load_adapter_(pipe, adapter)
    student, model = forward(pipe), denoiser(pipe)[1]
    cpu_offload(model, execution_device=CPU)
    assert torch.equal(forward(pipe), student)
    for refused in (lambda: load_adapter_(pipe, adapter), lambda: restore_(pipe), lambda: dense(pipe).__enter__()):
        with pytest.raises(ValueError, match=r"not in memory \(sequential offload\?\)"):
            refused()
    assert torch.equal(forward(pipe), student)


@pytest.mark.parametrize("global_", [ProxyTokens(num_proxies=4), Agent(num_agents=4, bias_size=3)])
def test_sequential_offload_loads_the_weights_of_a_hybrids_parts(global_: Any) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, Hybrid(local=Clear(radius=1.5), global_=global_))
    trained_(model, "kernels")
    with torch.no_grad():
        converted = model(**arguments)[0]
        cpu_offload(model, execution_device=CPU)
        assert torch.equal(model(**arguments)[0], converted)


@pytest.mark.parametrize(
    "config",
    [Agent(num_agents=4, bias_size=3), Clear(radius=1.5, pool_size=2), LinFusion()],
    ids=lambda config: type(config).__name__,
)
def test_weights_not_moved_by_offloading_follow_their_input(config: Any) -> None:
    model = build("pixart").to("meta")  # the execution device
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs_of("pixart"))
    linearize_(model, config)
    weights = [weight for name, weight in model.named_parameters() if "linear_kernel" in name]
    assert weights and all(weight.device == CPU for weight in weights)
    assert model(**arguments)[0].is_meta
    assert all(weight.device == CPU for weight in weights)


def test_weights_of_a_hybrids_parts_follow_their_input_after_its_own() -> None:
    """Group offload moves a module's weights in its forward, but a hybrid calls another method of its parts."""
    model = build("pixart").to("meta")  # the execution device
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs_of("pixart"))
    linearize_(model, Hybrid(local=Clear(radius=1.5), global_=ProxyTokens(num_proxies=4), gate=1))
    for module in swapped(model).values():
        kernel: Any = module.linear_kernel
        kernel.gate, kernel.balance = (nn.Parameter(weight.to("meta")) for weight in (kernel.gate, kernel.balance))
        assert kernel.global_.gate.device == CPU
    assert model(**arguments)[0].is_meta


@flux
@group_offload
@pytest.mark.parametrize("offloaded_first", [True, False])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_keeps_the_student(
    pipe: Any, forward: Callable[[Any], Tensor], adapter: Path, offload_type: str, offloaded_first: bool
) -> None:
    base, model = forward(pipe), denoiser(pipe)[1]
    load_adapter_(pipe, adapter)
    student = forward(pipe)
    if offloaded_first:
        restore_(pipe)
    model.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)
    if offloaded_first:
        load_adapter_(pipe, adapter)
    assert torch.equal(forward(pipe), student)
    with dense(pipe):
        assert torch.equal(forward(pipe), base)
    restore_(pipe)
    assert torch.equal(forward(pipe), base)


@flux
@group_offload
@pytest.mark.parametrize("adapter", ["lora"], indirect=True)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_registers_weights_loaded_later(
    pipe: Any, forward: Callable[[Any], Tensor], adapter: Path, offload_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With streams, a group copies the weights that exist when it is created, and no others."""
    load_adapter_(pipe, adapter)
    student, model, seen = forward(pipe), denoiser(pipe)[1], set()
    restore_(pipe)
    create = group_offloading.ModuleGroup.__init__

    def record(group: Any, *args: Any, **kwargs: Any) -> None:
        create(group, *args, **kwargs)
        seen.update(group.parameters, *(module.parameters() for module in group.modules))

    monkeypatch.setattr(group_offloading.ModuleGroup, "__init__", record)
    model.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)
    load_adapter_(pipe, adapter)
    assert seen >= set(model.parameters())
    assert torch.equal(forward(pipe), student)


@pytest.mark.parametrize("family", ["flux", "unet"], indirect=True)
@pytest.mark.parametrize("adapter", ["lora"], indirect=True)
@pytest.mark.parametrize("cast_first", [True, False])
def test_layerwise_casting_does_not_round_trained_weights(
    pipe: Any, forward: Callable[[Any], Tensor], adapter: Path, cast_first: bool
) -> None:
    model = denoiser(pipe)[1]
    kinds = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if cast_first:
        model.enable_layerwise_casting(**kinds)
    load_adapter_(pipe, adapter)
    trained = _trained(model)
    if not cast_first:
        model.enable_layerwise_casting(**kinds)
    student = forward(pipe)
    assert _trained(model).keys() == trained.keys()
    for name, factor in _trained(model).items():
        assert factor.dtype == torch.float32
        assert torch.equal(factor, trained[name]), name
    assert torch.equal(forward(pipe), student)
    with dense(pipe):
        assert not torch.allclose(forward(pipe), student, atol=1e-3)


def _trained(model: Any) -> dict[str, Tensor]:
    return {
        name: factor.detach().clone()
        for name, factor in model.named_parameters()
        if "lineardit_lora" in name or "linear_kernel" in name
    }
