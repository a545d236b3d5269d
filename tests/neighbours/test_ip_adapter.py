"""Image prompts: their own attention is unchanged, and the image's self-attention keeps the window."""

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from torch import Tensor

from lineardit import Clear, LayoutError, dense, linearize_, restore_
from lineardit.linearize.networks import denoiser
from tiny_models import build, inputs_of, run

NUM_TOKENS = 4  # of the image prompt, as in diffusers


def _projection(width: int) -> dict[str, Tensor]:
    return {
        "proj.weight": torch.randn(NUM_TOKENS * width, 8),
        "proj.bias": torch.randn(NUM_TOKENS * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _weights_for_flux(model: Any) -> dict[str, dict[str, Tensor]]:
    names = [f"{i}.{name}" for i in range(len(model.transformer_blocks)) for name in ("to_k_ip", "to_v_ip")]
    layers = {f"{name}.weight": torch.randn(model.inner_dim, 32) for name in names}
    return {"image_proj": _projection(32), "ip_adapter": layers | {f"{name}.bias": torch.zeros(32) for name in names}}


def _weights_for_unet(model: Any) -> dict[str, dict[str, Tensor]]:
    layers, number = {}, 1
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            for kind in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{kind}.weight"] = torch.randn_like(module.to_k.weight)
            number += 2
    return {"image_proj": _projection(32), "ip_adapter": layers}


def _load(pipe: Any, weights: dict) -> None:
    if hasattr(pipe, "unet"):
        pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
    else:
        pipe.load_ip_adapter(weights, weight_name="", image_encoder_pretrained_model_name_or_path=None)


@pytest.fixture
def prompted(family: str, arguments: dict[str, Any]) -> Callable[[Any], Tensor]:
    """One forward of a pipeline's denoiser with an image prompt."""
    image = [torch.randn(2, 1, 8)]
    options: dict[str, Any] = {"joint_attention_kwargs": {"ip_adapter_image_embeds": image}}
    if family == "unet":
        options = {"added_cond_kwargs": {"image_embeds": image}}
    # diffusers pops the image from the dictionary
    return lambda pipe: run(denoiser(pipe)[1], {**arguments, **copy.deepcopy(options)})


@pytest.mark.parametrize("converted_first", [True, False])
@pytest.mark.parametrize(
    ("family", "weights_for"), [("flux", _weights_for_flux), ("unet", _weights_for_unet)], indirect=["family"]
)
def test_image_prompts_work_with_the_window(
    pipe: Any,
    forward: Callable[[Any], Tensor],
    prompted: Callable[[Any], Tensor],
    weights_for: Callable[[Any], dict],
    converted_first: bool,
) -> None:
    plain, weights = forward(pipe), weights_for(denoiser(pipe)[1])
    linearize_(pipe, Clear(radius=1.5))
    windowed = forward(pipe)
    if converted_first:
        _load(pipe, weights)
    else:
        restore_(pipe)
        _load(pipe, weights)
        linearize_(pipe, Clear(radius=1.5))
    both = prompted(pipe)
    assert not torch.allclose(both, windowed, atol=1e-3)
    with dense(pipe):
        base = prompted(pipe)
    assert not torch.allclose(both, base, atol=1e-3)
    linearize_(pipe, Clear(radius=20))
    assert torch.equal(prompted(pipe), base)
    linearize_(pipe, Clear(radius=1.5))
    pipe.set_ip_adapter_scale(0.0)
    assert torch.allclose(prompted(pipe), windowed, atol=1e-6)
    pipe.set_ip_adapter_scale(1.0)
    assert torch.equal(prompted(pipe), both)
    restore_(pipe)
    assert torch.equal(prompted(pipe), base)
    linearize_(pipe, Clear(radius=1.5))
    pipe.unload_ip_adapter()
    assert torch.equal(forward(pipe), windowed)
    with dense(pipe):
        assert torch.equal(forward(pipe), plain)


def test_sd3_image_prompts_are_refused_for_attending_to_the_image_again() -> None:
    config = {**build("sd3").config, "dual_attention_layers": ()}
    model = diffusers.SD3Transformer2DModel.from_config(config).eval()
    arguments = inputs_of("sd3") | {
        "joint_attention_kwargs": {"ip_hidden_states": torch.randn(2, 4, 32), "temb": torch.randn(2, 32)}
    }
    model.set_attn_processor(
        {name: SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, timesteps_emb_dim=32) for name in model.attn_processors}
    )
    base = run(model, arguments)
    linearize_(model, Clear(radius=1.5))
    with pytest.raises(LayoutError, match=r"attend to the whole image a second time.*unload_ip_adapter"):
        run(model, arguments)
    with dense(model):
        assert torch.equal(run(model, arguments), base)
    linearize_(model, Clear(radius=20))
    assert torch.equal(run(model, arguments), base)
