"""A cascade as files: every stage's picture for viewing, its latents for resuming, and one PNG at the end.

For `out.png`, the folder `out.stages` holds `1-1024x1024.png` and so on. The latents in it are removed once the PNG is
written.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..linearize.calling import arguments_in_errors, call_arguments
from ..linearize.errors import UnsupportedModelError
from .files import (
    PictureJob,
    check_stages,
    latents_metadata,
    log_kept_latents,
    missing_pictures,
    other_stages,
    read_latents,
    remove_stage_latents,
    save_latents,
    settings_metadata,
    warn_on_write_error,
    write_latents,
    write_picture,
    write_png,
)
from .high_resolution import HighResolutionPipeline
from .plan import Plan, Settings
from .truncated_prompts import warn_truncated_prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedCascade:
    """A pipeline and its plan; `picture`: the picture to enlarge, None: a prompt alone."""

    pipe: Any
    plan: Plan
    picture: Image.Image | None = None


def cascade_for_size(
    pipe: Any,
    height: int,
    width: int,
    settings: Settings,
    *,
    steps: int | None,
    text_len: int | None,
    requested: bool | None,
    tile: int | None = 1024,
) -> PlannedCascade | None:
    """The cascade that makes this size; None if one call of the pipeline is enough.

    Args:
        steps: Of the first stage; None: the pipeline's default. The settings are for the others.
        requested: None: a cascade if the size takes several stages and the pipeline supports one.
        tile: Side in pixels of the VAE's tiles; None: in one piece.
    Raises:
        UnsupportedModelError: a cascade is requested, and there is none for this model.
    """
    if requested is False:
        return None
    try:
        high = HighResolutionPipeline.from_pipe(pipe)
    except UnsupportedModelError:
        if requested:
            raise
        return None
    if not requested and height * width <= 2 * high.native_size**2:
        return None  # one stage, which the pipeline makes with any scheduler
    plan = high.plan(height, width, num_inference_steps=steps, settings=settings, tile=tile, text_len=text_len)
    return PlannedCascade(high, plan)


def enlarge(
    pipe: Any,
    picture: Image.Image,
    job: PictureJob,
    size: tuple[int, int],
    settings: Settings,
    *,
    tile: int | None = Plan.tile,
    guidance: float | None,
    max_sequence_length: int | None,
    arguments: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Enlarge a picture and write it as `make_in_stages` does; an existing one made with the same settings is kept.

    Args:
        size: (height, width) in pixels.
        tile: Side in pixels of the VAE's tiles; None: in one piece.
        guidance, max_sequence_length: Of the pipeline; None: its default.
        arguments: Further ones of its call, such as {"negative_prompt": "blurry"}.
        overwrite: Replace the files of another picture under this name.
    Raises:
        UnsupportedModelError: there is no cascade for this model.
        ValueError: the size is not larger than the picture, a setting is out of range, or another picture, its latents
            or its stages exist under this name.
    """
    check_larger(picture, size)
    high = HighResolutionPipeline.from_pipe(pipe)
    shape = (picture.height, picture.width)
    plan = high.plan(*size, settings=settings, enlarge=shape, tile=tile, text_len=max_sequence_length)
    call_settings = {"guidance": guidance, "max_sequence_length": max_sequence_length}
    metadata = settings_metadata({**call_settings, **(arguments or {})})
    job = replace(job, text={**job.text, **metadata, "stages": plan.recipe(), "picture": _fingerprint(picture)})
    if not overwrite:
        if not missing_pictures([job]):
            return
        check_stages(job)
    call = call_arguments(high, call_settings, arguments)
    warn_truncated_prompts(pipe, [job.prompt], max_sequence_length)
    with arguments_in_errors(high, arguments):
        make_in_stages(PlannedCascade(high, plan, picture), job, call)


def check_larger(picture: Image.Image, size: tuple[int, int]) -> None:
    """Raise a ValueError where a size (height, width) does not enlarge a picture."""
    if min(size[0] / picture.height, size[1] / picture.width) <= 1:
        got = f"{size[1]}x{size[0]} from {picture.width}x{picture.height}"
        raise ValueError(f"size must be larger than the picture on both sides, got {got}")


def make_in_stages(staged: PlannedCascade, job: PictureJob, call: Mapping[str, Any]) -> None:
    """Make one picture, resuming after the last stage on disk; if all stages exist, only decode.

    Stages of another picture under its name are removed.
    """
    for file in other_stages(job):
        file.unlink()
    if (latents := _matching_latents(job.latents, job)) is not None:
        logger.info("%s: all stages exist; decoding", job.path)
        with log_kept_latents([job]):
            write_picture(job, staged.pipe.decode_last(latents, staged.plan)[0])
        remove_stage_latents(job.path, job.text)
        return
    folder = job.stages
    latents, done = _last_latents(folder, job, len(staged.plan.stages) - 1)
    if done:
        finished = "stage 1 already exists" if done == 1 else f"stages 1 to {done} already exist"
        logger.info("%s: %s", job.path, finished)

    @warn_on_write_error()
    def on_stage_end(_pipe: Any, number: int, results: dict[str, Any]) -> None:
        stage = staged.plan.stages[number]
        if "latents" in results:
            if number + 1 == len(staged.plan.stages):
                save_latents([job], results["latents"])
            else:
                write_latents(folder / f"{number + 1}.latents.safetensors", results["latents"], job.text)
        for image in results.get("images", ()):
            file = folder / f"{number + 1}-{stage.width}x{stage.height}.png"
            write_png(file, image, job.text)

    with log_kept_latents([job]):
        image = staged.pipe(
            job.prompt,
            plan=staged.plan,
            image=staged.picture if done == 0 else None,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            callback_on_stage_end=on_stage_end,
            start_latents=latents,
            start_stage=done,
            **call,
        ).images[0]
        write_picture(job, image)
    remove_stage_latents(job.path, job.text)


def _last_latents(folder: Path, job: PictureJob, last: int) -> tuple[Tensor | None, int]:
    """The latents of the last stage made with the same settings, and its number; (None, 0) if there is none."""
    for number in range(last, 0, -1):
        if (latents := _matching_latents(folder / f"{number}.latents.safetensors", job)) is not None:
            return latents, number
    return None, 0


def _matching_latents(file: Path, job: PictureJob) -> Tensor | None:
    """The latents in a file; None if made with other settings, damaged, or not finite."""
    if not file.exists() or latents_metadata(file) != dict(job.text):
        return None
    latents, _ = read_latents(file)
    return latents if latents.isfinite().all() else None


def _fingerprint(picture: Image.Image) -> str:
    return hashlib.sha256(picture.tobytes()).hexdigest()
