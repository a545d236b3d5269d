"""Decodes files of latents, loading only the VAE."""

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..linearize.adapters.base import read_json
from ..linearize.adapters.place import PIPELINE_FILE, find_place
from ..linearize.folders import check_output_file
from .files import read_latents, remove_stage_latents, write_png
from .latents import unpack_latents
from .plan import check_tile
from .vae import decode, latent_channels, pixels_per_latent


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
        ValueError: the file holds no latents of such a picture or names no model, the base is not found or has no VAE,
            the output exists, or the tile is too small.
        OSError: a file cannot be read.
    """
    check_tile(tile)
    if file.is_dir():
        raise ValueError(f"{file} is a folder: pass one file of latents, such as {file / '000.latents.safetensors'}")
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
    planes = _planes(latents, vae, int(size[2]), int(size[1]))
    if planes is None or not planes.isfinite().all():
        raise ValueError(
            f"{file} must hold finite latents of one {size[0]} picture for the VAE of {name}, got "
            f"{list(latents.shape)}; those of a stage need no decoding, its picture is beside them"
        )
    pixels = decode(vae, planes.to(device), tile=tile, progress=True)
    pixels = pixels[..., : int(size[2]), : int(size[1])]
    (picture,) = VaeImageProcessor().postprocess(pixels, output_type="pil")
    write_png(path, picture, text)
    if path == default_output:
        file.unlink()
        remove_stage_latents(path, text)
    return path


def _planes(latents: Tensor, vae: Any, height: int, width: int) -> Tensor | None:
    """[1, C, h, w] from latents as such or as FLUX's tokens; None if not of one picture of at least this size."""
    pixels, channels = pixels_per_latent(vae), latent_channels(vae)
    rows, columns = (-(-side // (2 * pixels)) for side in (height, width))  # of FLUX's tokens
    if latents.shape == (1, rows * columns, 4 * channels):
        return unpack_latents(latents, 2 * rows, 2 * columns)
    is_whole = latents.ndim == 4 and latents.shape[:2] == (1, channels)
    return latents if is_whole and pixels * latents.shape[2] >= height and pixels * latents.shape[3] >= width else None


def _vae(name: str, *, revision: str | None, offline: bool) -> Any:
    """The VAE of a pipeline."""
    place = find_place(name, revision=revision, offline=offline)
    index_file = place.file(PIPELINE_FILE)
    library, class_name = read_json(index_file).get("vae", (None, None)) if index_file else (None, None)
    if library != "diffusers":
        raise ValueError(f"{name} is no pipeline with a VAE of diffusers, or not in the cache: name another (--base)")
    vae_class: Any = getattr(diffusers, str(class_name))
    return vae_class.from_pretrained(
        place.name, subfolder="vae", revision=revision, local_files_only=place.offline, use_safetensors=True
    )
