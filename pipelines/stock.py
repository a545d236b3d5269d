"""Around which of diffusers' pipelines a cascade can be made, and what it must know of their models.

A stage is a call of the text-to-image pipeline itself, given latents and a scheduler that begins midway
(`stage_schedule.py`). So a pipeline must take `latents`, of a VAE that `vae.py` knows, and need no picture.
"""

import inspect
from typing import Any

from diffusers import FluxPipeline
from diffusers.models.embeddings import PatchEmbed
from torch import Tensor, nn

from ..linearize.convert import denoiser
from ..linearize.errors import UnsupportedModelError
from .latents import pack_latents, patches_of
from .positions import is_told_positions
from .vae import KNOWN_VAES, latent_channels, normalized, pixels_per_latent

# Whatever pipeline a transformer comes from, Kontext's or ControlNet's, its pictures from text are made by this one.
_TEXT_TO_IMAGE: dict[str, type] = {"FluxTransformer2DModel": FluxPipeline}
_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "latents", "output_type")
_RESIZES = ("HiDreamImageTransformer2DModel",)  # its pipeline draws the native area, whatever size is asked for
_FLUX2 = "Flux2Transformer2DModel"  # its pipelines take reference pictures, and need none
_FOREIGN = ("image", "mask_image", "control_image", "num_frames", "class_labels")
_OWN_PIPELINES = (
    "after linearize_ call its own pipelines, text-to-image at native size and image-to-image at larger ones"
)


def stock_class(pipeline: Any) -> type:
    """The pipeline class whose call makes each stage of a cascade around these parts.

    Raises:
        UnsupportedModelError: there is none.
    """
    model: Any = denoiser(pipeline)[1]
    name, kind = type(pipeline).__name__, type(model).__name__
    stock = _TEXT_TO_IMAGE.get(kind) or getattr(type(pipeline), "stock", None) or type(pipeline)
    takes = inspect.signature(stock.__call__).parameters
    reasons = [f"takes no {argument}" for argument in _NEEDED if argument not in takes]
    reasons += [f"takes {argument}" for argument in _FOREIGN if argument in takes and kind != _FLUX2]
    reasons += ["draws one area, whatever size is asked for"] if kind in _RESIZES else []
    for why in reasons:
        raise UnsupportedModelError(
            f"high resolution is built for text-to-image pipelines, and a {name} {why}: {_OWN_PIPELINES}"
        )
    vae = getattr(pipeline, "vae", None)
    if type(vae).__name__ not in KNOWN_VAES or (type(vae).__name__ == "AutoencoderKLFlux2" and kind != _FLUX2):
        has = "none" if vae is None else f"a {type(vae).__name__}"
        raise UnsupportedModelError(
            f"high resolution needs an AutoencoderKL as the VAE of the {name}, it has {has}: {_OWN_PIPELINES}"
        )
    channels = latent_channels(vae)
    given = model.config.get("in_channels")
    if given not in (channels, 4 * channels):
        raise UnsupportedModelError(
            f"this {kind} takes {given} numbers a token where text-to-image takes {4 * channels} or "
            f"{channels} (Fill, Canny, Depth, inpainting): use its own pipelines"
        )
    return stock


def packs_latents(pipe: Any) -> bool:
    """Whether the pipeline gives latents as FLUX's tokens, 2 x 2 each, and not as a picture."""
    config: Any = denoiser(pipe)[1].config
    return bool(config.in_channels == 4 * latent_channels(pipe.vae))


def as_taken(pipe: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as the pipeline takes them."""
    if type(denoiser(pipe)[1]).__name__ == _FLUX2:
        return patches_of(latents)
    return pack_latents(latents) if packs_latents(pipe) else latents


def as_given(pipe: Any, latents: Tensor) -> Tensor:
    """Latents that the pipeline has made, as the denoiser has them: FLUX.2 klein's are the VAE's own."""
    if type(denoiser(pipe)[1]).__name__ == _FLUX2 and latents.ndim == 4:
        return pack_latents(normalized(pipe.vae, latents))
    return latents


def trained_size(pipe: Any) -> int:
    """Side in pixels of the square pictures that the model was trained on, as its config says, else its VAE's."""
    scale = pixels_per_latent(pipe.vae)
    config: Any = denoiser(pipe)[1].config
    if isinstance(latents := config.get("sample_size"), int):
        return latents * scale
    said = pipe.vae.config.get("sample_size")
    # 32 is what a VAE's config that leaves it out gets
    return int(pipe.default_sample_size * scale if said in (None, 32) else said)


def rope_dim(model: nn.Module) -> int | None:
    """Numbers of a head that one axis of the picture turns, where each forward computes the rotation anew."""
    config: Any = model.config
    axes = config.get("axes_dims_rope")
    anew = is_told_positions(model) and hasattr(getattr(model, "pos_embed", None), "theta")
    return axes[-1] if axes and anew else None


def most_tokens(model: nn.Module) -> int | None:
    """Of one side, where the model has a table of positions: SD3's, or Lumina 2's and Z-Image's of each axis."""
    config: Any = model.config
    if axes := config.get("axes_lens"):
        return min(axes[-2:])
    embed = getattr(model, "pos_embed", None)
    return embed.pos_embed_max_size if isinstance(embed, PatchEmbed) else None
