"""Evaluates a student against its teacher: same prompts and noise for both, pictures compared, costs measured."""

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from PIL import Image

from ..linearize.adapters.base import read_json
from ..linearize.describe import describe_attention
from ..linearize.folders import check_writable
from ..linearize.locks import folder_lock, remove_leftovers
from ..pipelines.truncated_prompts import warn_truncated_prompts
from .by_name import ByName as ByName
from .by_name import check_model, open_model
from .cost import picture_peak, picture_peak_in_subprocess, step_seconds
from .files import write_json
from .metrics import Count, Interval, latent_mse, paired_bootstrap, psnr, ssim
from .pictures import Pictures, PictureSettings, make_pictures
from .sheet import GAIN, difference, write_sheet

logger = logging.getLogger(__name__)

REPORT, SHEET, PICTURES = "report.json", "teacher-student-difference.png", "pictures"

Scores = Mapping[str, Count]  # name -> (right, total), of one picture
# the scores of a prompt's picture; empty for a prompt that the judge does not understand
Judge = Callable[[str, Image.Image], Scores]


@dataclass(frozen=True, kw_only=True)
class ModelMeasurements:
    """Measurements of one model.

    Attributes:
        model: Its name, or its class if it was passed in memory.
        attention: One line on what is swapped.
        seconds_per_picture: Text encoding, denoising and decoding; the median.
        seconds_per_step: One warm transformer forward for one picture; the median.
        peak_gib: Of one picture, as measured by `picture_peak`; None: not measured.
        scores: Name -> (right, total), over all prompts that the judge understands.
    """

    model: str
    attention: str
    seconds_per_picture: float
    seconds_per_step: float
    peak_gib: float | None
    scores: dict[str, Count]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences between pictures and the reference's, for the same prompts and noise.

    Attributes:
        pictures: Number of pictures.
        latent_mse: Of final latents in float32: the mean of each picture, then over pictures.
        psnr: Of the decoded 8-bit pictures, in dB, the mean over pictures; infinite if any pair is identical.
        ssim: The mean over pictures.
        differences: Score -> our share minus the reference's, with the paired bootstrap interval.
    """

    pictures: int
    latent_mse: float
    psnr: float
    ssim: float
    differences: dict[str, Interval]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; an infinite PSNR is null."""
        return asdict(self) | {"psnr": self.psnr if isfinite(self.psnr) else None}


@dataclass(frozen=True, kw_only=True)
class Report(Comparison):
    """A student against its teacher.

    Attributes:
        settings: How the pictures were made.
        teacher: Measurements of the teacher.
        student: Measurements of the student.
        sheet: The PNG with teacher, student and difference.
    """

    settings: PictureSettings
    teacher: ModelMeasurements
    student: ModelMeasurements
    sheet: Path

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return super().to_dict() | {"sheet": self.sheet.name}


def evaluate(
    teacher: Any,
    student: Any,
    prompts: Sequence[str],
    directory: str | Path,
    *,
    settings: PictureSettings,
    judge: Judge | None = None,
    memory: bool = True,
    shown: int = 16,
    overwrite: bool = False,
) -> Report:
    """Make the same pictures with both models and compare them; called again, resume where it stopped.

    Args:
        teacher: A pipeline, or a `ByName`, which is loaded when needed.
        student: A pipeline, or a `ByName`.
        prompts: One for each picture.
        directory: Receives report.json, the sheet, and the pictures of both.
        settings: Of the pictures; for both models, picture i starts from the noise of seed `settings.seed + i`.
        judge: Scores pictures by their prompts.
        memory: Measure peak memory: on a GPU in this process, on a CPU in a fresh one (for a `ByName` only).
        shown: Number of pictures in the sheet.
        overwrite: Replace a report of other models, prompts or settings.
    Raises:
        ValueError: no prompt, none shown, an unknown size or model, or a folder that is in use or holds something else.
    """
    if not prompts:
        raise ValueError("prompts must not be empty")
    if shown < 1:
        raise ValueError(f"shown must be >= 1, got {shown}")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"the output must be a folder, but {directory} is a file")
    check_writable(directory)
    with folder_lock(directory):
        remove_leftovers(directory, (f"{REPORT}.*", f"{SHEET}.*"))
        question = _question(teacher, student, prompts, settings)
        _check_contents(directory, question, overwrite)
        for source in (teacher, student):
            check_model(source)  # before the teacher's pictures are made
        pipe = open_model(teacher)
        teacher_settings = settings.with_defaults(pipe)
        warn_truncated_prompts(pipe, prompts, teacher_settings.max_sequence_length)
        # shared by both; for other settings left at None each pipeline uses its own default
        settings = replace(
            settings, height=teacher_settings.height, width=teacher_settings.width, steps=teacher_settings.steps
        )
        measure = partial(
            _measure_model, prompts=prompts, directory=directory, settings=settings, judge=judge, memory=memory
        )
        teacher_side, reference, teacher_scores = measure("teacher", teacher, pipe)
        del pipe  # one model at a time
        gc.collect()  # offloading and conversion create reference cycles
        student_side, pictures, scores = measure("student", student, open_model(student))
        _write_sheet(reference, pictures, shown, directory / SHEET)
        report = Report(
            settings=settings,
            teacher=teacher_side,
            student=student_side,
            sheet=directory / SHEET,
            **vars(compare(pictures, reference, scores, teacher_scores)),
        )
        write_json(directory / REPORT, {"question": question, **report.to_dict()})
        return report


def _write_sheet(reference: Pictures, pictures: Pictures, shown: int, path: Path) -> None:
    pairs = list(zip(reference.images, pictures.images, strict=True))[:shown]
    rows = [(theirs, ours, difference(ours, theirs)) for theirs, ours in pairs]
    write_sheet(("teacher", "student", f"difference x {GAIN}"), rows, path)


def compare(
    ours: Pictures, reference: Pictures, scores: Sequence[Scores] = (), reference_scores: Sequence[Scores] = ()
) -> Comparison:
    """Compare pictures of the same prompts and noise.

    Args:
        scores: A judge's scores of each of our pictures, `reference_scores` of the reference's; () without a judge.
    Raises:
        ValueError: latents have different shapes.
    """
    pairs = list(zip(ours.images, reference.images, strict=True))
    shapes = {tuple(one.shape) for one in (*ours.latents, *reference.latents)}
    if len(shapes) > 1:
        raise ValueError(f"latents must all have the same shape, got {' and '.join(map(str, sorted(shapes)))}")
    return Comparison(
        pictures=len(pairs),
        latent_mse=latent_mse(ours.latents, reference.latents),
        psnr=sum(psnr(*pair) for pair in pairs) / len(pairs),
        ssim=sum(ssim(*pair) for pair in pairs) / len(pairs),
        differences={
            name: paired_bootstrap(_counts(name, scores), _counts(name, reference_scores))
            for name in score_totals(reference_scores)
        },
    )


def score_totals(scores: Sequence[Scores]) -> dict[str, Count]:
    """{score: (right, total)} over all pictures that have it."""
    names = dict.fromkeys(name for one in scores for name in one)
    counts = {name: _counts(name, scores) for name in names}
    return {name: (sum(right for right, _ in one), sum(total for _, total in one)) for name, one in counts.items()}


def _counts(name: str, scores: Sequence[Scores]) -> list[Count]:
    return [one[name] for one in scores if name in one]


def _measure_model(
    role: str,
    source: Any,
    pipe: Any,
    *,
    prompts: Sequence[str],
    directory: Path,
    settings: PictureSettings,
    judge: Judge | None,
    memory: bool,
) -> tuple[ModelMeasurements, Pictures, list[Scores]]:
    attention = describe_attention(pipe)
    logger.info("%s: %s", role, attention)
    pictures = make_pictures(pipe, prompts, directory / PICTURES, settings, name=role)
    logger.info("%s: timing a step%s", role, " and measuring memory (slow on a CPU; --no-memory)" if memory else "")
    scores = [judge(*pair) for pair in zip(prompts, pictures.images, strict=True)] if judge else []
    side = ModelMeasurements(
        model=_name(source),
        attention=attention,
        seconds_per_picture=pictures.seconds,
        seconds_per_step=step_seconds(pipe, settings),
        peak_gib=_peak(pipe, source, settings) if memory else None,
        scores=score_totals(scores),
    )
    return side, pictures, scores


def _peak(pipe: Any, source: Any, settings: PictureSettings) -> float | None:
    if pipe._execution_device.type == "cuda":
        return picture_peak(pipe, settings)
    return picture_peak_in_subprocess(source.open_arguments(), settings) if isinstance(source, ByName) else None


def _name(source: Any) -> str:
    return source.name if isinstance(source, ByName) else type(source).__name__


def _question(teacher: Any, student: Any, prompts: Sequence[str], settings: PictureSettings) -> dict[str, Any]:
    """What a report compares; a different comparison in the same folder would overwrite it."""
    question: dict[str, Any] = {}
    for role, source in (("teacher", teacher), ("student", student)):
        question[role] = _name(source)
        if isinstance(source, ByName):
            options: dict[str, Any] = {"base": source.base, "dtype": source.dtype, "quantization": source.quantization}
            options["offload"] = None if source.offload == "none" else source.offload  # seconds and memory depend on it
            question |= {f"{role}_{name}": value and str(value) for name, value in options.items()}
    drawn = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
    return question | {"prompts": list(prompts), "settings": drawn}


def _check_contents(directory: Path, question: Mapping[str, Any], overwrite: bool) -> None:
    report = directory / REPORT
    if overwrite or all(path.name.startswith(".") for path in directory.iterdir()):
        return  # a lock, or leftovers of a call that was killed before it wrote the report
    if not report.is_file():
        if not (directory / PICTURES).is_dir():
            raise ValueError(f"{directory} is not empty and holds no evaluation: name another folder")
        return
    before = read_json(report).get("question", {})
    changed = [name for name, value in question.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{directory} holds a report with different {', '.join(changed)}: name another folder, or add --overwrite"
        )
