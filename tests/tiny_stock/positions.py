"""Pipelines of FLUX and its relatives."""

from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from tiny_models import build

from .stock import (
    LENGTHS,
    TEXT_LEN,
    Arguments,
    Stock,
    TextEncoder,
    euler,
    mask,
    padded,
    pipeline,
    prompts,
    size,
    vae,
)


def flux() -> Any:
    return pipeline("FluxPipeline", scheduler=euler(), vae=vae(1), transformer=build("flux"))


def flux_arguments() -> Arguments:
    return {**size(4), **prompts(32, pooled=32), "true_cfg_scale": 2.0}


def kontext() -> Any:
    return pipeline("FluxKontextPipeline", scheduler=euler(), vae=vae(1), transformer=build("flux"))


def kontext_arguments() -> Arguments:
    """One picture, of another shape, for both prompts."""
    picture = Image.effect_noise((16, 24), 64).convert("RGB")
    return {**flux_arguments(), "image": picture, "max_area": 4 * 4 * 24, "_auto_resize": False}


def fill() -> Any:
    """A token holds 4 latents, the 4 of the masked picture, and 4 x 4 pixels of the mask."""
    transformer = build("flux", in_channels=24, out_channels=4)
    return pipeline("FluxFillPipeline", scheduler=euler(), vae=vae(1), transformer=transformer)


def fill_arguments() -> Arguments:
    hole = torch.zeros(1, 1, 16, 24)
    hole[..., 8:] = 1
    text = {name: value for name, value in prompts(32, pooled=32).items() if not name.startswith("negative")}
    return {**size(4), **text, "image": torch.rand(1, 3, 16, 24), "mask_image": hole}


def control() -> Any:
    transformer = build("flux", in_channels=8, out_channels=4)
    return pipeline("FluxControlPipeline", scheduler=euler(), vae=vae(1), transformer=transformer)


def control_arguments() -> Arguments:
    text = {name: value for name, value in prompts(32, pooled=32).items() if not name.startswith("negative")}
    return {**size(4), **text, "control_image": torch.rand(1, 3, 16, 24)}


def flux2() -> Any:
    return pipeline("Flux2Pipeline", scheduler=euler(), transformer=build("flux2"))


def flux2_arguments() -> Arguments:
    return {**size(16), "prompt_embeds": padded("", 32)}


def klein() -> Any:
    transformer = build("flux2", guidance_embeds=False)
    return pipeline("Flux2KleinPipeline", scheduler=euler(), vae=flux2_vae(), transformer=transformer)


def klein_arguments() -> Arguments:
    return {**size(16), **prompts(32, negative_len=5)}


def flux2_vae() -> Any:
    """Eight by eight pixels for each latent."""
    return diffusers.AutoencoderKLFlux2(
        latent_channels=1,
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def flux2_edit() -> Any:
    return pipeline("Flux2Pipeline", scheduler=euler(), vae=flux2_vae(), transformer=build("flux2"))


def flux2_edit_arguments() -> Arguments:
    """Two pictures of different shape, for both prompts."""
    pictures = [Image.effect_noise(shape, 64).convert("RGB") for shape in ((64, 80), (96, 64))]
    return {**flux2_arguments(), "image": pictures}


def bria() -> Any:
    return pipeline("BriaPipeline", scheduler=euler(), vae=vae(1), transformer=build("bria"))


def bria_arguments() -> Arguments:
    return {**size(4), **prompts(32)}


def bria_fibo() -> Any:
    """Embeddings cannot be passed, so the method that makes them returns random ones."""
    pipe = pipeline("BriaFiboPipeline", scheduler=euler(), text_encoder=TextEncoder(), transformer=build("bria-fibo"))

    def get_prompt_embeds(prompt: list[str], **_: Any) -> tuple[Tensor, list[Tensor], Tensor]:
        sign = "negative_" if prompt == ["", ""] else ""
        text_len = 5 if sign else 6
        torch.manual_seed(text_len)
        layers = [padded(sign, 16, text_len=text_len) for _ in range(2)]
        return torch.cat(layers, -1), layers, mask(sign, text_len)

    pipe.get_prompt_embeds = get_prompt_embeds
    return pipe


def words_arguments() -> Arguments:
    return {**size(16), "prompt": ["six", "four"], "negative_prompt": ["", ""]}


def longcat() -> Any:
    """Embeddings and prompts cannot be passed together, so the method that makes them returns random ones."""
    transformer = build("longcat-image", in_channels=64)
    pipe = pipeline("LongCatImagePipeline", scheduler=euler(), transformer=transformer)

    def encode(prompt: list[str]) -> Tensor:
        sign = "negative_" if prompt == ["", ""] else ""
        torch.manual_seed(len(sign))
        return padded(sign, 32)

    pipe._encode_prompt = encode
    return pipe


def longcat_arguments() -> Arguments:
    return {**words_arguments(), "enable_prompt_rewrite": False}


def ovis() -> Any:
    return pipeline("OvisImagePipeline", scheduler=euler(), vae=vae(1), transformer=build("ovis-image"))


def ovis_arguments() -> Arguments:
    return {**size(4), **prompts(32, negative_len=5), "negative_prompt": None}


def krea2() -> Any:
    return pipeline("Krea2Pipeline", scheduler=euler(), transformer=build("krea2"))


def krea2_arguments() -> Arguments:
    arguments = prompts(2, 16, masks="prompt_embeds_mask")
    return {**size(16), **{name: value.bool() if "mask" in name else value for name, value in arguments.items()}}


def chroma() -> Any:
    return pipeline("ChromaPipeline", scheduler=euler(), vae=vae(1), transformer=build("chroma"))


def chroma_arguments() -> Arguments:
    """The mask holds 0.0 and 1.0, as when the pipeline makes it from a prompt."""
    arguments = prompts(32, masks="prompt_attention_mask", negative_len=5)
    return {**size(4), **{name: value.float() if "mask" in name else value for name, value in arguments.items()}}


def ideogram4() -> Any:
    """A second transformer sees only the image. Embeddings cannot be passed: the method returns random ones."""
    parts = {"transformer": build("ideogram4"), "unconditional_transformer": build("ideogram4")}
    pipe = pipeline("Ideogram4Pipeline", scheduler=euler(), vae=flux2_vae(), **parts)

    def encode_prompt(grid_h: int, grid_w: int, device: Any, **_: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        layout = pipe._prepare_ids(list(LENGTHS[""]), grid_h, grid_w, TEXT_LEN, device)
        return torch.randn(2, TEXT_LEN + grid_h * grid_w, 16), *layout

    pipe.encode_prompt = encode_prompt
    return pipe


def ideogram4_arguments() -> Arguments:
    guidance = {"guidance_scale": 2.0, "guidance_schedule": None}
    return {**size(16), **guidance, "prompt": ["six", "four"], "max_sequence_length": TEXT_LEN}


POSITIONS = {
    "flux": Stock(needs="FluxPipeline", make=flux, arguments=flux_arguments),
    "flux-kontext": Stock(needs="FluxKontextPipeline", make=kontext, arguments=kontext_arguments),
    "flux-fill": Stock(needs="FluxFillPipeline", make=fill, arguments=fill_arguments),
    "flux-control": Stock(needs="FluxControlPipeline", make=control, arguments=control_arguments),
    "flux2": Stock(needs="Flux2Pipeline", make=flux2, arguments=flux2_arguments),
    "flux2-edit": Stock(needs="Flux2Pipeline", make=flux2_edit, arguments=flux2_edit_arguments),
    "flux2-klein": Stock(needs="Flux2KleinPipeline", make=klein, arguments=klein_arguments),
    "bria": Stock(needs="BriaPipeline", make=bria, arguments=bria_arguments),
    "bria-fibo": Stock(needs="BriaFiboPipeline", make=bria_fibo, arguments=words_arguments),
    "longcat-image": Stock(needs="LongCatImagePipeline", make=longcat, arguments=longcat_arguments),
    "ovis-image": Stock(needs="OvisImagePipeline", make=ovis, arguments=ovis_arguments),
    "krea2": Stock(needs="Krea2Pipeline", make=krea2, arguments=krea2_arguments),
    "ideogram4": Stock(
        needs="Ideogram4Pipeline",
        make=ideogram4,
        arguments=ideogram4_arguments,
        others=("unconditional_transformer",),
    ),
    "chroma": Stock(needs="ChromaPipeline", make=chroma, arguments=chroma_arguments, biased=True),
}
