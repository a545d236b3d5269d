"""ControlNets of a converted model: residuals are added, and their own attention is converted separately."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from lineardit import Clear, UnsupportedModelError, dense, linearize_, restore_
from lineardit.linearize import swapped
from tiny_models import build

SMALL = Clear(radius=1.5)
PIPELINES = {
    "flux": (diffusers.FluxControlNetPipeline, "control_image"),
    "sd3": (diffusers.StableDiffusion3ControlNetPipeline, "control_image"),
    "unet": (diffusers.StableDiffusionControlNetPipeline, "image"),
}


@pytest.fixture
def steer(family: str, paint: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call a pipeline with a control picture; several ControlNets take a scale and a picture each."""
    picture, argument = torch.rand(1, 3, 16, 24), PIPELINES[family][1]

    def call(pipe: Any, *scales: float) -> Tensor:
        pictures: Any = picture if len(scales) == 1 else [picture] * len(scales)
        scale: Any = scales[0] if len(scales) == 1 else list(scales)
        torch.manual_seed(0)  # SD3 samples the control latents from torch's global generator
        return paint(pipe, controlnet_conditioning_scale=scale, **{argument: pictures})

    return call


def _steered(pipe: Any, family: str, *controlnets: nn.Module) -> Any:
    network = controlnets[0] if len(controlnets) == 1 else list(controlnets)
    return PIPELINES[family][0].from_pipe(pipe, controlnet=network)


@pytest.mark.parametrize("converted_first", [True, False])
def test_residuals_are_added_to_a_converted_model(
    pipe: Any, family: str, steer: Callable[..., Tensor], converted_first: bool
) -> None:
    controlnet = build(f"{family}-controlnet")
    other = _steered(pipe, family, controlnet)
    base, unsteered = steer(other, 1.0), steer(other, 0.0)
    assert not torch.allclose(base, unsteered, atol=1e-3)
    if converted_first:
        linearize_(pipe, SMALL)
        other = _steered(pipe, family, controlnet)
    else:
        linearize_(other, SMALL)
    assert not swapped(controlnet)
    windowed, window_unsteered = steer(other, 1.0), steer(other, 0.0)
    assert not torch.allclose(windowed, base, atol=1e-3)
    assert not torch.allclose(windowed, window_unsteered, atol=1e-3)
    linearize_(controlnet, SMALL)
    assert not torch.allclose(steer(other, 1.0), windowed, atol=1e-5)
    assert torch.equal(steer(other, 0.0), window_unsteered)
    with dense(pipe), dense(controlnet):
        assert torch.equal(steer(other, 1.0), base)
    for model in (other, controlnet):
        linearize_(model, Clear(radius=30))
    assert torch.equal(steer(other, 1.0), base)
    restore_(controlnet)
    restore_(other)
    assert torch.equal(steer(other, 1.0), base)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_several_controlnets_steer_a_converted_model(pipe: Any, family: str, steer: Callable[..., Tensor]) -> None:
    networks = build("flux-controlnet"), build("flux-controlnet")
    other = _steered(pipe, family, *networks)
    base, first_alone = steer(other, 1.0, 1.0), steer(other, 1.0, 0.0)
    assert not torch.allclose(base, first_alone, atol=1e-3)
    linearize_(pipe, SMALL)
    windowed = steer(other, 1.0, 1.0)
    assert not torch.allclose(windowed, base, atol=1e-3)
    linearize_(networks[1], SMALL)
    assert not torch.allclose(steer(other, 1.0, 1.0), windowed, atol=1e-5)
    with dense(networks[1]):
        assert torch.equal(steer(other, 1.0, 1.0), windowed)
    for model in (pipe, networks[1]):
        linearize_(model, Clear(radius=30))
    assert torch.equal(steer(other, 1.0, 1.0), base)
    assert torch.equal(steer(other, 1.0, 0.0), first_alone)


@pytest.mark.parametrize("count", [1, 2])
def test_dense_and_restore_of_a_pipeline_include_its_controlnets(
    pipe: Any, family: str, steer: Callable[..., Tensor], count: int
) -> None:
    controlnets = [build(f"{family}-controlnet") for _ in range(count)]
    other, scales = _steered(pipe, family, *controlnets), [1.0] * count
    base = steer(other, *scales)
    for network in (other, *controlnets):
        linearize_(network, SMALL)
    windowed = steer(other, *scales)
    with dense(other):
        assert torch.equal(steer(other, *scales), base)
    assert torch.equal(steer(other, *scales), windowed)
    restore_(other)
    assert not any(swapped(network) for network in controlnets)
    assert torch.equal(steer(other, *scales), base)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_restore_of_a_pipeline_with_only_its_controlnet_converted(
    pipe: Any, family: str, steer: Callable[..., Tensor]
) -> None:
    controlnet = build("flux-controlnet")
    other = _steered(pipe, family, controlnet)
    base = steer(other, 1.0)
    linearize_(controlnet, SMALL)
    assert not torch.equal(steer(other, 1.0), base)
    restore_(other)
    assert torch.equal(steer(other, 1.0), base)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_restore_changes_nothing_if_a_network_was_wrapped_since(pipe: Any, family: str) -> None:
    controlnet = build("flux-controlnet")
    other = _steered(pipe, family, controlnet)
    for network in (other, controlnet):
        linearize_(network, SMALL)
    attention = controlnet.transformer_blocks[0].attn
    attention.__class__ = type("Wrapped", (type(attention),), {})
    with pytest.raises(UnsupportedModelError, match=r"attn became a Wrapped after linearize_"):
        restore_(other)
    assert swapped(other.transformer)
    assert swapped(controlnet)
