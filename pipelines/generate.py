"""Pictures from prompts, as PNG files that say how they were made, whole or not at all.

The latents of a picture are saved before they are decoded, so that a decoder that runs out of memory loses no work.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..linearize.convert import denoiser, swapped
from ..linearize.folders import write_whole
from ..linearize.standing import describe_implementations, implementations_seen
from .sizes import check_size, default_size

logger = logging.getLogger(__name__)

Text = Mapping[str, str]
MAX_SEED = 2**63  # what a generator takes


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One picture to make: the file, the seed of its noise, and what is written into the PNG."""

    path: Path
    prompt: str
    seed: int
    text: Text

    @property
    def latents(self) -> Path:
        """Where its latents wait for the decoder."""
        return self.path.with_suffix(".latents.safetensors")


def generate(
    pipe: Any,
    prompts: Sequence[str],
    output: str | Path,
    *,
    size: tuple[int, int] | None = None,
    steps: int = 28,
    seed: int = 0,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    batch_size: int = 1,
    about: Text | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Make a picture for each prompt.

    Args:
        pipe: A text-to-image pipeline on its device, converted or not.
        prompts: Several become numbered files in a folder.
        output: A file that ends in .png for one prompt, else a folder; pictures that a folder already holds are not
            made again, so that an interrupted call goes on.
        size: (height, width) in pixels; None: the pipeline's own.
        steps: Denoising steps.
        seed: Noise of picture i comes from `torch.Generator("cpu").manual_seed(seed + i)`.
        guidance: `guidance_scale` of the pipeline; None: the pipeline's own.
        max_sequence_length: Text tokens; None: the pipeline's own.
        batch_size: Pictures at a time; it changes nothing but speed and memory.
        about: What else to write into the PNG, such as {"model": ...}.
        overwrite: Replace what is there.
    Returns:
        The files, in the order of the prompts.
    Raises:
        ValueError: a setting is out of range or not known to this pipeline, the model cannot make this size, or a
            file is there that was made otherwise.
    """
    if min(steps, batch_size) < 1 or not 0 <= seed < MAX_SEED:
        raise ValueError(f"steps and batch_size must be >= 1, seed >= 0, got {steps}, {batch_size} and {seed}")
    height, width = size or default_size(pipe)
    check_size(pipe, height, width)
    settings = {"steps": steps, "guidance": guidance, "max_sequence_length": max_sequence_length}
    call = _call(pipe, settings | {"height": height, "width": width})
    said = {name: str(value) for name, value in settings.items() if value is not None}
    text = {"size": f"{width}x{height}", **said, **(about or {})}
    wanted = plan_files(prompts, Path(output), seed=seed, text=text)
    missing = wanted if overwrite else _not_there(wanted, Path(output))
    progress = tqdm(total=len(missing) * steps, desc="generate", unit="step", disable=not missing)
    with progress, logging_redirect_tqdm():
        for start in range(0, len(missing), batch_size):
            _make(pipe, missing[start : start + batch_size], call, progress, tell_kernel=start == 0)
    return [one.path for one in wanted]


def plan_files(prompts: Sequence[str], output: Path, *, seed: int, text: Text) -> list[Wanted]:
    """The files that `generate` makes.

    Raises:
        ValueError: no prompt or an empty one, or a file name for several prompts, or another format than PNG.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("prompts must hold at least one prompt, and none may be empty")
    if output.suffix.lower() == ".png":
        if len(prompts) > 1:
            raise ValueError(f"output must be a folder for {len(prompts)} prompts, got the file {output}")
        paths = [output]
    elif output.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"output must end in .png, or name a folder, got {output}")
    else:
        digits = max(3, len(str(len(prompts) - 1)))
        paths = [output / f"{index:0{digits}d}.png" for index in range(len(prompts))]
    return [
        Wanted(path=path, prompt=prompt, seed=seed + index, text={"prompt": prompt, "seed": str(seed + index), **text})
        for index, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
    ]


def _not_there(wanted: Sequence[Wanted], output: Path) -> list[Wanted]:
    """Those to make; a picture in a folder that says it was made just so is kept."""
    present = [one for one in wanted if one.path.exists()]
    for one in present:
        if one.path == output or _text_of(one.path) != one.text:
            raise ValueError(
                f"{one.path} exists and is kept: name another output, or replace it with overwrite (--overwrite)"
            )
    if present:
        logger.info("%d of %d pictures are there already", len(present), len(wanted))
    return [one for one in wanted if one not in present]


def _text_of(path: Path) -> Text:
    try:
        with Image.open(path) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except OSError:  # no picture at all
        return {}


def _call(pipe: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline's call, those left open by the user left out."""
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    known = inspect.signature(pipe.__call__).parameters
    call = {}
    for name, value in settings.items():
        argument = names.get(name, name)
        if value is not None and argument not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {argument}: leave {name} out, got {value}")
        if value is not None:
            call[argument] = value
    return call


def _make(pipe: Any, batch: Sequence[Wanted], call: Mapping[str, Any], progress: Any, *, tell_kernel: bool) -> None:
    """Denoise, save the latents, decode, write the pictures, remove the latents."""
    for one in batch:
        one.path.parent.mkdir(parents=True, exist_ok=True)
    generators = [torch.Generator("cpu").manual_seed(one.seed) for one in batch]
    _, model = denoiser(pipe)
    pipe.set_progress_bar_config(disable=True)
    with _latents_kept(batch), implementations_seen(pipe) as seen:

        def after_step(step: int, latents: Tensor) -> None:
            progress.update(len(batch))
            if step == 0 and tell_kernel and swapped(model):
                logger.info("kernel: %s", describe_implementations(seen, model))
            if step + 1 == len(pipe.scheduler.timesteps):
                _save_latents(batch, latents)

        prompts = [one.prompt for one in batch]
        images = pipe(prompts, generator=generators, **call, **_callback(pipe, after_step)).images
        for one, image in zip(batch, images, strict=True):
            _write(one, image)


def _callback(pipe: Any, after_step: Callable[[int, Tensor], None]) -> dict[str, Any]:
    """The arguments that make a pipeline call `after_step(step, latents)`; older pipelines know another form."""

    def on_step_end(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        after_step(step, tensors["latents"])
        return tensors

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        return {"callback_on_step_end": on_step_end}
    return {"callback": lambda step, _timestep, latents: after_step(step, latents)}


def _save_latents(batch: Sequence[Wanted], latents: Tensor) -> None:
    for one, row in zip(batch, latents.split(1), strict=True):
        write_whole(one.latents, partial(save_file, {"latents": row.cpu().contiguous()}, metadata=dict(one.text)))


def _write(one: Wanted, image: Image.Image) -> None:
    info = PngInfo()
    for key, value in one.text.items():
        info.add_text(key, value)
    write_whole(one.path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))
    one.latents.unlink(missing_ok=True)


@contextmanager
def _latents_kept(batch: Sequence[Wanted]) -> Iterator[None]:
    """Say where the latents are if decoding does not come to its end."""
    try:
        yield
    finally:
        if left := [str(one.latents) for one in batch if one.latents.exists()]:
            logger.warning("not decoded; the finished latents are kept in %s", ", ".join(left))
