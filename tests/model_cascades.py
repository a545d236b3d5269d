"""Cascades of many models, as small as possible, with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch

from lineardit import Clear, HighResolutionPipeline, linearize_
from tiny_stock import STOCK
from tiny_stock.positions import flux2_vae
from tiny_stock.stock import vae


def qwen_vae(channels: int) -> Any:
    """Two by two pixels for each latent, whose statistics differ from channel to channel."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, 0.2, 0.3, 0.4][:channels],
        latents_std=[1.5, 1.0, 0.5, 2.0][:channels],
    ).eval()


def hunyuan_vae() -> Any:
    """Eight by eight pixels for each latent."""
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.75,
    ).eval()


# Pipelines that have a cascade, with a VAE if the tiny pipeline has none.
CASCADES: dict[str, Callable[[], Any] | None] = {
    **dict.fromkeys(("flux", "chroma", "ovis-image", "bria")),
    **dict.fromkeys(("sd", "sdxl", "hunyuan-dit", "pixart-alpha", "pixart-sigma", "lumina-next", "sd3", "auraflow")),
    **dict.fromkeys(("cogview4", "cogview3-plus", "prx")),
    "hunyuan-image": hunyuan_vae,
    "flux2": flux2_vae,
    "flux2-klein": None,
    "qwen-image": partial(qwen_vae, 4),
    "krea2": partial(qwen_vae, 1),
    "z-image": partial(vae, 4),
    "lumina2": partial(vae, 4, blocks=4),
}
LEFT_OUT = ("height", "width", "output_type", "use_resolution_binning")


def pipeline_and_arguments(name: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call besides a size."""
    stock = STOCK[name]
    try:
        getattr(diffusers, stock.needs)
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"this diffusers has no {stock.needs}: {error}")
    pipe = stock.make()
    if make := CASCADES.get(name):
        pipe = type(pipe)(**{**pipe.components, "vae": make()})
    if hasattr(getattr(pipe, "vae", None), "bn"):
        pipe.vae.bn.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, -0.4]))
        pipe.vae.bn.running_var.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0]))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {key: value for key, value in stock.arguments().items() if key not in LEFT_OUT}


def cascade_of(name: str) -> tuple[Any, dict[str, Any], int]:
    """A converted cascade, its arguments, and a side in pixels that the model can make."""
    pipe, arguments = pipeline_and_arguments(name)
    if name == "z-image":
        pipe.transformer.register_to_config(axes_lens=(512, 512, 512))
    linearize_(pipe, Clear(radius=1.5))
    high = HighResolutionPipeline.from_pipe(pipe, native_size=8)
    high.set_progress_bar_config(disable=True)
    side = max(8, high.plan(8, 8).stages[-1].height)
    high.native_size = side
    return high, arguments, side
