"""Picture files: their names, their metadata on how they were made, and latents that are not decoded yet."""

import logging
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..linearize.errors import NotFiniteError
from ..linearize.folders import check_writable, write_atomically

logger = logging.getLogger(__name__)

Text = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class PictureJob:
    """One picture to make: the file, the seed of its noise, and what is written into the PNG."""

    path: Path
    prompt: str
    seed: int
    text: Text

    @property
    def latents(self) -> Path:
        """The file of its latents until they are decoded."""
        return self.path.with_suffix(".latents.safetensors")

    @property
    def stages(self) -> Path:
        """The folder of its stages, if it takes several."""
        return stages_folder(self.path)


def stages_folder(picture: Path) -> Path:
    """Where the stages of a picture are kept."""
    return picture.parent / f"{picture.stem}.stages"


def remove_stage_latents(picture: Path, text: Text) -> None:
    """Remove the latents of this picture's stages, which are not needed once it is finished."""
    for file in stages_folder(picture).glob("*.latents.safetensors"):
        if latents_metadata(file) == text:
            file.unlink()


def plan_files(prompts: Sequence[str], output: Path, *, seed: int, text: Text) -> list[PictureJob]:
    """The files that `generate` makes.

    Raises:
        ValueError: no prompt or an empty one, a file name for several prompts, or a format other than PNG.
        OSError: they cannot be written there.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(
            "prompts must hold at least one prompt, and none may be empty: give a prompt, or a file of them (--prompts)"
        )
    for words in (*prompts, *text.values()):
        check_text(words)
    if output.suffix.lower() == ".png":
        if len(prompts) > 1:
            raise ValueError(f"output must be a folder for {len(prompts)} pictures, got the file {output}")
        if output.is_dir():
            raise ValueError(f"output must be a file, {output} is a folder")
        paths = [output]
    elif output.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"output must end in .png, or name a folder, got {output}")
    else:
        # padding does not depend on the number of prompts, so that adding prompts keeps earlier names
        paths = [output / f"{index:03d}.png" for index in range(len(prompts))]
    check_writable(paths[0].parent)
    return [
        PictureJob(
            path=path, prompt=prompt, seed=seed + index, text={"prompt": prompt, "seed": str(seed + index), **text}
        )
        for index, (path, prompt) in enumerate(zip(paths, prompts, strict=True))
    ]


def check_text(words: str) -> None:
    """Raise a ValueError for words that are not UTF-8 text: bytes of another encoding, as a shell may pass on."""
    try:
        words.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompts and arguments must be text in UTF-8, got {words!r}: type it again in a UTF-8 locale"
        ) from error


def settings_metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of a picture's settings: those that are not None."""
    return {name: str(value) for name, value in settings.items() if value is not None}


def missing_pictures(jobs: Sequence[PictureJob]) -> list[PictureJob]:
    """The pictures still to be made; existing ones with the same metadata are kept.

    Raises:
        ValueError: a picture exists with other metadata, or latents of another picture exist under its name.
    """
    missing = [job for job in jobs if not job.path.exists()]
    for job in jobs:
        if job.path.exists() and png_metadata(job.path) != job.text:
            raise ValueError(_exists_message(job.path))
    if num_existing := len(jobs) - len(missing):
        subject = "the picture already exists"
        logger.info("%s", subject if len(jobs) == 1 else f"{num_existing} of {len(jobs)} pictures already exist")
    for job in missing:
        check_latents(job)
    return missing


def check_existing_pictures(jobs: Sequence[PictureJob]) -> None:
    """Raise a ValueError if an existing picture does not have all the metadata of the wanted one."""
    for job in jobs:
        if job.path.exists() and not job.text.items() <= png_metadata(job.path).items():
            raise ValueError(_exists_message(job.path))


def _exists_message(path: Path) -> str:
    return (
        f"{path} exists, was made with other settings, and is kept: name another output, or replace it with overwrite "
        "(--overwrite)"
    )


def check_latents(job: PictureJob) -> None:
    """Raise a ValueError if latents of another picture exist under this one's name, not decoded yet."""
    if not job.latents.exists():
        return
    text = latents_metadata(job.latents)
    if not text:
        raise ValueError(
            f"{job.latents} is damaged, or no file of latents: remove it, name another output, or replace it with "
            "overwrite (--overwrite)"
        )
    if not job.text.items() <= text.items():
        raise ValueError(
            f"{job.latents} holds another picture, not decoded yet: decode it with `lineardit decode`, name another "
            "output, or replace it with overwrite (--overwrite)"
        )


def check_stages(job: PictureJob) -> None:
    """Raise a ValueError where stages of another picture, or damaged ones, are kept under this one's name."""
    if others := other_stages(job):
        raise ValueError(
            f"{job.stages} holds stages of another picture, or damaged ones ({others[0].name}): name another output, "
            "or replace them with overwrite (--overwrite)"
        )


def other_stages(job: PictureJob) -> list[Path]:
    """Files of stages under this picture's name that belong to another picture or are damaged."""
    metadata = {file: latents_metadata(file) for file in job.stages.glob("*.latents.safetensors")}
    metadata |= {file: dict(png_metadata(file)) for file in job.stages.glob("*-*x*.png")}
    return [file for file, text in metadata.items() if text != dict(job.text)]


def png_metadata(path: Path) -> Text:
    """Metadata of a PNG of any size, which `Image.open` limits; empty if the file is not a PNG."""
    try:
        with PngImageFile(path) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError, IndexError, TypeError, EOFError, struct.error):  # what Pillow raises
        return {}


def save_latents(batch: Sequence[PictureJob], latents: Tensor) -> None:
    """Write each picture's final latents with the metadata of its PNG; errors as in `write_latents`."""
    for job, row in zip(batch, latents.split(1), strict=True):
        write_latents(job.latents, row, job.text)


def check_finite(latents: Tensor) -> None:
    """Raise a NotFiniteError for latents that hold NaN or infinity."""
    if not latents.isfinite().all():
        raise NotFiniteError(
            f"the model made latents that are not finite, in {latents.dtype}: load it in another dtype "
            "(--dtype float32), or check that its weights are intact"
        )


def write_latents(file: Path, latents: Tensor, text: Text) -> None:
    """Write one picture's latents and metadata atomically; creates their folder.

    Raises:
        ValueError: they are not finite.
        OSError: they cannot be written.
    """
    check_finite(latents)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, partial(save_file, {"latents": latents.cpu().contiguous()}, metadata=dict(text)))


def read_latents(file: Path) -> tuple[Tensor, dict[str, str]]:
    """Latents as they were saved, and their picture's metadata.

    Raises:
        ValueError: it is not a file of latents.
        OSError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as content:
            return content.get_tensor("latents"), dict(content.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete file of latents as written by generate: {error}") from error


def latents_metadata(file: Path) -> dict[str, str]:
    """Metadata in a file of latents; empty if the file is damaged, or holds something else."""
    try:
        with safe_open(file, framework="pt") as content:
            return dict(content.metadata() or {})
    except SafetensorError:
        return {}


def write_picture(job: PictureJob, image: Image.Image) -> None:
    """Write the PNG and remove the latents."""
    write_png(job.path, image, job.text)
    job.latents.unlink(missing_ok=True)


def write_png(path: Path, image: Image.Image, text: Text) -> None:
    """Write a picture with its metadata atomically; creates its folder."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info))


@contextmanager
def warn_on_write_error() -> Iterator[None]:
    """Inside, intermediate files that cannot be written (full disk) cause a warning, and the picture is still made."""
    try:
        yield
    except OSError as error:
        logger.warning("latents cannot be saved, but the picture is still made: %s", error)


@contextmanager
def log_kept_latents(batch: Sequence[PictureJob]) -> Iterator[None]:
    """On exit, log where the latents are if decoding did not finish."""
    try:
        yield
    finally:
        if files := [str(job.latents) for job in batch if job.latents.exists()]:
            logger.warning("not decoded; the finished latents are kept in %s, for `lineardit decode`", ", ".join(files))
