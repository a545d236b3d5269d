"""Other attention processors, backends and guidance: they keep the window, or the next forward refuses them."""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline, attention_backend
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)
from torch import nn

from lineardit import Clear, KernelNotReachedError, LayoutError, dense, linearize_
from tiny_models import build, inputs_of, run
from tiny_stock.joint_latents import sd3, sd3_arguments

SMALL = Clear(radius=1.5)


@pytest.mark.parametrize(
    ("family", "set_default"),
    [
        ("sd3", lambda model: model.set_attn_processor(JointAttnProcessor2_0())),
        ("unet", lambda model: model.set_attn_processor(AttnProcessor2_0())),
        ("flux", lambda model: model.set_attn_processor(dict(model.attn_processors))),
        ("hunyuan-dit", lambda model: model.set_default_attn_processor()),
    ],
)
def test_default_processors_keep_the_window(family: str, set_default: Callable[[nn.Module], None]) -> None:
    model, arguments = build(family), inputs_of(family)
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    set_default(model)
    assert torch.equal(run(model, arguments), windowed)


def test_default_processor_of_a_unet_is_refused_with_a_replacement() -> None:
    model, arguments = build("unet"), inputs_of("unet")
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    model.set_default_attn_processor()
    with pytest.raises(KernelNotReachedError, match=r"processor AttnProcessor,.*AttnProcessor2_0\(\)"):
        run(model, arguments)
    model.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(run(model, arguments), windowed)


@pytest.mark.parametrize("family", ["unet"], indirect=True)
def test_attention_slicing_is_refused_until_it_is_disabled(
    pipe: diffusers.DiffusionPipeline, forward: Callable
) -> None:
    linearize_(pipe, SMALL)
    windowed = forward(pipe)
    pipe.enable_attention_slicing(1)
    with pytest.raises(KernelNotReachedError, match=r"SlicedAttnProcessor.*attention slicing"):
        forward(pipe)
    pipe.disable_attention_slicing()
    assert torch.equal(forward(pipe), windowed)


@pytest.fixture
def default_backend() -> Iterator[None]:
    """Setting a backend on a model sets it for the process."""
    with attention_backend("native"):
        yield


@pytest.mark.usefixtures("default_backend")
@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_backends_of_torch_keep_the_window(backend: str) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    model.set_attention_backend(backend)
    assert torch.allclose(run(model, arguments), windowed, atol=1e-6)


@pytest.mark.usefixtures("default_backend")
def test_other_backends_are_refused() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    with attention_backend("flex"), pytest.raises(KernelNotReachedError, match="attention backend"):
        run(model, arguments)
    assert torch.equal(run(model, arguments), windowed)
    model.set_attention_backend("flex")
    with pytest.raises(KernelNotReachedError, match=r"backend flex.*the backend 'native'"):
        run(model, arguments)
    model.set_attention_backend("native")
    assert torch.equal(run(model, arguments), windowed)


def test_perturbed_attention_guidance_of_a_unet_keeps_the_window() -> None:
    model, arguments = build("unet"), inputs_of("unet", batch=3)  # negative, positive, perturbed
    model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.set_processor(PAGCFGIdentitySelfAttnProcessor2_0())
    base = run(model, arguments)
    linearize_(model, Clear(radius=20))
    assert torch.equal(run(model, arguments), base)
    linearize_(model, SMALL)
    assert not torch.allclose(run(model, arguments), base, atol=1e-3)
    with dense(model):
        assert torch.equal(run(model, arguments), base)


def test_perturbed_attention_guidance_of_joint_attention_is_refused() -> None:
    model, arguments = build("sd3"), inputs_of("sd3")
    linearize_(model, SMALL)
    model.transformer_blocks[1].attn.set_processor(PAGJointAttnProcessor2_0())
    with pytest.raises(LayoutError, match=r"^transformer_blocks\.1\.attn has PAGJoint.*skip_guidance_layers.*dense"):
        run(model, arguments)


def test_advice_on_perturbed_attention_guidance_of_sd3_works() -> None:
    pipe, arguments = sd3(), {**sd3_arguments(), "num_inference_steps": 2}
    perturbed = StableDiffusion3PAGPipeline.from_pipe(pipe, pag_applied_layers=["blocks.1"])

    def paint(pipe: Any, **call: Any) -> torch.Tensor:
        torch.manual_seed(0)
        return pipe(**arguments, **call, output_type="pt").images

    base = paint(perturbed)
    linearize_(perturbed, Clear(radius=20))
    with pytest.raises(LayoutError, match=r"^transformer_blocks\.1\.attn has PAGCFGJoint.*set_attn_processor"):
        paint(perturbed)
    perturbed.transformer.set_attn_processor(JointAttnProcessor2_0())
    with dense(perturbed):
        assert torch.equal(paint(perturbed), base)
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    assert not torch.equal(paint(pipe, **skip), paint(pipe))
    linearize_(perturbed, Clear(radius=20), layers="transformer_blocks.0.*")
    assert torch.equal(paint(perturbed), base)


@pytest.mark.parametrize("impl", ["auto", "tiled", "reference"])
def test_layers_that_skip_attention_scores_skip_the_window(impl: str) -> None:
    model, arguments = build("pixart"), inputs_of("pixart")
    skip = LayerSkipConfig(indices=[0], skip_attention=False, skip_ff=False, skip_attention_scores=True)
    linearize_(model, {"*.1.attn1": SMALL}, impl=impl)
    apply_layer_skip(model, skip)
    expected = run(model, arguments)
    linearize_(model, SMALL, impl=impl)
    assert torch.equal(run(model, arguments), expected)
    with dense(model):
        base = run(model, arguments)
    assert not torch.allclose(base, expected, atol=1e-3)
    linearize_(model, Clear(radius=20))
    assert torch.equal(run(model, arguments), base)
