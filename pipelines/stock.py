"""Which diffusers pipelines a cascade supports, and the properties of their models that it needs.

A stage is a call of the text-to-image pipeline itself, given latents and a scheduler that starts midway
(`stage_schedule.py`). So a pipeline must take `latents`, of a VAE that `vae.py` supports, and need no picture.
"""

import inspect
from collections.abc import Mapping
from typing import Any, cast

from diffusers import FluxPipeline
from torch import Tensor, nn

from ..linearize.errors import UnsupportedModelError
from ..linearize.networks import denoiser
from .latents import pack_latents, patches_of
from .positions import computes_rope
from .sizes import native_side
from .vae import is_flux2, is_supported, latent_channels, normalized

# The text-to-image pipeline of a transformer, whichever pipeline it comes from, such as Kontext's or Fill's.
_TEXT_TO_IMAGE: dict[str, type] = {"FluxTransformer2DModel": FluxPipeline}
_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "latents", "output_type")
_FOREIGN = ("image", "mask_image", "control_image", "num_frames", "class_labels")
_STEERED = ("FluxControlNetPipeline",)  # the control image is resized to each stage
_FLUX2 = ("Flux2Pipeline", "Flux2KleinPipeline")  # take reference pictures, and need none
_RESIZES = ("HiDreamImagePipeline",)  # draws the native area, whatever size is requested
_OWN_PIPELINES = (
    "after linearize_, call its own pipelines, text-to-image at the native size and image-to-image at larger sizes"
)
_LUMINA_NEXT_TOKENS = 384  # of one side, in its pipeline


def stock_class(pipeline: Any) -> type:
    """The pipeline class whose call makes each stage of a cascade around these parts.

    Raises:
        UnsupportedModelError: there is none.
    """
    model: Any = denoiser(pipeline)[1]
    name, kind = type(pipeline).__name__, type(model).__name__
    own: Any = getattr(type(pipeline), "stock", type(pipeline))
    stock = own if own.__name__ in _STEERED else _TEXT_TO_IMAGE.get(kind, own)
    if reason := _unsuitable(stock, getattr(pipeline, "components", {})):
        raise UnsupportedModelError(
            f"high resolution supports text-to-image pipelines, but a {name} {reason}: {_OWN_PIPELINES}"
        )
    vae = getattr(pipeline, "vae", None)
    if not is_supported(vae) or (is_flux2(vae) and stock.__name__ not in _FLUX2):
        found = "none" if vae is None else f"a {type(vae).__name__}"
        raise UnsupportedModelError(
            f"high resolution needs an AutoencoderKL as the VAE of the {name}, it has {found}: {_OWN_PIPELINES}"
        )
    channels, in_channels = latent_channels(vae), model.config.get("in_channels")
    if in_channels not in (channels, 4 * channels):
        raise UnsupportedModelError(
            f"this {kind} takes {in_channels} numbers per token, but text-to-image takes {4 * channels} or "
            f"{channels} (Fill, Canny, Depth, inpainting): use its own pipelines"
        )
    return stock


def _unsuitable(stock: Any, parts: Mapping[str, Any]) -> str | None:
    """Why this is not a text-to-image pipeline for a cascade; None if it is."""
    if any(cls.__name__ == "ModularPipeline" for cls in stock.__mro__):
        return "is made of blocks (build diffusers' stock pipeline from its parts, and a cascade from that)"
    takes = inspect.signature(stock.__call__).parameters
    foreign = [name for name in _FOREIGN if name in takes and not (name == "image" and stock.__name__ in _FLUX2)]
    if missing := [name for name in _NEEDED if name not in takes]:
        return f"takes no {missing[0]}"
    if ("controlnet" in parts or foreign) and stock.__name__ not in _STEERED:
        return f"takes {foreign[0] if foreign else 'control_image'}"
    return "draws at a fixed area, whatever size is requested" if stock.__name__ in _RESIZES else None


def packs_latents(pipe: Any) -> bool:
    """Whether the pipeline returns latents as FLUX's tokens, 2 x 2 each, and not as a picture."""
    config: Any = denoiser(pipe)[1].config
    return bool(config.in_channels == 4 * latent_channels(pipe.vae))


def to_pipeline_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] as the pipeline takes them."""
    if is_flux2(pipe.vae):
        return patches_of(latents)
    return pack_latents(latents) if packs_latents(pipe) else latents


def from_pipeline_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Latents returned by the pipeline, in the denoiser's format: FLUX.2 klein returns the VAE's own."""
    if is_flux2(pipe.vae) and latents.ndim == 4:
        return pack_latents(normalized(pipe.vae, latents))
    return latents


def trained_size(pipe: Any) -> int:
    """Side in pixels of the square pictures that the model was trained on, as far as pipeline and configs say."""
    height = inspect.signature(pipe.stock.__call__).parameters["height"].default
    if isinstance(height, int):  # AuraFlow, Krea 2
        return height
    return native_side(pipe)


def rope_dim(model: nn.Module) -> int | None:
    """Head dimensions rotated by one axis of the picture; None if the base of the rotation cannot be scaled."""
    axes = cast(Any, model.config).get("axes_dims_rope")
    return axes[-1] if axes and computes_rope(model) else None


def max_side_tokens(model: nn.Module) -> int | None:
    """The most tokens along one side for which the model has rotary positions; None: any number."""
    config: Any = model.config
    match type(model).__name__:
        case "LuminaNextDiT2DModel":
            return _LUMINA_NEXT_TOKENS
        case "Lumina2Transformer2DModel" | "ZImageTransformer2DModel":
            return min(config.axes_lens[-2:])
    return None
