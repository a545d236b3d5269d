"""Pictures from prompts, written atomically as PNG files whose metadata say how they were made.

The latents of a picture are saved before they are decoded, so that a decoder that runs out of memory loses no work.
"""

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..linearize.calling import arguments_in_errors, call_arguments, default_settings, for_batch
from ..linearize.convert import swapped
from ..linearize.networks import denoiser
from .cascade import PlannedCascade, cascade_for_size, make_in_stages
from .files import (
    PictureJob,
    Text,
    check_stages,
    log_kept_latents,
    missing_pictures,
    plan_files,
    save_latents,
    settings_metadata,
    warn_on_write_error,
    write_picture,
)
from .fresh_noise import draw_noise_from
from .kernel_log import log_kernels
from .plan import MAX_STEPS, Plan, Settings
from .sizes import check_size, default_size
from .token_chunks import in_token_chunks
from .truncated_prompts import warn_truncated_prompts

logger = logging.getLogger(__name__)

MAX_SEED = 2**63  # seeds of a generator are below it


def generate(
    pipe: Any,
    prompts: Sequence[str],
    output: str | Path,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    batch_size: int = 1,
    cascade: bool | None = None,
    chunk_tokens: int | None = None,
    settings: Settings | None = None,
    tile: int | None = 1024,
    arguments: Mapping[str, Any] | None = None,
    part: tuple[int, int] = (1, 1),
    about: Text | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Make a picture for each prompt.

    Args:
        pipe: A text-to-image pipeline on its device, converted or not.
        prompts: Several become numbered files in a folder; a repeated prompt gets other noise.
        output: A file that ends in .png for one prompt, else a folder. Existing pictures made with the same settings
            are kept, so that an interrupted call can resume.
        size: (height, width) in pixels; None: the pipeline's default.
        steps: Denoising steps; None: the pipeline's default, or 28.
        seed: Noise of picture i comes from `torch.Generator("cpu").manual_seed(seed + i)`.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's default.
        max_sequence_length: Text tokens; None: the pipeline's default.
        batch_size: Pictures at a time; affects speed and memory only. Cascades make one at a time.
        cascade: Make any size in stages from the model's native size (`high_resolution.py`); None: if the size is more
            than twice the native area and the pipeline supports it. Interrupted ones resume after their last stage.
        chunk_tokens: Run token-wise layers on this many tokens at a time, for less memory (FLUX.1); None: only in a
            cascade that exceeds the GPU's free memory.
        settings: Of a cascade's later stages; None: the defaults.
        tile: Side in pixels of the VAE's tiles in a cascade; None: in one piece.
        arguments: Further ones of the pipeline's call, such as {"negative_prompt": "blurry"}.
        part: (i, n): make every n-th picture from the i-th on; other processes make the others.
        about: Further metadata of the PNG, such as {"model": ...}.
        overwrite: Replace existing files.
    Returns:
        The files of this part, in the order of the prompts.
    Raises:
        ValueError: a setting is out of range or unknown to this pipeline, the model cannot make this size, or a file
            exists that was made with other settings.
        OSError: the files cannot be written.
    """
    steps = (default_settings(pipe).steps or 28) if steps is None else steps
    _check_numbers(steps, batch_size, seed, part)
    height, width = size or default_size(pipe)
    call_settings = {"steps": steps, "guidance": guidance, "max_sequence_length": max_sequence_length}
    text = {"size": f"{width}x{height}", **settings_metadata({**call_settings, **(arguments or {})}), **(about or {})}
    staged = plan_cascade(
        pipe,
        size=(height, width),
        steps=steps,
        max_sequence_length=max_sequence_length,
        cascade=cascade,
        chunk_tokens=chunk_tokens,
        settings=settings,
        tile=tile,
    )
    if staged is not None:
        text |= {"stages": staged.plan.recipe()}
    jobs = plan_files(prompts, Path(output), seed=seed, text=text)[part[0] - 1 :: part[1]]
    missing = jobs if overwrite else missing_pictures(jobs)
    warn_truncated_prompts(pipe, [one.prompt for one in missing], max_sequence_length)
    if staged is not None:
        _make_in_stages(staged, missing, call_settings, arguments, overwrite=overwrite)
        return [one.path for one in jobs]
    call = call_arguments(pipe, call_settings | {"height": height, "width": width}, arguments)
    with nullcontext() if chunk_tokens is None else in_token_chunks(pipe, chunk_tokens):
        _make_at_once(pipe, missing, call, arguments, steps=steps, batch_size=batch_size)
    return [one.path for one in jobs]


def _check_numbers(steps: int, batch_size: int, seed: int, part: tuple[int, int]) -> None:
    if min(steps, batch_size) < 1 or not 0 <= seed < MAX_SEED:
        raise ValueError(f"steps and batch_size must be >= 1, seed >= 0, got {steps}, {batch_size} and {seed}")
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be <= {MAX_STEPS}, got {steps}")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part must be (i, n) with 1 <= i <= n, got {part}")


def _make_in_stages(
    staged: PlannedCascade,
    missing: Sequence[PictureJob],
    call_settings: Mapping[str, Any],
    arguments: Mapping[str, Any] | None,
    *,
    overwrite: bool,
) -> None:
    """Run the cascade for one picture after the other."""
    call = call_arguments(staged.pipe, call_settings, arguments)
    for job in () if overwrite else missing:
        check_stages(job)
    with logging_redirect_tqdm(), arguments_in_errors(staged.pipe, arguments):
        for job in missing:
            make_in_stages(staged, job, call)


def _make_at_once(
    pipe: Any,
    missing: Sequence[PictureJob],
    call: Mapping[str, Any],
    arguments: Mapping[str, Any] | None,
    *,
    steps: int,
    batch_size: int,
) -> None:
    """Call the pipeline once for each batch of pictures."""
    progress = tqdm(total=len(missing) * steps, desc="generate", unit="step", disable=not missing)
    with progress, logging_redirect_tqdm():
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            _make(pipe, batch, call, progress, arguments=arguments, log_kernel=start == 0)


def plan_cascade(
    pipe: Any,
    *,
    size: tuple[int, int] | None,
    steps: int | None,
    max_sequence_length: int | None,
    cascade: bool | None,
    chunk_tokens: int | None,
    settings: Settings | None,
    tile: int | None,
) -> PlannedCascade | None:
    """The cascade that `generate` runs with these arguments, with its plan; None if one call of the pipeline is enough.

    Raises:
        ValueError: the model cannot make this size, or settings of a cascade are out of range or given without one.
    """
    height, width = size or default_size(pipe)
    stage_settings = settings or Settings()
    if chunk_tokens is not None:
        stage_settings = replace(stage_settings, chunk_tokens=chunk_tokens)
    text_len = max_sequence_length
    staged = cascade_for_size(
        pipe, height, width, stage_settings, steps=steps, text_len=text_len, requested=cascade, tile=tile
    )
    if settings is not None and (staged is None or len(staged.plan.stages) == 1):
        remedy = "make a larger picture" if cascade is not False else "leave out cascade=False (--direct)"
        raise ValueError(
            "settings (--strength, --stage-steps, --sharpen) are for the later stages of a cascade, but "
            f"{width}x{height} is made in one stage: leave them out, or {remedy}"
        )
    if staged is None:
        if tile != Plan.tile:
            raise ValueError(
                f"tile (--tile) is for a cascade, but {width}x{height} is made in one stage: leave it out, or add "
                "cascade=True (--cascade)"
            )
        try:
            check_size(pipe, height, width)
        except ValueError as error:
            raise ValueError(
                f"{error}; a cascade (cascade=True, --cascade) makes any size, if the model supports it"
            ) from error
    return staged


def _make(
    pipe: Any,
    batch: Sequence[PictureJob],
    call: Mapping[str, Any],
    progress: Any,
    *,
    arguments: Mapping[str, Any] | None,
    log_kernel: bool,
) -> None:
    """Denoise, save the latents, decode, write the pictures, remove the latents."""
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in batch]
    _, model = denoiser(pipe)
    pipe.set_progress_bar_config(disable=True)
    with log_kept_latents(batch), log_kernels(pipe) if log_kernel and swapped(model) else nullcontext():

        def after_step(step: int, latents: Tensor) -> None:
            progress.update(len(batch))
            if step + 1 == len(pipe.scheduler.timesteps):
                with warn_on_write_error():
                    save_latents(batch, latents)

        prompts = [job.prompt for job in batch]
        given = for_batch(call, len(prompts)) | _callback(pipe, after_step)
        with arguments_in_errors(pipe, arguments), draw_noise_from(pipe.scheduler, generators):
            images = pipe(prompt=prompts, generator=generators, **given).images
        for job, image in zip(batch, images, strict=True):
            write_picture(job, image)


def _callback(pipe: Any, after_step: Callable[[int, Tensor], None]) -> dict[str, Any]:
    """The arguments that make a pipeline call `after_step(step, latents)`; older pipelines take another form."""

    def on_step_end(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        after_step(step, tensors["latents"])
        return tensors

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": on_step_end}
    return {"callback": lambda step, _timestep, latents: after_step(step, latents)}
