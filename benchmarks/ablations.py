"""What each term of CLEAR's loss contributes: `make ablations`, about 90 CPU-minutes, resumable.

Students of Clear(radius=4) on the small trained model, which differ only in the settings of their row. Writes
benchmarks/results/ablations.json, ablations.md and ablations.png, again after every row.
"""

import argparse
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marks_report import Row, rows_as_markdown
from scene_students import ScenePlan, SceneStudents

from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.config import DistillConfig
from lineardit.distill.config_tables import config_from_tables
from lineardit.distill.files import write_json
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path
from lineardit.linearize.folders import write_atomically
from lineardit.linearize.methods import Clear, config_to_dict
from lineardit.work_log import describe_machine

RESULTS = Path(__file__).with_name("results")
UNTRAINED = "0 steps"
BASELINE = "all terms"
LOSS = {"flow": 0.1, "prediction": 1.0, "attention": 1.0}
ALL_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
ROWS: dict[str, Mapping[str, Mapping[str, Any]]] = {  # settings that differ from the baseline's
    BASELINE: {},
    "no flow loss": {"loss": {"flow": 0.0}},
    "no prediction loss": {"loss": {"prediction": 0.0}},
    "no attention loss": {"loss": {"attention": 0.0}},
    "CLEAR's weights": {"loss": {"flow": 1.0, "prediction": 0.5, "attention": 0.5}},
    "the image's projections alone": {"trained": {"projections": ("to_q", "to_k", "to_v", "to_out.0")}},
    "400 steps": {"run": {"steps": 400}},
}


@dataclass(frozen=True, kw_only=True)
class Plan(ScenePlan):
    """The amount of work."""

    captions: int = 64
    train_steps: int = 200
    learning_rate: float = 3e-3
    radius: float = 4
    seed: int = 0
    shown: int = 8  # rows of the sheet


class Ablations(SceneStudents):
    """One run of all rows, in its own folder."""

    plan: Plan

    @property
    def method(self) -> Clear:
        return Clear(radius=self.plan.radius)

    def run(self, results: Path, rows: Mapping[str, Mapping[str, Mapping[str, Any]]] = ROWS) -> list[Row]:
        """The teacher, the untrained conversion, and a student for each entry of `rows`."""
        with self.work.timed("teacher's pictures"):
            self.draw("teacher", self.base, self.plan.captions)
        with self.work.timed("samples"):
            self.prepare()
        with self.work.timed(UNTRAINED):
            self.draw(UNTRAINED, self.untrained_adapter(self.method, Path("converted")), self.plan.captions)
        for name, changes in rows.items():
            with self.work.timed(name):
                self.draw(name, self.trained_adapter(self.config(name, changes)), self.plan.captions)
            self.write(results)
        return [self.row(name) for name in self.judged]

    def config(self, name: str, changes: Mapping[str, Mapping[str, Any]]) -> DistillConfig:
        """The baseline's config with these changes."""
        tables = self.tables(name.replace(" ", "-"), self.plan.seed) | {
            "method": config_to_dict(self.method),
            "trained": {"kind": "attention", "projections": ALL_PROJECTIONS},
            "loss": LOSS,
        }
        return config_from_tables({name: table | dict(changes.get(name, {})) for name, table in tables.items()})

    def write(self, results: Path) -> None:
        """Write the report of the rows made so far."""
        plan, rows = self.plan, [self.row(name) for name in self.judged]
        results.mkdir(parents=True, exist_ok=True)
        shown = [one.pictures.images[: plan.shown] for one in self.judged.values()]
        write_sheet(list(self.judged), list(zip(*shown, strict=True)), results / "ablations.png")
        write_json(
            results / "ablations.json",
            {"plan": asdict(plan), "rows": [asdict(row) for row in rows], "stages": self.work.record},
        )
        weights = " + ".join(f"{weight:g} x {name}" for name, weight in LOSS.items())
        report = "\n".join(
            [
                "# What each term of the loss brings",
                "",
                f"Clear(radius={plan.radius:g}) on examples/tiny_flux, {plan.captions} held-out captions at "
                f"{plan.side}x{plan.side}, {plan.steps} denoising steps. Students: {plan.train_steps} steps of "
                f"{plan.batch_size} samples at a rate of {plan.learning_rate:g}, attention's projections of image and "
                f"text; {weights}, but for what the row says; CLEAR's weights are "
                f"1, 0.5, 0.5. One seed. {describe_machine()}.",
                "",
                *rows_as_markdown(rows),
                "",
                "![pictures of the teacher and its students](ablations.png)",
                "",
            ]
        )
        write_atomically(results / "ablations.md", lambda temporary: temporary.write_text(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("runs/ablations"), help="pictures, samples, students")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    Ablations(path(), options.directory, Plan()).run(options.results)
    print((options.results / "ablations.md").read_text())


if __name__ == "__main__":
    main()
