"""Pictures of one model for many prompts, kept in a folder so that an interrupted evaluation goes on.

A folder belongs to one model and one setting: its name holds their digest. Picture i is `00000i.safetensors` (final
latents, packed where the model takes them so, and in the header its prompt) and `00000i.png`; each says what seconds it
took. Latents are written before they are decoded where `families.py` has a row for the model; other pipelines are
called as they stand, and what their scheduler gave last is kept.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..linearize.calling import call_arguments
from ..linearize.convert import denoiser, swapped
from ..linearize.folders import read_header, read_tensors, write_whole
from ..linearize.methods import config_to_dict
from ..pipelines.files import check_finite
from ..pipelines.sizes import check_size
from .families import Grid, family_of, has_row, own_settings
from .prepare import fingerprint

logger = logging.getLogger(__name__)

SECONDS = "seconds"  # in a file's header: of denoising, or of decoding


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How pictures are made: noise of picture i from `torch.Generator("cpu").manual_seed(seed + i)`."""

    height: int  # pixels
    width: int
    steps: int = 28
    guidance: float | None = None  # None: the pipeline's own
    seed: int = 0
    max_sequence_length: int | None = None  # text tokens; None: the pipeline's own
    batch_size: int = 4  # changes nothing but speed
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's call besides

    def __post_init__(self) -> None:
        for name in ("steps", "max_sequence_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")

    def of(self, pipe: Any) -> "PictureSettings":
        """The same with the pipeline's own in place of None."""
        own = own_settings(pipe)._asdict()
        return replace(self, **{name: value for name, value in own.items() if getattr(self, name) is None})

    def call(self, pipe: Any) -> dict[str, Any]:
        """What a pipeline is called with for these pictures, beside prompts and noise."""
        names = ("height", "width", "steps", "guidance", "max_sequence_length")
        return call_arguments(pipe, {name: getattr(self, name) for name in names}, self.arguments)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """What one model made: for each prompt its latents, [N, C] where they are packed, and its picture."""

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
        ValueError: the pipeline cannot make this size, or makes no pictures.
    """
    settings = settings.of(pipe)
    if settings.arguments or not has_row(denoiser(pipe)[1]):
        return _make_pictures_whole(pipe, prompts, directory, settings, name)
    folder = directory / digest(pipe, settings)
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(denoiser(pipe)[1])
    grid = family.grid(pipe, settings.height, settings.width)
    pipe.set_progress_bar_config(disable=True)
    missing = [index for index, prompt in enumerate(prompts) if not _has_latents(folder, index, prompt)]
    there = [index for index in range(len(prompts)) if index not in missing]
    undecoded = [index for index in there if not _is_picture(_files(folder, index)[1])]
    with tqdm(total=len(prompts), initial=len(there) - len(undecoded), desc=name, unit="picture") as progress:
        _decode(pipe, folder, undecoded, grid, progress)
        for start in range(0, len(missing), settings.batch_size):
            batch = missing[start : start + settings.batch_size]
            began = time.perf_counter()
            latents = denoise(pipe, [prompts[index] for index in batch], batch, settings).cpu()
            check_finite(latents)
            seconds = (time.perf_counter() - began) / len(batch)
            for index, one in zip(batch, latents, strict=True):
                _keep_latents(folder, index, one, {"prompt": prompts[index], SECONDS: f"{seconds:.4f}"})
            _decode(pipe, folder, batch, grid, progress)
    return _read(folder, len(prompts))


def _make_pictures_whole(
    pipe: Any, prompts: Sequence[str], directory: Path, settings: PictureSettings, name: str
) -> Pictures:
    """`make_pictures` by calls of the pipeline from prompts to pictures."""
    check_size(pipe, settings.height, settings.width)
    folder = directory / digest(pipe, settings)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    there = [_has_latents(folder, index, prompt) for index, prompt in enumerate(prompts)]
    missing = [index for index in range(len(prompts)) if not (there[index] and _is_picture(_files(folder, index)[1]))]
    with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc=name, unit="picture") as progress:
        for start in range(0, len(missing), settings.batch_size):
            batch = missing[start : start + settings.batch_size]
            began = time.perf_counter()
            latents, images = draw_whole(pipe, [prompts[index] for index in batch], batch, settings)
            check_finite(latents)
            seconds = (time.perf_counter() - began) / len(batch)
            for index, one, image in zip(batch, latents, images, strict=True):
                _keep_latents(folder, index, one, {"prompt": prompts[index], SECONDS: f"{seconds:.4f}"})
                _keep_picture(folder, index, image, 0.0)  # the seconds above are of both
                progress.update()
    return _read(folder, len(prompts))


def draw_whole(
    pipe: Any, prompts: list[str], indices: Sequence[int], settings: PictureSettings
) -> tuple[Tensor, list[Image.Image]]:
    """Final latents [B, ...] on the CPU, and pictures, by one call of the pipeline."""
    generators = [torch.Generator("cpu").manual_seed(settings.seed + index) for index in indices]
    with _last_step(pipe) as made:
        one = len(prompts) == 1  # some pipelines take no lists
        images = pipe(
            prompts[0] if one else prompts, generator=generators[0] if one else generators, **settings.call(pipe)
        )[0]
    if not all(isinstance(image, Image.Image) for image in images) or len(images) != len(prompts):
        raise ValueError(f"{type(pipe).__name__} makes no picture for each prompt, and nothing else can be judged")
    return made[0][: len(prompts)].cpu(), images  # guided pipelines may hold each twice


@contextmanager
def _last_step(pipe: Any) -> Iterator[list[Tensor]]:
    """A list that holds, after a call of the pipeline, what its scheduler gave last."""
    step = pipe.scheduler.step
    made: list[Tensor] = []

    def keep(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        made[:] = [output[0]]
        return output

    pipe.scheduler.step = keep
    try:
        yield made
    finally:
        del pipe.scheduler.step


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
def denoise(pipe: Any, prompts: list[str], indices: Sequence[int], settings: PictureSettings) -> Tensor:
    """Final latents [B, N, C] of these pictures, where `families.py` has a row for the model."""
    family = family_of(denoiser(pipe)[1])
    return family.generate(
        pipe,
        family.encode(pipe, prompts, cast(int, settings.max_sequence_length)),
        height=settings.height,
        width=settings.width,
        steps=settings.steps,
        guidance=settings.guidance,
        generators=[torch.Generator("cpu").manual_seed(settings.seed + index) for index in indices],
    )


def _decode(pipe: Any, folder: Path, indices: Sequence[int], grid: Grid, progress: Any) -> None:
    """Pictures of latents in the folder, one at a time."""
    family = family_of(denoiser(pipe)[1])
    for index in indices:
        began = time.perf_counter()
        latents = read_tensors(_files(folder, index)[0])["latents"][None]
        (image,) = family.decode(pipe, latents.to(pipe.vae.device), grid)
        _keep_picture(folder, index, image, time.perf_counter() - began)
        progress.update()


def _files(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"{index:06d}.safetensors", folder / f"{index:06d}.png"


def _keep_latents(folder: Path, index: int, latents: Tensor, about: dict[str, str]) -> None:
    """They replace those of another prompt, and its picture."""
    tensors, picture = _files(folder, index)
    picture.unlink(missing_ok=True)
    write_whole(tensors, lambda temporary: save_file({"latents": latents.contiguous()}, temporary, metadata=about))


def _keep_picture(folder: Path, index: int, image: Image.Image, seconds: float) -> None:
    about = PngInfo()
    about.add_text(SECONDS, f"{seconds:.4f}")
    write_whole(_files(folder, index)[1], partial(image.save, format="PNG", pnginfo=about))


def _has_latents(folder: Path, index: int, prompt: str) -> bool:
    tensors, _ = _files(folder, index)
    try:
        return tensors.is_file() and read_header(tensors).get("prompt") == prompt
    except ValueError:  # damaged: made anew
        return False


def _is_picture(path: Path) -> bool:
    """Whether it is there, and can be read to its end."""
    try:
        with Image.open(path) as image:
            image.load()
    except (FileNotFoundError, OSError, SyntaxError):
        return False
    return SECONDS in image.info


def _read(folder: Path, count: int) -> Pictures:
    latents, images, seconds = [], [], []
    for index in range(count):
        tensors, picture = _files(folder, index)
        latents.append(read_tensors(tensors)["latents"])
        with Image.open(picture) as image:
            seconds.append(float(read_header(tensors)[SECONDS]) + float(image.info[SECONDS]))
            images.append(image.convert("RGB"))
    return Pictures(latents=tuple(latents), images=tuple(images), seconds=median(seconds))
