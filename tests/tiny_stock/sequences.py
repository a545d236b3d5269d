"""Pipelines of models that pack text and image into one sequence by the samples' own lengths."""

from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from tiny_models import build

from .stock import LENGTHS, Arguments, Stock, TextEncoder, euler, mask, padded, pipeline, prompts, size


def lumina2() -> Any:
    return pipeline("Lumina2Pipeline", scheduler=euler(), transformer=build("lumina2"))


def lumina2_arguments() -> Arguments:
    return {**size(16), **prompts(32, masks="prompt_attention_mask")}


def qwen_image() -> Any:
    return pipeline("QwenImagePipeline", scheduler=euler(), transformer=build("qwen-image"))


def qwen_image_arguments() -> Arguments:
    return {**size(16), **prompts(32, masks="prompt_embeds_mask", negative_len=5), "true_cfg_scale": 2.0}


def qwen_vae() -> Any:
    """Two by two pixels for each latent."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def _with_few_latents(pipe: Any) -> Any:
    """Pictures to edit are scaled to about 1024 x 1024 pixels; here they become few latents, without a VAE."""
    pipe.vae_scale_factor, pipe.latent_channels = 64, 4
    pipe._encode_vae_image = lambda image, generator: torch.randn(
        image.shape[0], 4, 1, image.shape[-2] // 64, image.shape[-1] // 64, generator=generator
    )
    return pipe


def _picture(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 64).convert("RGB")


def qwen_image_edit() -> Any:
    return _with_few_latents(pipeline("QwenImageEditPipeline", scheduler=euler(), transformer=build("qwen-image")))


def qwen_image_edit_arguments() -> Arguments:
    """A picture of another shape than the result."""
    return {**qwen_image_arguments(), **size(128), "image": _picture(20, 20)}


def qwen_image_edit_plus() -> Any:
    return _with_few_latents(pipeline("QwenImageEditPlusPipeline", scheduler=euler(), transformer=build("qwen-image")))


def qwen_image_edit_plus_arguments() -> Arguments:
    """Two pictures; its pipeline takes one prompt at a time."""
    arguments = {**qwen_image_edit_arguments(), "image": [_picture(20, 20), _picture(20, 20)]}
    return {name: value[:1] if torch.is_tensor(value) else value for name, value in arguments.items()}


def qwen_image_layered() -> Any:
    transformer = build("qwen-image", use_additional_t_cond=True, use_layer3d_rope=True)
    parts = {"transformer": transformer, "text_encoder": TextEncoder(), "vae": qwen_vae()}
    return _with_few_latents(pipeline("QwenImageLayeredPipeline", scheduler=euler(), **parts))


def qwen_image_layered_arguments() -> Arguments:
    """A picture split into itself and two layers, all of 4 x 6 tokens; it returns no latents.

    The text prompts only keep it from generating a caption.
    """
    text = prompts(32, masks="prompt_embeds_mask", negative_len=5)
    return {**text, "prompt": ["six", "four"], "image": _picture(24, 16), "layers": 2, "output_type": "pt"}


def nucleus_image() -> Any:
    return pipeline("NucleusMoEImagePipeline", scheduler=euler(), transformer=build("nucleus-image"))


def nucleus_image_arguments() -> Arguments:
    return {**size(16), **prompts(32, masks="prompt_embeds_mask", negative_len=5)}


def z_image() -> Any:
    return pipeline("ZImagePipeline", scheduler=euler(), transformer=build("z-image"))


def z_image_arguments() -> Arguments:
    """The second prompt fills another block of 32 tokens."""
    lengths = {"": (6, 40), "negative_": (3, 5)}
    text = {f"{sign}prompt_embeds": [torch.randn(n, 16) for n in lengths[sign]] for sign in LENGTHS}
    return {**size(16), **text}


def z_image_omni() -> Any:
    """Z-Image's model for alternating texts and pictures, here for a text only."""
    return pipeline("ZImageOmniPipeline", scheduler=euler(), transformer=build("z-image", siglip_feat_dim=16))


def z_image_omni_arguments() -> Arguments:
    arguments = z_image_arguments()
    return {name: [[text] for text in value] if "embeds" in name else value for name, value in arguments.items()}


class Processor:
    """What Qwen-Image 2.1's pipeline asks of its processor when it is constructed."""

    def __init__(self) -> None:
        self.tokenizer = self

    def apply_chat_template(self, *_: Any, **__: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, _: str) -> list[int]:
        return [1]


def qwen_image_21() -> Any:
    """Tokens before the image are run once, and their keys and values cached for the second step."""
    parts = {"transformer": build("qwen-image-21"), "processor": Processor()}
    return pipeline("QwenImage21Pipeline", scheduler=euler(), **parts)


def qwen_image_21_arguments() -> Arguments:
    text = prompts(16, masks="prompt_embeds_mask", negative_len=5)
    text = {name: value.bool() if "mask" in name else value for name, value in text.items()}
    return {**size(16), **text, "true_cfg_scale": 2.0}


def bria_fibo2() -> Any:
    return pipeline("BriaFibo2Pipeline", scheduler=euler(), transformer=build("bria-fibo2"))


def bria_fibo2_arguments() -> Arguments:
    """Features of two layers of its text encoder for each prompt."""
    arguments: Arguments = size(16)
    for sign in ("", "negative_"):
        arguments[f"{sign}prompt_embeds"] = padded(sign, 2, 16).transpose(1, 2)
        arguments[f"{sign}prompt_embeds_mask"] = mask(sign).bool()
    return arguments


def joy_image_plus() -> Any:
    """Embeddings and prompts cannot be passed together, so the method that makes them returns random ones."""
    pipe = pipeline("JoyImageEditPlusPipeline", scheduler=euler(), transformer=build("joy-image-plus"))

    def encode(prompt: list[str], **_: Any) -> tuple[Tensor, Tensor]:
        sign = "" if "six" in prompt[0] else "negative_"
        torch.manual_seed(len(sign))
        return padded(sign, 16), mask(sign)

    pipe.encode_prompt_multiple_images = encode
    return pipe


SEQUENCES = {
    "lumina2": Stock(needs="Lumina2Pipeline", make=lumina2, arguments=lumina2_arguments),
    "qwen-image": Stock(needs="QwenImagePipeline", make=qwen_image, arguments=qwen_image_arguments),
    "qwen-image-edit": Stock(needs="QwenImageEditPipeline", make=qwen_image_edit, arguments=qwen_image_edit_arguments),
    "qwen-image-edit-plus": Stock(
        needs="QwenImageEditPlusPipeline", make=qwen_image_edit_plus, arguments=qwen_image_edit_plus_arguments
    ),
    "qwen-image-layered": Stock(
        needs="QwenImageLayeredPipeline", make=qwen_image_layered, arguments=qwen_image_layered_arguments
    ),
    "nucleus-image": Stock(needs="NucleusMoEImagePipeline", make=nucleus_image, arguments=nucleus_image_arguments),
    "qwen-image-21": Stock(needs="QwenImage21Pipeline", make=qwen_image_21, arguments=qwen_image_21_arguments),
    "bria-fibo2": Stock(needs="BriaFibo2Pipeline", make=bria_fibo2, arguments=bria_fibo2_arguments),
    "joy-image-plus": Stock(
        needs="JoyImageEditPlusPipeline",
        make=joy_image_plus,
        arguments=lambda: {**size(16), "prompt": ["six", "four"], "negative_prompt": ["", ""]},
    ),
    "z-image": Stock(needs="ZImagePipeline", make=z_image, arguments=z_image_arguments),
    "z-image-omni": Stock(needs="ZImageOmniPipeline", make=z_image_omni, arguments=z_image_omni_arguments),
}
