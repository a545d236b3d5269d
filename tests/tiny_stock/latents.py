"""Pipelines of models that take latents as an image or a video, with self-attention of the image only."""

from typing import Any

import diffusers
import torch
from PIL import Image

from tiny_models import build

from .stock import Arguments, Stock, TextEncoder, euler, mask, padded, pipeline, prompts, size, vae


def ddim() -> Any:
    return diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)


def pixart_alpha() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline("PixArtAlphaPipeline", scheduler=scheduler, vae=vae(4), transformer=build("pixart"))


def pixart_sigma() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipeline("PixArtSigmaPipeline", scheduler=scheduler, vae=vae(4), transformer=build("pixart"))


def pixart_arguments() -> Arguments:
    text = prompts(32, masks="prompt_attention_mask")
    return {**size(4), **text, "negative_prompt": None, "use_resolution_binning": False}


def dit() -> Any:
    """Class 1000 stands for no class."""
    transformer = build("dit", num_embeds_ada_norm=1000)
    return pipeline("DiTPipeline", scheduler=ddim(), vae=vae(4), transformer=transformer)


def dit_arguments() -> Arguments:
    """DiT makes squares, and returns no latents."""
    return {"class_labels": [1, 2], "output_type": "np"}


def sd() -> Any:
    return pipeline(
        "StableDiffusionPipeline",
        scheduler=ddim(),
        vae=vae(4, blocks=4),
        unet=build("unet"),
        requires_safety_checker=False,
    )


def sd_arguments() -> Arguments:
    """A token is a latent, eight by eight pixels."""
    return {**size(8), **prompts(32)}


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}


def sdxl() -> Any:
    unet = build("unet", **SDXL)
    return pipeline(
        "StableDiffusionXLPipeline", scheduler=ddim(), vae=vae(4, blocks=4), unet=unet, add_watermarker=False
    )


def sdxl_arguments() -> Arguments:
    return {**size(8), **prompts(32, pooled=32)}


def hunyuan_dit() -> Any:
    return pipeline(
        "HunyuanDiTPipeline",
        scheduler=ddim(),
        vae=vae(4, blocks=4),
        transformer=build("hunyuan-dit"),
        requires_safety_checker=False,
    )


def hunyuan_dit_arguments() -> Arguments:
    """Both texts are as long as the config says."""
    arguments: Arguments = {**size(16), "use_resolution_binning": False}
    for sign in ("", "negative_"):
        for suffix in ("", "_2"):
            arguments[f"{sign}prompt_embeds{suffix}"] = padded(sign, 32, text_len=4)
            arguments[f"{sign}prompt_attention_mask{suffix}"] = mask(sign, 4)
    return arguments


def lumina_next() -> Any:
    transformer = build("lumina-next", learn_sigma=True)
    return pipeline("LuminaPipeline", scheduler=euler(), vae=vae(4, blocks=4), transformer=transformer)


def lumina_next_arguments() -> Arguments:
    return {**size(16), **prompts(32, masks="prompt_attention_mask")}


def wan() -> Any:
    return pipeline("WanPipeline", scheduler=euler(), transformer=build("wan"))


def wan_of_two() -> Any:
    """Wan 2.2: one transformer for the first step, another for the second."""
    return pipeline(
        "WanPipeline", scheduler=euler(), transformer=build("wan"), transformer_2=build("wan"), boundary_ratio=0.7
    )


def wan_arguments() -> Arguments:
    """Two frames of latents."""
    return {**size(16), **prompts(16, negative_len=5), "num_frames": 5}


def kandinsky5() -> Any:
    pipe = pipeline("Kandinsky5T2IPipeline", scheduler=euler(), transformer=build("kandinsky5"))
    pipe.resolutions = [(96, 64)]  # every other size is changed to one of these
    return pipe


def kandinsky5_arguments() -> Arguments:
    """All texts are as long as the longest, without a mask."""
    arguments: Arguments = size(16)
    for sign, text_len in (("", 6), ("negative_", 5)):
        arguments[f"{sign}prompt_embeds_qwen"] = padded(sign, 16, text_len=text_len)
        arguments[f"{sign}prompt_embeds_clip"] = torch.randn(2, 16)
        arguments[f"{sign}prompt_cu_seqlens"] = torch.tensor([0, text_len, 2 * text_len])
    return arguments


def cosmos() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = {"transformer": build("cosmos"), "safety_checker": TextEncoder()}
    return pipeline("Cosmos2TextToImagePipeline", scheduler=scheduler, **parts)


def chronoedit() -> Any:
    """Its transformer takes 4 latents of the video, 2 of the mask, 4 of the picture, and the picture's features."""
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
    transformer = build("chronoedit", in_channels=10, image_dim=16, added_kv_proj_dim=24)
    pipe = pipeline("ChronoEditPipeline", scheduler=euler(), vae=vae.eval(), transformer=transformer)
    features = torch.randn(1, 3, 16)
    pipe.encode_image = lambda *_: features
    return pipe


def chronoedit_arguments() -> Arguments:
    """Three frames of 8 x 12 tokens, as sides are multiples of 16 pixels."""
    return {**size(8), **prompts(16), "image": Image.effect_noise((24, 16), 64).convert("RGB")}


LATENTS = {
    "pixart-alpha": Stock(needs="PixArtAlphaPipeline", make=pixart_alpha, arguments=pixart_arguments),
    "pixart-sigma": Stock(needs="PixArtSigmaPipeline", make=pixart_sigma, arguments=pixart_arguments),
    "dit": Stock(needs="DiTPipeline", make=dit, arguments=dit_arguments),
    "sd": Stock(needs="StableDiffusionPipeline", make=sd, arguments=sd_arguments),
    "sdxl": Stock(needs="StableDiffusionXLPipeline", make=sdxl, arguments=sdxl_arguments),
    "hunyuan-dit": Stock(needs="HunyuanDiTPipeline", make=hunyuan_dit, arguments=hunyuan_dit_arguments),
    "lumina-next": Stock(needs="LuminaPipeline", make=lumina_next, arguments=lumina_next_arguments),
    "wan": Stock(needs="WanPipeline", make=wan, arguments=wan_arguments),
    "wan-of-two": Stock(needs="WanPipeline", make=wan_of_two, arguments=wan_arguments, others=("transformer_2",)),
    "kandinsky5": Stock(needs="Kandinsky5T2IPipeline", make=kandinsky5, arguments=kandinsky5_arguments),
    "cosmos": Stock(
        needs="Cosmos2TextToImagePipeline", make=cosmos, arguments=lambda: {**size(16), **prompts(32, negative_len=5)}
    ),
    "chronoedit": Stock(needs="ChronoEditPipeline", make=chronoedit, arguments=chronoedit_arguments),
}
