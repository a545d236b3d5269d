"""The marks of the main job, on the small trained model: `make marks`, about an hour on two idle cores, resumable.

Clear(radius=4), taught by the model itself: does the student still follow held-out captions, do its pictures still hang
together, how near are its latents, and what does each term of the loss bring? Writes benchmarks/results/marks.json,
marks.md and marks.png.
"""

import argparse
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marks_report import Mark, Row, as_markdown, student_marks, teacher_marks
from scene_students import ScenePlan, SceneStudents

from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.files import write_json
from lineardit.distill.launch import launch
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path
from lineardit.linearize.conversion import convert_base
from lineardit.linearize.folders import write_whole
from lineardit.linearize.methods import Clear
from lineardit.stages import matmul_gflops

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).with_name("results")
TERMS = ("flow", "prediction", "attention")


@dataclass(frozen=True, kw_only=True)
class Plan(ScenePlan):
    """The defaults fit the hour."""

    radius: float = 4
    shown: int = 12  # rows of the sheet


class Marks(SceneStudents):
    """One run of all stages, in a folder of its own."""

    plan: Plan

    def run(self) -> None:
        """What the marks need."""
        plan, directory = self.plan, self.directory
        with self.stages.stage("teacher's pictures"):
            self.draw("teacher", self.base, plan.captions)
        with self.stages.stage("pictures of the swap without training"):
            if not (directory / "converted").exists():
                convert_base(self.base, Clear(radius=plan.radius), output=directory / "converted")
            self.draw("0 steps", directory / "converted", plan.captions)
        with self.stages.stage("samples"):
            self.prepare()
        with self.stages.stage("distill"):
            self.distill("default")
        with self.stages.stage("pictures of the student"):
            self.draw("default", self.adapter("default"), plan.captions)
        with self.stages.stage("teacher with 512 text positions"):
            self.draw("teacher, 512 text tokens", self.base, plan.few_captions, text_tokens=512)

    def run_without_terms(self) -> None:
        """The rows beside the marks: what each term of the loss brings."""
        plan = self.plan
        for term in TERMS:
            with self.stages.stage(f"without the {term} loss"):
                self.distill(f"no {term}", f"loss.{term}=0.0")
                self.draw(f"no {term}", self.adapter(f"no {term}"), plan.few_captions)

    def adapter(self, name: str) -> Path:
        return self.directory / "runs" / name.replace(" ", "-") / "adapter"

    def distill(self, name: str, *changes: str) -> None:
        """Train one student; `changes` are settings that differ from the default."""
        plan, adapter = self.plan, self.adapter(name)
        if adapter.exists():
            return
        settings = [
            f"base.model={json.dumps(str(self.base))}",
            f"data.directory={json.dumps(str(self.directory / 'samples'))}",
            f"method.radius={plan.radius}",
            f"run.directory={json.dumps(str(adapter.parent))}",
            f"run.steps={plan.train_steps}",
            f"run.batch_size={plan.batch_size}",
            f"optimizer.lr={plan.learning_rate}",
            *changes,
        ]
        options = [word for setting in settings for word in ("--set", setting)]
        if launch(Path(__file__).with_name("marks.toml"), ["--resume", "latest", *options]):
            raise RuntimeError(f"the distillation {name!r} stopped; what it said stands above")

    def rows(self) -> list[Row]:
        return [self.row(name) for name in self.made]

    def marks(self) -> list[Mark]:
        teacher, long = self.row("teacher"), self.row("teacher, 512 text tokens")
        return [*teacher_marks(teacher, long), *student_marks(self.row("default"), self.row("0 steps"))]


def write_results(results: Path, run: Marks) -> None:
    """marks.json, marks.md and marks.png, of what has been made."""
    rows, marks = run.rows(), run.marks()
    results.mkdir(parents=True, exist_ok=True)
    columns = ("teacher", "0 steps", "default")
    shown = [run.made[name].pictures.images[: run.plan.shown] for name in columns]
    write_sheet(columns, list(zip(*shown, strict=True)), results / "marks.png")
    taken = run.stages.total()
    machine = (
        f"Took {taken['seconds'] / 60:.0f} minutes, {taken['cpu_seconds'] / 60:.0f} CPU-minutes; "
        f"float32 matrix product: {matmul_gflops():.0f} GFLOP/s."
    )
    content: dict[str, Any] = {
        "plan": asdict(run.plan),
        "marks": [asdict(mark) for mark in marks],
        "rows": [asdict(row) for row in rows],
        "stages": run.stages.record,
    }
    write_json(results / "marks.json", content)
    plan = run.plan
    title = (
        f"Clear(radius={plan.radius:g}) on examples/tiny_flux, held-out captions at {plan.side}x{plan.side}, "
        f"{plan.steps} steps; students: {plan.train_steps} steps of {plan.batch_size} samples. {machine}"
    )
    report = as_markdown(title, rows, marks)
    write_whole(results / "marks.md", lambda temporary: temporary.write_text(report))
    print(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("runs/marks"), help="pictures, samples, students")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Marks(path(), options.directory, Plan())
    run.run()
    write_results(options.results, run)
    run.run_without_terms()
    write_results(options.results, run)


if __name__ == "__main__":
    main()
