"""Pipelines of models that take latents as an image, with text in the same attention."""

from typing import Any

import diffusers
import torch

from tiny_models import build

from .stock import LENGTHS, Arguments, Stock, euler, mask, padded, pipeline, prompts, size, vae


def sd3() -> Any:
    return pipeline("StableDiffusion3Pipeline", scheduler=euler(), vae=vae(4), transformer=build("sd3"))


def sd3_arguments() -> Arguments:
    return {**size(4), **prompts(32, pooled=32)}


def auraflow() -> Any:
    return pipeline("AuraFlowPipeline", scheduler=euler(), vae=vae(4), transformer=build("auraflow"))


def auraflow_arguments() -> Arguments:
    return {**size(4), **prompts(32, masks="prompt_attention_mask")}


def hunyuan_image() -> Any:
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=2.0)
    return pipeline("HunyuanImagePipeline", scheduler=euler(), transformer=build("hunyuan-image"), guider=guider)


def hunyuan_image_arguments() -> Arguments:
    """Two texts, each with prompts of two lengths."""
    arguments: Arguments = size(32)
    for sign in ("", "negative_"):
        for suffix, width in (("", 32), ("_2", 16)):
            arguments[f"{sign}prompt_embeds{suffix}"] = padded(sign, width)
            arguments[f"{sign}prompt_embeds_mask{suffix}"] = mask(sign)
    return arguments


def cogview4() -> Any:
    return pipeline("CogView4Pipeline", scheduler=euler(), vae=vae(4, blocks=4), transformer=build("cogview4"))


def cogview4_arguments() -> Arguments:
    return {**size(16), **prompts(32, negative_len=5)}


def cogview3_plus() -> Any:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return pipeline("CogView3PlusPipeline", scheduler=scheduler, vae=vae(4), transformer=build("cogview3-plus"))


def cogview3_plus_arguments() -> Arguments:
    return {**size(4), **prompts(32)}


def glm_image() -> Any:
    return pipeline("GlmImagePipeline", scheduler=euler(), vae=vae(4), transformer=build("glm-image"))


def glm_image_arguments() -> Arguments:
    """With given prior tokens, which its language model would otherwise generate."""
    prior = torch.randint(8, (2, 4 * 6))
    return {**size(4), **prompts(32), "prior_token_ids": prior, "guidance_scale": 2.0}


def ernie_image() -> Any:
    return pipeline("ErnieImagePipeline", scheduler=euler(), transformer=build("ernie-image"))


def ernie_image_arguments() -> Arguments:
    """A token is two by two latents of 16 x 16 pixels."""
    text = {f"{sign}prompt_embeds": [torch.randn(n, 16) for n in LENGTHS[sign]] for sign in LENGTHS}
    return {**size(32), **text}


def hidream() -> Any:
    """It scales every size to its own number of pixels, here to 112 x 64."""
    pipe = pipeline("HiDreamImagePipeline", scheduler=euler(), transformer=build("hidream"))
    pipe.default_sample_size = 12
    return pipe


def hidream_arguments() -> Arguments:
    arguments: Arguments = size(16)
    for sign in ("", "negative_"):
        arguments[f"{sign}prompt_embeds_t5"] = padded(sign, 16)
        arguments[f"{sign}prompt_embeds_llama3"] = padded(sign, 2, 16).permute(2, 0, 1, 3)
        arguments[f"{sign}pooled_prompt_embeds"] = torch.randn(2, 16)
    return arguments


def joy_image() -> Any:
    """It scales every size to about 1024 x 1024 pixels; the VAE's config makes that few tokens."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], scale_factor_spatial=64
    )
    return pipeline("JoyImageEditPipeline", scheduler=euler(), vae=vae, transformer=build("joy-image"))


def joy_image_arguments() -> Arguments:
    text = prompts(16, masks="prompt_embeds_mask", negative_len=5)
    return {"height": 896, "width": 1152, **text}


def prx() -> Any:
    return pipeline("PRXPipeline", scheduler=euler(), vae=vae(4), transformer=build("prx"))


def prx_arguments() -> Arguments:
    text = prompts(16, masks="prompt_attention_mask")
    text = {name: value.bool() if "mask" in name else value for name, value in text.items()}
    return {**size(4), **text, "guidance_scale": 1.0, "use_resolution_binning": False}


def prx_guided_arguments() -> Arguments:
    """With guidance its pipeline takes one prompt at a time."""
    arguments = {name: value[:1] if torch.is_tensor(value) else value for name, value in prx_arguments().items()}
    return {**arguments, "guidance_scale": 2.0}


JOINT_LATENTS = {
    "sd3": Stock(needs="StableDiffusion3Pipeline", make=sd3, arguments=sd3_arguments),
    "auraflow": Stock(needs="AuraFlowPipeline", make=auraflow, arguments=auraflow_arguments),
    "hunyuan-image": Stock(needs="HunyuanImagePipeline", make=hunyuan_image, arguments=hunyuan_image_arguments),
    "cogview4": Stock(needs="CogView4Pipeline", make=cogview4, arguments=cogview4_arguments),
    "cogview3-plus": Stock(needs="CogView3PlusPipeline", make=cogview3_plus, arguments=cogview3_plus_arguments),
    "glm-image": Stock(needs="GlmImagePipeline", make=glm_image, arguments=glm_image_arguments),
    "ernie-image": Stock(needs="ErnieImagePipeline", make=ernie_image, arguments=ernie_image_arguments),
    "hidream": Stock(needs="HiDreamImagePipeline", make=hidream, arguments=hidream_arguments),
    "joy-image": Stock(needs="JoyImageEditPipeline", make=joy_image, arguments=joy_image_arguments),
    "prx": Stock(needs="PRXPipeline", make=prx, arguments=prx_arguments),
    "prx-guided": Stock(needs="PRXPipeline", make=prx, arguments=prx_guided_arguments),
}
