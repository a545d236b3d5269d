"""Student and teacher in one model: what is trained, and that the teacher stays the original bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from lineardit import restore_
from lineardit.distill.config import DistillConfig
from lineardit.distill.data import TeacherSamples
from lineardit.distill.latent_functions import latent_functions
from lineardit.distill.student import TwinLinear, add_twins_, build_student_, teacher, trained_parameters

LORA = {"kind": "lora", "rank": 2}
ATTENTION = {"kind": "attention"}
POOLED = {"method": "clear", "radius": 2, "pool_size": 2}


@pytest.fixture(params=[LORA, ATTENTION], ids=["lora", "attention"])
def trained(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


def _inputs(model: nn.Module, data: Any, dtype: torch.dtype) -> dict[str, Any]:
    batch = TeacherSamples(data).load([0, 2]).to(torch.device("cpu"), dtype)
    sigma = torch.tensor([0.3, 0.8])
    return latent_functions(model).inputs(model, batch.latents, sigma, batch.conditions, grid=batch.grid, guidance=3.5)


def _train(model: nn.Module, inputs: dict[str, Any], *, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(trained_parameters(model).values(), lr=0.1)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=inputs["hidden_states"].dtype == torch.bfloat16):
            model(**inputs)[0].float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_teacher_is_the_original_before_and_after_training(
    dtype: str, trained: dict[str, Any], data: Any, pipe: FluxPipeline, make_config: Callable[..., DistillConfig]
) -> None:
    model = pipe.transformer.to(getattr(torch, dtype))
    inputs = _inputs(model, data, model.dtype)
    original = model(**inputs)[0].detach()
    mixed = {"mixed_precision": "bf16"} if dtype == "bfloat16" else {}
    build_student_(pipe, make_config(method=POOLED, trained=trained, base={"dtype": dtype}, run=mixed))

    def teachers() -> Tensor:
        with teacher(model):
            return model(**inputs)[0]

    assert torch.equal(teachers(), original)
    assert not teachers().requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        before = model(**inputs)[0]
    _train(model, inputs)
    assert torch.equal(teachers(), original)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        assert not torch.equal(model(**inputs)[0], before)


def test_build_student_trains_the_named_projections(
    trained: dict[str, Any], pipe: FluxPipeline, make_config: Callable[..., DistillConfig]
) -> None:
    projections = ["to_q", "to_out.0"]
    build_student_(pipe, make_config(method=POOLED, trained=trained | {"projections": projections}))
    names = trained_parameters(pipe.transformer)
    kernels = {name for name in names if ".linear_kernel." in name}
    assert len(kernels) == 2
    layers = {f"{block}.{name}" for block, name in _layers(projections)}
    endings = ("lineardit_lora.down", "lineardit_lora.up") if trained is LORA else ("weight", "bias")
    assert names.keys() - kernels == {f"{layer}.{ending}" for layer in layers for ending in endings}
    assert all(parameter.dtype == torch.float32 for parameter in names.values())


def _layers(projections: list[str]) -> list[tuple[str, str]]:
    blocks = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    return [(block, name) for block in blocks for name in projections if (block, name) != (blocks[1], "to_out.0")]


def test_every_trained_parameter_gets_a_gradient(
    trained: dict[str, Any], data: Any, pipe: FluxPipeline, make_config: Callable[..., DistillConfig]
) -> None:
    text_side = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    build_student_(pipe, make_config(method=POOLED, trained=trained | {"projections": text_side}))
    pipe.transformer(**_inputs(pipe.transformer, data, torch.float32))[0].pow(2).mean().backward()
    assert not [name for name, parameter in trained_parameters(pipe.transformer).items() if parameter.grad is None]
    assert not [
        name
        for name, parameter in pipe.transformer.named_parameters()
        if parameter.grad is not None and not parameter.requires_grad
    ]


def test_restore_gives_the_base_back_after_training(
    trained: dict[str, Any], data: Any, pipe: FluxPipeline, make_config: Callable[..., DistillConfig]
) -> None:
    model = pipe.transformer
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_student_(pipe, make_config(method=POOLED, trained=trained))
    _train(model, _inputs(model, data, torch.float32))
    restore_(pipe)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert not any(isinstance(module, TwinLinear) for module in model.modules())


def test_add_twins_refuses_unknown_and_non_linear_layers(
    pipe: FluxPipeline, make_config: Callable[..., DistillConfig]
) -> None:
    build_student_(pipe, make_config())
    with pytest.raises(ValueError, match="targets must be layers of the swapped attention modules, got 'to_x'"):
        add_twins_(pipe.transformer, ["to_q", "to_x"])
    with pytest.raises(ValueError, match=r"attn.norm_q must be an nn.Linear to be trained, got a RMSNorm"):
        add_twins_(pipe.transformer, ["norm_q"])
    assert not any(isinstance(module, TwinLinear) for module in pipe.transformer.modules())
