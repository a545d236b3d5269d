"""Complete pipelines of other models, with text encoders and tokenizers, as small as possible, with random weights."""

from collections.abc import Callable
from typing import Any

import diffusers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lineardit.examples.tiny_flux.model import build_tokenizer, vocabulary
from tiny_models import build
from tiny_stock.latents import SDXL
from tiny_stock.stock import euler, vae

_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(vocabulary())}


def _clip(width: int, cls: Any = CLIPTextModel) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": width, "projection_dim": width, "bos_token_id": 0}
    return cls(CLIPTextConfig(**_TOKENS, **sizes, num_hidden_layers=2, num_attention_heads=2)).eval()


def _t5(width: int) -> Any:
    sizes = {"d_model": width, "d_ff": width, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    return T5EncoderModel(T5Config(**_TOKENS, **sizes, decoder_start_token_id=0)).eval()


def _sd() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(4, blocks=4),
        text_encoder=_clip(32),
        tokenizer=build_tokenizer(77),
        unet=build("unet"),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4, blocks=4),
        text_encoder=_clip(32),
        text_encoder_2=_clip(32, CLIPTextModelWithProjection),
        tokenizer=build_tokenizer(77),
        tokenizer_2=build_tokenizer(77),
        unet=build("unet", **SDXL, cross_attention_dim=64),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=build("sd3", joint_attention_dim=64),
        scheduler=euler(),
        vae=vae(4),
        text_encoder=_clip(16, CLIPTextModelWithProjection),
        text_encoder_2=_clip(16, CLIPTextModelWithProjection),
        text_encoder_3=_t5(64),
        tokenizer=build_tokenizer(77),
        tokenizer_2=build_tokenizer(77),
        tokenizer_3=build_tokenizer(512),
    )


def _pixart() -> Any:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=build_tokenizer(300),
        text_encoder=_t5(32),
        vae=vae(4, blocks=4),
        transformer=build("pixart", out_channels=8),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


# name: (-> the pipeline, WIDTHxHEIGHT of a picture of a few tokens)
WHOLE: dict[str, tuple[Callable[[], Any], str]] = {
    "sd": (_sd, "64x48"),
    "sdxl": (_sdxl, "64x48"),
    "sd3": (_sd3, "24x16"),
    "pixart": (_pixart, "96x64"),
}
