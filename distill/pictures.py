"""Pictures of one model for many prompts, kept in a folder so that an interrupted evaluation goes on.

A folder belongs to one model and one setting: its name holds their digest. Picture i is `00000i.safetensors` (final
packed latents, and in the header its prompt and seconds) and `00000i.png`.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..linearize.convert import denoiser, swapped
from ..linearize.folders import write_whole
from ..linearize.methods import config_to_dict
from .families import family_of
from .prepare import fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How pictures are made: noise of picture i from `torch.Generator("cpu").manual_seed(seed + i)`."""

    height: int  # pixels
    width: int
    steps: int = 28
    guidance: float = 3.5
    seed: int = 0
    max_sequence_length: int = 512  # text tokens
    batch_size: int = 4  # changes nothing but speed

    def __post_init__(self) -> None:
        for name in ("steps", "max_sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What one model made: for each prompt its latents [N, C] and its picture."""

    latents: tuple[Tensor, ...]
    images: tuple[Image.Image, ...]
    seconds: float  # a picture, median: text encoding, denoising, decoding


def make_pictures(
    pipe: Any, prompts: Sequence[str], directory: Path, settings: PictureSettings, *, name: str = "pictures"
) -> Pictures:
    """Make one picture for each prompt, or read those that an earlier call with these settings left in the folder.

    Args:
        pipe: On the device where it shall run.
        directory: Holds a folder for each model and setting.
        name: The model's, for the progress bar.
    Raises:
        ValueError: the model's class or the size is not known to distillation.
    """
    folder = directory / digest(pipe, settings)
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(denoiser(pipe)[1])
    grid = family.grid(pipe, settings.height, settings.width)
    pipe.set_progress_bar_config(disable=True)
    missing = [index for index, prompt in enumerate(prompts) if not _is_there(folder, index, prompt)]
    with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc=name, unit="picture") as progress:
        for start in range(0, len(missing), settings.batch_size):
            batch = missing[start : start + settings.batch_size]
            began = time.perf_counter()
            latents = _denoise(pipe, [prompts[index] for index in batch], batch, settings)
            images = family.decode(pipe, latents, grid)
            seconds = (time.perf_counter() - began) / len(batch)
            for index, one, image in zip(batch, latents.cpu(), images, strict=True):
                _keep(folder, index, one, image, {"prompt": prompts[index], "seconds": f"{seconds:.4f}"})
            progress.update(len(batch))
    return _read(folder, len(prompts))


def digest(pipe: Any, settings: PictureSettings) -> str:
    """Changes with the weights, the conversion and every setting that changes pictures."""
    _, model = denoiser(pipe)
    kernels: dict[str, Any] = {name: module.linear_kernel for name, module in swapped(model).items()}
    content = {
        "parts": {name: fingerprint(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)},
        "methods": {name: config_to_dict(kernel.config) for name, kernel in kernels.items()},
        "scheduler": dict(pipe.scheduler.config),
        "settings": asdict(settings) | {"batch_size": None},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def _denoise(pipe: Any, prompts: list[str], indices: Sequence[int], settings: PictureSettings) -> Tensor:
    family = family_of(denoiser(pipe)[1])
    return family.generate(
        pipe,
        family.encode(pipe, prompts, settings.max_sequence_length),
        height=settings.height,
        width=settings.width,
        steps=settings.steps,
        guidance=settings.guidance,
        generators=[torch.Generator("cpu").manual_seed(settings.seed + index) for index in indices],
    )


def _files(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"{index:06d}.safetensors", folder / f"{index:06d}.png"


def _keep(folder: Path, index: int, latents: Tensor, image: Image.Image, about: dict[str, str]) -> None:
    tensors, picture = _files(folder, index)
    write_whole(picture, lambda temporary: image.save(temporary, format="PNG"))
    write_whole(tensors, lambda temporary: save_file({"latents": latents.contiguous()}, temporary, metadata=about))


def _is_there(folder: Path, index: int, prompt: str) -> bool:
    tensors, picture = _files(folder, index)
    if not (tensors.is_file() and picture.is_file()):
        return False
    with safe_open(tensors, framework="pt") as file:
        return file.metadata()["prompt"] == prompt


def _read(folder: Path, count: int) -> Pictures:
    latents, images, seconds = [], [], []
    for index in range(count):
        tensors, picture = _files(folder, index)
        with safe_open(tensors, framework="pt") as file:
            latents.append(file.get_tensor("latents"))
            seconds.append(float(file.metadata()["seconds"]))
        with Image.open(picture) as image:
            images.append(image.convert("RGB"))
    return Pictures(latents=tuple(latents), images=tuple(images), seconds=median(seconds))
