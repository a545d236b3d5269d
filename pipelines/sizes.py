"""Which picture sizes a pipeline can make."""

import inspect
from typing import Any

from ..linearize.networks import denoiser

IN_PIXELS = 256  # a pipeline's default_sample_size from here on is in pixels (PRX), below it in latents
_VAES_WITH_SIZE = ("AutoencoderKL", "AutoencoderKLFlux2")  # VAEs whose sample_size in the config is the whole model's
_UNSET_SIZE = 32  # default of a VAE's config that does not set it
_CALL_DEFAULT = 1024  # set inside the calls of Z-Image, Qwen-Image 2.1 and JoyImage Edit, and nowhere else


def size_multiple(pipe: Any) -> int:
    """Both sides of a picture are multiples of this many pixels: pixels per latent times latents per token."""
    _, model = denoiser(pipe)
    config: Any = model.config
    patch = config.get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, tuple | list) else patch
    # FLUX packs 2 x 2 latents before its transformer, whose patch_size is then 1; its image processor has the product
    processor = getattr(pipe, "image_processor", None) or getattr(pipe, "video_processor", None)
    return max(processor.config.vae_scale_factor if processor else 1, _pixels_per_latent(pipe) * patch)


def default_size(pipe: Any) -> tuple[int, int]:
    """Default (height, width) in pixels: that of the pipeline's call, else the model's own."""
    parameters = inspect.signature(pipe.__call__).parameters
    height, width = (parameters[side].default if side in parameters else None for side in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):  # AuraFlow, Kandinsky 5, Krea 2 and others
        return height, width
    side = native_side(pipe)
    return side, side


def native_side(pipe: Any) -> int:
    """Side in pixels of the square pictures that the model was trained on, as far as pipeline and configs say.

    A pipeline's own number is in latents of the VAE that its class was written for. So the VAE's config takes
    precedence: the small FLUX here draws 128 pixels, while FluxPipeline's number gives 256 with its VAE.
    """
    config: Any = denoiser(pipe)[1].config
    if isinstance(latents := config.get("sample_size"), int):
        return latents * _pixels_per_latent(pipe)
    default: int | None = getattr(pipe, "default_sample_size", None)
    if default is not None and default >= IN_PIXELS:
        return default
    vae: Any = getattr(pipe, "vae", None)
    vae_size = vae.config.get("sample_size") if type(vae).__name__ in _VAES_WITH_SIZE else None
    if vae_size not in (None, _UNSET_SIZE):
        return int(vae_size)
    return _CALL_DEFAULT if default is None else default * _pixels_per_latent(pipe)


def _pixels_per_latent(pipe: Any) -> int:
    """Pixels per latent, along one side."""
    return getattr(pipe, "vae_scale_factor", 0) or getattr(pipe, "vae_scale_factor_spatial", 1)


def check_size(pipe: Any, height: int, width: int) -> None:
    """Raise a ValueError that names the nearest sizes where the pipeline cannot make this one."""
    multiple = size_multiple(pipe)
    if height % multiple == 0 and width % multiple == 0:
        return
    down = [max(multiple, side // multiple * multiple) for side in (width, height)]
    up = [-(-side // multiple) * multiple for side in (width, height)]
    near = " and ".join(dict.fromkeys(f"{w}x{h}" for w, h in (down, up)))
    raise ValueError(
        f"both sides of a picture must be multiples of {multiple} pixels for this model, got {width}x{height}; "
        f"nearest: {near}"
    )
