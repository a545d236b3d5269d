"""Pipelines of models that take latents as an image or a video, with attention of the image alone."""

from typing import Any

import diffusers

from tiny_models import build

from .stock import Arguments, Stock, changed, euler, mask, padded, pipeline, prompts, size, vae


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
    """The class of no class is number 1000."""
    transformer = changed("dit", num_embeds_ada_norm=1000)
    return pipeline("DiTPipeline", scheduler=ddim(), vae=vae(4), transformer=transformer)


def dit_arguments() -> Arguments:
    """DiT makes squares, and gives no latents."""
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
    unet = changed("unet", **SDXL)
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
    transformer = changed("lumina-next", learn_sigma=True)
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
}
