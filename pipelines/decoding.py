"""Decodes files of latents, loading only the VAE."""

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..linearize.folders import check_output_file
from .files import read_latents, remove_stage_latents, write_png
from .latents import unpack_latents
from .plan import check_tile
from .vae import decode, pixels_per_latent


def decode_file(
    file: Path,
    output: Path | None = None,
    *,
    base: str | None = None,
    tile: int | None = 1024,
    device: torch.device,
    dtype: torch.dtype,
    revision: str | None = None,
    offline: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the PNG of latents that `generate` saved but did not decode.

    Args:
        output: None: the file's name with .png in place of .latents.safetensors; its latents and those of its stages
            are then removed, otherwise kept.
        base: The pipeline whose VAE decodes; None: the one that the file names.
        tile: Side in pixels of the VAE's tiles; None: in one piece.
    Raises:
        ValueError: the file holds no latents or names no model, the output exists, or the tile is too small.
        OSError: a file cannot be read, or the base is not found.
    """
    check_tile(tile)
    default_output = file.parent / f"{file.name.removesuffix('.safetensors').removesuffix('.latents')}.png"
    if not file.exists() and default_output.exists():
        raise ValueError(f"{file} does not exist, but {default_output} does: its latents were decoded and removed")
    latents, text = read_latents(file)
    path = output or default_output
    if path.suffix.lower() != ".png":
        raise ValueError(f"output must end in .png, got {path}")
    check_output_file(path, overwrite=overwrite)
    name, size = base or text.get("model"), re.fullmatch(r"(\d+)x(\d+)", text.get("size", ""))
    if name is None or size is None:
        raise ValueError(f"{file} does not name its model and its picture's size: was it written by generate?")
    vae = _vae(name, revision=revision, offline=offline).to(device, dtype)
    pixels = decode(vae, _planes(latents, vae, int(size[2]), int(size[1])).to(device), tile=tile, progress=True)
    pixels = pixels[..., : int(size[2]), : int(size[1])]
    (picture,) = VaeImageProcessor().postprocess(pixels, output_type="pil")
    write_png(path, picture, text)
    if path == default_output:
        file.unlink()
        remove_stage_latents(path, text)
    return path


def _planes(latents: Tensor, vae: Any, height: int, width: int) -> Tensor:
    """[1, C, h, w] from latents as such or as FLUX's tokens, for a picture of at least this size."""
    if latents.ndim == 4:
        return latents
    token = 2 * pixels_per_latent(vae)
    rows, columns = -(-height // token), -(-width // token)
    if rows * columns != latents.shape[1]:
        raise ValueError(f"latents of {latents.shape[1]} tokens do not fit a {width}x{height} picture of this VAE")
    return unpack_latents(latents, 2 * rows, 2 * columns)


def _vae(name: str, *, revision: str | None, offline: bool) -> Any:
    """The VAE of a pipeline."""
    config = DiffusionPipeline.load_config(name, revision=revision, local_files_only=offline)
    library, class_name = config["vae"]
    if library != "diffusers":
        raise ValueError(f"the VAE of {name} must be a class of diffusers, got {library}.{class_name}")
    vae_class: Any = getattr(diffusers, class_name)
    return vae_class.from_pretrained(
        name, subfolder="vae", revision=revision, local_files_only=offline, use_safetensors=True
    )
