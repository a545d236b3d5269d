"""Shared by benchmarks on the small trained model: its pictures and its students', drawn once, judged, compared."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from marks_report import Row

from lineardit.distill.config import DistillConfig
from lineardit.distill.evaluate import Scores, compare, score_totals
from lineardit.distill.pictures import Pictures, PictureSettings, make_pictures
from lineardit.distill.prepare import prepare
from lineardit.distill.train import distill
from lineardit.examples.tiny_flux import scenes
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.folders import sha256
from lineardit.scene_judge import judge_scene
from lineardit.work_log import WorkLog


@dataclass(frozen=True, kw_only=True)
class ScenePlan:
    """The amount of work."""

    side: int = 128  # pixels
    steps: int = 28  # denoising
    captions: int = 256  # held out
    few_captions: int = 64  # for secondary rows
    text_tokens: int = 64
    samples: int = 192  # of the teacher, to train on
    train_steps: int = 400
    batch_size: int = 4
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class JudgedPictures:
    """Pictures of one model, and the judge's scores of each."""

    pictures: Pictures
    scores: tuple[Scores, ...]

    def first(self, count: int) -> "JudgedPictures":
        """The same for the first captions only."""
        pictures = replace(self.pictures, latents=self.pictures.latents[:count], images=self.pictures.images[:count])
        return JudgedPictures(pictures=pictures, scores=self.scores[:count])


class SceneStudents:
    """A teacher and its students in one folder; results of an interrupted call are reused.

    Args:
        base: The teacher's pipeline.
        directory: New, or that of a call with the same plan.
        calls: Calls recorded per sample to train on; 0: train on final latents.
    """

    def __init__(self, base: Path, directory: Path, plan: ScenePlan, *, calls: int = 0) -> None:
        weights = [sha256(file)[:8] for file in sorted(base.rglob("*.safetensors"))]
        self.base, self.directory, self.plan, self.calls = base, directory, plan, calls
        settings = json.loads(json.dumps(asdict(plan))) | {"base": weights} | ({"calls": calls} if calls else {})
        self.work = WorkLog(directory, settings)
        self.captions = [scenes.sample(index, split="held_out").caption for index in range(plan.captions)]
        self.judged: dict[str, JudgedPictures] = {}

    def draw(self, name: str, source: Path, count: int, *, text_tokens: int | None = None) -> None:
        """Pictures of the first `count` captions; the noise of each is the same for every model."""
        plan = self.plan
        settings = PictureSettings(
            height=plan.side,
            width=plan.side,
            steps=plan.steps,
            max_sequence_length=text_tokens or plan.text_tokens,
            batch_size=8,
        )
        captions = self.captions[:count]
        pictures = make_pictures(open_pipeline(source), captions, self.directory / "pictures", settings, name=name)
        scores = tuple(judge_scene(*pair) for pair in zip(captions, pictures.images, strict=True))
        self.judged[name] = JudgedPictures(pictures=pictures, scores=scores)

    def prepare(self) -> Path:
        """The teacher's samples, on which all students are trained."""
        plan = self.plan
        return prepare(
            open_pipeline(self.base),
            [scenes.sample(index).caption for index in range(plan.samples)],
            self.directory / "samples",
            sizes=[(plan.side, plan.side)],
            steps=plan.steps,
            max_sequence_length=plan.text_tokens,
            calls=self.calls,
            shard_size=16,
        )

    def untrained_adapter(self, method: Any, folder: Path) -> Path:
        """The folder of an untrained conversion, relative to this run's."""
        folder = self.directory / folder
        if not folder.exists():
            convert_base(self.base, method, output=folder)
        return folder

    def tables(self, run: str, seed: int) -> dict[str, dict[str, Any]]:
        """Settings of a student's training in runs/`run` that all rows share."""
        plan = self.plan
        return {
            "base": {"model": str(self.base)},
            "data": {"directory": str(self.directory / "samples")},
            "optimizer": {"lr": plan.learning_rate},
            "schedule": {"warmup": 20},
            "run": {
                "directory": str(self.directory / "runs" / run),
                "steps": plan.train_steps,
                "batch_size": plan.batch_size,
                "seed": seed,
            },
            "save": {"every": 50, "keep_last": 1, "log_every": 50},
            "validate": {"samples": 0},
        }

    def trained_adapter(self, config: DistillConfig) -> Path:
        """The adapter of a student, trained if it does not exist."""
        adapter = Path(config.run.directory) / "adapter"
        return adapter if adapter.exists() else distill(config, resume="latest")

    def row(self, name: str, count: int | None = None) -> Row:
        """One model's figures on the first `count` captions; a student's pictures are compared with the teacher's."""
        judged = self.judged[name] if count is None else self.judged[name].first(count)
        count = len(judged.scores)
        teacher = self.judged["teacher"].first(count)
        return Row(
            name=name,
            pictures=count,
            scores=score_totals(judged.scores),
            seconds_per_picture=judged.pictures.seconds,
            comparison=None
            if name == "teacher"
            else compare(judged.pictures, teacher.pictures, judged.scores, teacher.scores),
        )
