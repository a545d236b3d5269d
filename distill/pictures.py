"""Pictures of one model for many prompts, kept in a folder so that an interrupted evaluation can resume.

A folder belongs to one model and one setting; its name is their digest. Picture i is `00000i.safetensors` (final
latents, packed if the model packs them, with the prompt in the header) and `00000i.png`; each records the seconds it
took. Where `decodes_separately`, latents are written before they are decoded; other pipelines are called once for
both, and the last output of their scheduler is kept as latents.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
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

from ..linearize.calling import arguments_in_errors, call_arguments, default_settings, for_batch
from ..linearize.convert import swapped
from ..linearize.describe import dense_below_of
from ..linearize.folders import read_header, read_tensors, write_atomically
from ..linearize.methods import config_to_dict
from ..linearize.networks import denoiser
from ..linearize.seam.conversion import conversion_of
from ..pipelines.files import check_finite
from ..pipelines.fresh_noise import draw_noise_from
from ..pipelines.sizes import check_size, default_size
from .identity import fingerprint, main_dtype
from .latent_functions import has_latent_functions, latent_functions
from .pipeline_hooks import keep_last_output, tiled_decoding_fallback

logger = logging.getLogger(__name__)

SECONDS = "seconds"  # in a file's header: of denoising, or of decoding


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How pictures are made; the noise of picture i comes from `torch.Generator("cpu").manual_seed(seed + i)`."""

    height: int | None = None  # pixels; None, here and below: the pipeline's default
    width: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    max_sequence_length: int | None = None  # text tokens
    batch_size: int = 4  # affects speed only
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further ones of the pipeline's call

    def __post_init__(self) -> None:
        for name in ("steps", "max_sequence_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), which must be set."""
        assert self.height is not None, "`with_defaults` fills in the pipeline's own"
        assert self.width is not None, "the same"
        return self.height, self.width

    def with_defaults(self, pipe: Any) -> "PictureSettings":
        """A copy with the pipeline's defaults in place of None."""
        defaults = default_settings(pipe)._asdict()
        if self.height is None or self.width is None:
            defaults["height"], defaults["width"] = default_size(pipe)
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def call(self, pipe: Any) -> dict[str, Any]:
        """Arguments of the pipeline's call for these pictures, except prompts and generators."""
        names = ("height", "width", "steps", "guidance", "max_sequence_length")
        return call_arguments(pipe, {name: getattr(self, name) for name in names}, self.arguments)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The output of one model: for each prompt the latents, [N, C] if packed, and the picture."""

    latents: tuple[Tensor, ...]
    images: tuple[Image.Image, ...]
    seconds: float  # per picture, median: text encoding, denoising, decoding


def make_pictures(
    pipe: Any, prompts: Sequence[str], directory: Path, settings: PictureSettings, *, name: str = "pictures"
) -> Pictures:
    """Make one picture for each prompt, or read those that an earlier call with these settings left in the folder.

    Args:
        pipe: On the device where it runs.
        directory: Holds a folder for each model and setting.
        name: The model's, for the progress bar.
    Raises:
        ValueError: the pipeline cannot make this size, or does not return pictures.
    """
    settings = settings.with_defaults(pipe)
    check_size(pipe, *settings.size)
    settings.call(pipe)  # raises for an unknown argument
    folder = directory / digest(pipe, settings)
    folder.mkdir(parents=True, exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    separately = decodes_separately(pipe, settings)
    done = {index for index, prompt in enumerate(prompts) if _has_latents(folder, index, prompt)}
    undecoded = [index for index in sorted(done) if not _is_picture(_files(folder, index)[1])]
    if not separately:
        done, undecoded = done - set(undecoded), []
    missing = [index for index in range(len(prompts)) if index not in done]
    with tqdm(total=len(prompts), initial=len(done) - len(undecoded), desc=name, unit="picture") as progress:
        _decode(pipe, folder, undecoded, settings, progress)
        for start in range(0, len(missing), settings.batch_size):
            batch = missing[start : start + settings.batch_size]
            texts = [prompts[index] for index in batch]
            began = time.perf_counter()
            latents, images = (
                (denoise(pipe, texts, batch, settings), [])
                if separately
                else draw_in_one_call(pipe, texts, batch, settings)
            )
            check_finite(latents)
            seconds = (time.perf_counter() - began) / len(batch)
            for index, prompt, one in zip(batch, texts, latents.cpu(), strict=True):
                _save_latents(folder, index, one, {"prompt": prompt, SECONDS: f"{seconds:.4f}"})
            for index, image in zip(batch, images, strict=False):
                _save_picture(folder, index, image, 0.0)  # the seconds above include decoding
                progress.update()
            if separately:
                _decode(pipe, folder, batch, settings, progress)
    return _read(folder, len(prompts))


def decodes_separately(pipe: Any, settings: PictureSettings) -> bool:
    """Whether latents are made first and decoded later, or the pipeline is called once for both."""
    return has_latent_functions(denoiser(pipe)[1]) and not settings.arguments


def draw_in_one_call(
    pipe: Any, prompts: list[str], indices: Sequence[int], settings: PictureSettings
) -> tuple[Tensor, list[Image.Image]]:
    """Final latents [B, ...] on the CPU, and pictures, from one call of the pipeline.

    Raises:
        ValueError: the pipeline does not return one picture per prompt.
    """
    generators = [torch.Generator("cpu").manual_seed(settings.seed + index) for index in indices]
    call = settings.call(pipe)
    if len(prompts) == 1:  # some pipelines take no lists
        call |= {"prompt": prompts[0], "generator": generators[0]}
    else:
        call = for_batch(call, len(prompts)) | {"prompt": prompts, "generator": generators}
    fresh_noise = draw_noise_from(getattr(pipe, "scheduler", None), generators)
    named_arguments = arguments_in_errors(pipe, settings.arguments)
    with fresh_noise, keep_last_output(pipe) as scheduler_output, tiled_decoding_fallback(pipe), named_arguments:
        output = pipe(**call)
    images = output[0]
    if (
        not scheduler_output
        or not all(isinstance(image, Image.Image) for image in images)
        or len(images) != len(prompts)
    ):
        raise ValueError(
            f"{type(pipe).__name__} does not return one picture per prompt, and only pictures can be evaluated"
        )
    for prompt, flagged in zip(prompts, getattr(output, "nsfw_content_detected", None) or (), strict=False):
        if flagged:
            logger.warning("the pipeline's safety checker blacked out the picture of %r; it is evaluated as is", prompt)
    return scheduler_output[0][: len(prompts)].cpu(), images  # with guidance the batch may hold each twice


def digest(pipe: Any, settings: PictureSettings) -> str:
    """A digest of the weights, the conversion and every setting that changes pictures."""
    _, model = denoiser(pipe)
    kernels: dict[str, Any] = {name: module.linear_kernel for name, module in swapped(model).items()}
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    content = {
        "parts": {name: (fingerprint(part), str(main_dtype(part))) for name, part in parts.items()},
        "methods": {name: config_to_dict(kernel.config) for name, kernel in kernels.items()},
        "scheduler": dict(pipe.scheduler.config),
        "settings": asdict(settings) | {"batch_size": None},
    }
    conversion = conversion_of(model)
    if conversion is not None and not conversion.enabled:
        content["methods"] = "dense"
    elif dense_below := dense_below_of(model):
        content["dense_below"] = dense_below
    if lora_scales := {name: one for name, part in parts.items() if (one := _lora_scales(part))}:
        content["styles"] = lora_scales
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _lora_scales(part: nn.Module) -> dict[str, Any]:
    """Per-layer strength of the user's own LoRA, which is not stored in weights."""
    return {
        name: [layer.scaling, list(layer.active_adapters), layer.disable_adapters]
        for name, module in part.named_modules()
        if hasattr(layer := cast(Any, module), "get_base_layer")
    }


@torch.no_grad()
def denoise(pipe: Any, prompts: list[str], indices: Sequence[int], settings: PictureSettings) -> Tensor:
    """Final latents [B, N, C] of these pictures; the model must have a row in `latent_functions.py`."""
    functions = latent_functions(denoiser(pipe)[1])
    return functions.generate(
        pipe,
        functions.encode(pipe, prompts, cast(int, settings.max_sequence_length)),
        height=settings.height,
        width=settings.width,
        steps=settings.steps,
        guidance=settings.guidance,
        generators=[torch.Generator("cpu").manual_seed(settings.seed + index) for index in indices],
    )


def _decode(pipe: Any, folder: Path, indices: Sequence[int], settings: PictureSettings, progress: Any) -> None:
    """Decode latents in the folder, one picture at a time."""
    if not indices:
        return
    functions = latent_functions(denoiser(pipe)[1])
    grid = functions.grid(pipe, *settings.size)
    for index in indices:
        began = time.perf_counter()
        latents = read_tensors(_files(folder, index)[0])["latents"][None]
        (image,) = functions.decode(pipe, latents.to(pipe._execution_device), grid)
        _save_picture(folder, index, image, time.perf_counter() - began)
        progress.update()


def _files(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"{index:06d}.safetensors", folder / f"{index:06d}.png"


def _save_latents(folder: Path, index: int, latents: Tensor, metadata: dict[str, str]) -> None:
    """Write the latents of one picture, replacing those of another prompt and removing its picture."""
    tensors, picture = _files(folder, index)
    picture.unlink(missing_ok=True)
    write_atomically(
        tensors, lambda temporary: save_file({"latents": latents.contiguous()}, temporary, metadata=metadata)
    )


def _save_picture(folder: Path, index: int, image: Image.Image, seconds: float) -> None:
    metadata = PngInfo()
    metadata.add_text(SECONDS, f"{seconds:.4f}")
    write_atomically(_files(folder, index)[1], partial(image.save, format="PNG", pnginfo=metadata))


def _has_latents(folder: Path, index: int, prompt: str) -> bool:
    tensors, _ = _files(folder, index)
    try:
        return tensors.is_file() and read_header(tensors).get("prompt") == prompt
    except ValueError:  # damaged: make it again
        return False


def _is_picture(path: Path) -> bool:
    """Whether the file exists and can be read completely."""
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
