"""Pipelines whose reference images have no window: they are refused, and run inside `dense`."""

from typing import Any

import diffusers
import torch
from PIL import Image

from tiny_models import build

from .joint_latents import glm_image_arguments
from .positions import flux2_vae
from .stock import Arguments, Stock, euler, padded, pipeline, size


def klein_kv() -> Any:
    parts = {"transformer": build("flux2", guidance_embeds=False), "vae": flux2_vae()}
    return pipeline("Flux2KleinKVPipeline", scheduler=euler(), **parts)


def klein_kv_arguments() -> Arguments:
    """The keys and values of a picture are made in the first step and kept for the second."""
    picture = Image.effect_noise((64, 96), 64).convert("RGB")
    return {**size(16), "prompt_embeds": padded("", 32), "image": picture}


def glm_image_edit() -> Any:
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return pipeline("GlmImagePipeline", scheduler=euler(), vae=vae.eval(), transformer=build("glm-image"))


def glm_image_edit_arguments() -> Arguments:
    """A picture of 2 x 2 tokens for each prompt."""
    pictures = [[Image.effect_noise((4, 4), 64).convert("RGB")] for _ in range(2)]
    return {
        **glm_image_arguments(),
        **size(2),
        "image": pictures,
        "prior_token_image_ids": [torch.arange(4)] * 2,
        "source_image_grid_thw": [torch.tensor([[1, 2, 2]])] * 2,
    }


REFUSED = {
    "flux2-klein-kv": Stock(needs="Flux2KleinKVPipeline", make=klein_kv, arguments=klein_kv_arguments),
    "glm-image-edit": Stock(needs="GlmImagePipeline", make=glm_image_edit, arguments=glm_image_edit_arguments),
}
