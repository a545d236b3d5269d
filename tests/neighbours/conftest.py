"""Tiny pipelines of diffusers' own classes, with random weights and without text encoders: they take embeddings."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lineardit.linearize.networks import denoiser
from tiny_models import build, inputs_of, run

HEIGHT, WIDTH = 16, 24  # pixels: 4 x 6 tokens in FLUX and SD3, 8 x 12 in the UNet


def _vae(channels: int) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.0,
    ).eval()


def _flux() -> diffusers.DiffusionPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(1),
        transformer=build("flux"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )


def _sd3() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        transformer=build("sd3"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _sd() -> diffusers.DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=_vae(4),
        unet=build("unet"),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


BUILD_PIPELINE: dict[str, Callable[[], diffusers.DiffusionPipeline]] = {"flux": _flux, "sd3": _sd3, "unet": _sd}


@pytest.fixture(params=BUILD_PIPELINE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(family: str) -> diffusers.DiffusionPipeline:
    pipeline = BUILD_PIPELINE[family]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def prompt(family: str) -> dict[str, Tensor]:
    """The prompt's embeddings, and those of a negative prompt if the pipeline takes one."""
    kinds = ("prompt_embeds",) if family == "unet" else ("prompt_embeds", "pooled_prompt_embeds")
    if family != "flux":
        kinds = (*kinds, *(f"negative_{kind}" for kind in kinds))
    return {kind: torch.randn(1, 32) if "pooled" in kind else torch.randn(1, 3, 32) for kind in kinds}


@pytest.fixture
def paint(prompt: dict[str, Tensor]) -> Callable[..., Tensor]:
    """Call a pipeline for two steps from one seed; returns final latents."""

    def call(pipe: Any, **arguments: Any) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent", **arguments}
        return pipe(**prompt, **options, generator=torch.Generator().manual_seed(0)).images

    return call


@pytest.fixture
def arguments(family: str) -> dict[str, Any]:
    """Arguments of one forward of the denoiser."""
    return inputs_of(family)


@pytest.fixture
def forward(arguments: dict[str, Any]) -> Callable[[Any], Tensor]:
    """One forward of a pipeline's denoiser."""
    return lambda pipe: run(denoiser(pipe)[1], arguments)
