"""Pipelines with a ControlNet, which is converted as well."""

from typing import Any

import diffusers
import torch

from tiny_models import build
from tiny_models.tiny import fill_zeros

from .joint_latents import sd3_arguments
from .latents import SDXL, ddim, hunyuan_dit_arguments, sdxl_arguments
from .positions import flux_arguments
from .sequences import qwen_image_arguments, qwen_vae
from .stock import Arguments, Stock, euler, pipeline, prompts, size, vae


def flux() -> Any:
    parts = {"transformer": build("flux"), "controlnet": build("flux-controlnet")}
    return pipeline("FluxControlNetPipeline", scheduler=euler(), vae=vae(1), **parts)


def flux_control_arguments() -> Arguments:
    return {**flux_arguments(), "control_image": torch.rand(1, 3, 16, 24)}


def flux_union() -> Any:
    parts = {"transformer": build("flux"), "controlnet": build("flux-controlnet", num_mode=2)}
    return pipeline("FluxControlNetPipeline", scheduler=euler(), vae=vae(1), **parts)


def flux_union_arguments() -> Arguments:
    return {**flux_control_arguments(), "control_mode": 1}


def sd3() -> Any:
    parts = {"transformer": build("sd3"), "controlnet": build("sd3-controlnet")}
    return pipeline("StableDiffusion3ControlNetPipeline", scheduler=euler(), vae=vae(4), **parts)


def sd3_control_arguments() -> Arguments:
    return {**sd3_arguments(), "control_image": torch.rand(1, 3, 16, 24)}


def sd() -> Any:
    parts = {"unet": build("unet"), "controlnet": build("unet-controlnet"), "requires_safety_checker": False}
    return pipeline("StableDiffusionControlNetPipeline", scheduler=ddim(), vae=vae(4), **parts)


def sd_control_arguments() -> Arguments:
    """16 x 24 tokens, as sides are multiples of 8 pixels."""
    return {**size(8), **prompts(32), "image": torch.rand(1, 3, 32, 48)}


def sd_xs() -> Any:
    """Its denoiser is a UNet and its ControlNet in one."""
    parts = {"unet": build("unet-controlnet-xs"), "requires_safety_checker": False}
    return pipeline("StableDiffusionControlNetXSPipeline", scheduler=ddim(), vae=vae(4), **parts)


def sdxl_union() -> Any:
    controlnet = diffusers.ControlNetUnionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8,) * 4,
        num_control_type=2,
        num_trans_channel=16,
        num_proj_channel=16,
        num_trans_head=2,
        **SDXL,
    )
    parts = {"unet": build("unet", **SDXL), "controlnet": fill_zeros(controlnet).eval(), "add_watermarker": False}
    return pipeline("StableDiffusionXLControlNetUnionPipeline", scheduler=ddim(), vae=vae(4, blocks=4), **parts)


def sdxl_union_arguments() -> Arguments:
    return {**sdxl_arguments(), "control_image": [torch.rand(1, 3, 32, 48)], "control_mode": [1]}


def hunyuan_dit() -> Any:
    parts = {"transformer": build("hunyuan-dit", num_layers=6), "controlnet": build("hunyuan-dit-controlnet")}
    return pipeline(
        "HunyuanDiTControlNetPipeline",
        scheduler=ddim(),
        vae=vae(4, blocks=4),
        requires_safety_checker=False,
        **parts,
    )


def hunyuan_dit_control_arguments() -> Arguments:
    return {**hunyuan_dit_arguments(), "control_image": torch.rand(1, 3, 64, 96)}


def qwen_image() -> Any:
    parts = {"transformer": build("qwen-image"), "controlnet": build("qwen-image-controlnet")}
    return pipeline("QwenImageControlNetPipeline", scheduler=euler(), vae=qwen_vae(), **parts)


def qwen_image_control_arguments() -> Arguments:
    return {**qwen_image_arguments(), **size(4), "control_image": torch.rand(1, 3, 16, 24)}


def wan_vace() -> Any:
    """Its control blocks take 4 latents of the video, 4 of what is to be changed, and 2 x 2 pixels of the mask.

    Old versions take no embeddings, so the method that makes them returns random ones.
    """
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=2,
        scale_factor_temporal=2,
    )
    transformer = diffusers.WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=12,
    )
    pipe = pipeline("WanVACEPipeline", scheduler=euler(), vae=vae.eval(), transformer=transformer.eval())
    text = torch.randn(1, 6, 16), torch.randn(1, 5, 16)
    pipe.encode_prompt = lambda **_: text
    return pipe


def wan_vace_arguments() -> Arguments:
    """Three frames of latents, without a video to change; its pipeline takes one prompt at a time."""
    return {**size(4), "prompt": "six", "num_frames": 5}


CONTROLNETS = {
    "flux-controlnet": Stock(
        needs="FluxControlNetPipeline", make=flux, arguments=flux_control_arguments, others=("controlnet",)
    ),
    "flux-controlnet-union": Stock(
        needs="FluxControlNetPipeline", make=flux_union, arguments=flux_union_arguments, others=("controlnet",)
    ),
    "sd3-controlnet": Stock(
        needs="StableDiffusion3ControlNetPipeline", make=sd3, arguments=sd3_control_arguments, others=("controlnet",)
    ),
    "sd-controlnet": Stock(
        needs="StableDiffusionControlNetPipeline", make=sd, arguments=sd_control_arguments, others=("controlnet",)
    ),
    "sd-controlnet-xs": Stock(needs="StableDiffusionControlNetXSPipeline", make=sd_xs, arguments=sd_control_arguments),
    "sdxl-controlnet-union": Stock(
        needs="StableDiffusionXLControlNetUnionPipeline",
        make=sdxl_union,
        arguments=sdxl_union_arguments,
        others=("controlnet",),
    ),
    "hunyuan-dit-controlnet": Stock(
        needs="HunyuanDiTControlNetPipeline",
        make=hunyuan_dit,
        arguments=hunyuan_dit_control_arguments,
        others=("controlnet",),
    ),
    "qwen-image-controlnet": Stock(
        needs="QwenImageControlNetPipeline",
        make=qwen_image,
        arguments=qwen_image_control_arguments,
        others=("controlnet",),
    ),
    "wan-vace": Stock(needs="WanVACEPipeline", make=wan_vace, arguments=wan_vace_arguments),
}
