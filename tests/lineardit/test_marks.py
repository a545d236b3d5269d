"""benchmarks/marks.py: every row is made, each mark is compared with its target, and nothing is done twice."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from lineardit.distill.evaluate import Comparison
from lineardit.distill.metrics import Interval

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("marks")


def row(
    marks: Any, *, objects: int, coherence: int, points: tuple[float, float] = (0, 0), latent_mse: float = 1
) -> Any:
    """A row of 100 objects and 100 pictures; `points` are differences to the teacher."""
    differences = {
        name: Interval(difference=one / 100, low=-1, high=1)
        for name, one in zip(("objects", "coherence"), points, strict=True)
    }
    comparison = Comparison(pictures=100, latent_mse=latent_mse, psnr=20, ssim=0.5, differences=differences)
    scores = {"objects": (objects, 100), "coherence": (coherence, 100)}
    return marks.Row(name="a", pictures=100, scores=scores, seconds_per_picture=1, comparison=comparison)


@pytest.mark.parametrize(
    ("objects", "coherence", "points", "met"),
    [
        (90, 85, (-2, -2), [True] * 4),
        (89, 84, (-2.1, -3), [False] * 4),
        (100, 84, (0, -3), [True, False, True, False]),
    ],
)
def test_teacher_marks_hold_at_the_target(
    marks: Any, objects: int, coherence: int, points: tuple[float, float], met: list[bool]
) -> None:
    teacher = row(marks, objects=objects, coherence=coherence)
    long = row(marks, objects=objects, coherence=coherence, points=points)
    assert [mark.met for mark in marks.teacher_marks(teacher, long)] == met


@pytest.mark.parametrize(
    ("points", "latent_mse", "met"),
    [((-3, -5), 1.0, [True, True, True]), ((-3.1, -5.1), 1.01, [False, False, False]), ((1, 1), 0.5, [True] * 3)],
)
def test_student_marks_hold_at_the_target(
    marks: Any, points: tuple[float, float], latent_mse: float, met: list[bool]
) -> None:
    student = row(marks, objects=90, coherence=90, points=points, latent_mse=latent_mse)
    untrained = row(marks, objects=20, coherence=20, latent_mse=3.0)
    results = marks.student_marks("default", student, untrained)
    assert [mark.met for mark in results] == met
    assert "(95%: -100.0 to +100.0)" in results[0].measured


@pytest.mark.parametrize(("points", "met"), [(-5, True), (-5.1, False), (1, True)])
def test_follow_mark_counts_objects_only(marks: Any, points: float, met: bool) -> None:
    mark = marks.follow_mark("agent", row(marks, objects=90, coherence=0, points=(points, -90)))
    assert (mark.name, mark.met) == ("agent: objects", met)


def test_rival_marks_require_every_seed(marks: Any) -> None:
    better, worse = (row(marks, objects=90, coherence=share, latent_mse=mse) for share, mse in ((80, 0.1), (20, 0.5)))
    results = marks.rival_marks([(better, worse)] * 3)
    assert [mark.met for mark in results] == [True, True]
    assert results[0].measured == "; ".join(["80.0% and 20.0%"] * 3)
    assert results[1].measured == "; ".join(["0.1000 and 0.5000"] * 3)
    assert [mark.met for mark in marks.rival_marks([(better, worse), (worse, better)])] == [False, False]
    assert [mark.met for mark in marks.rival_marks([(better, better)])] == [False, False]
    assert marks.rival_marks([]) == []


def test_marks_run_makes_every_row_and_resumes(
    marks: Any,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launch_here: Any,
    launched: list[list[str]],
) -> None:
    monkeypatch.setattr(marks, "launch", launch_here)
    plan = marks.Plan(
        radius=2, side=16, steps=1, captions=3, few_captions=2, samples=4, train_steps=1, hybrid_train_steps=1,
        hybrid_captions=2, few_train_steps=1, layer_steps=1, proxies=4, focus_tokens=16, text_tokens=16, shown=2,
        seeds=(0, 1), profiled=1, some_budget=marks.MALA,
    )  # fmt: skip
    run = marks.Marks(base, tmp_path / "work", plan)
    reports: list[str] = []
    run.run(lambda: reports.append(marks.write_results(tmp_path / "results", run)))
    wide = "window of equal cost"
    students = ("hybrid", "proxies alone", wide, *marks.FOLLOWERS)
    student_rows = [f"{name}{steps}" for name in students for steps in (", 0 steps", "")]
    seeds = ["hybrid, seed 1", f"{wide}, seed 1"]
    names = ["teacher", *student_rows, *seeds, "0 steps", "default", marks.TEACHER_512_TOKENS]
    rows = run.rows()
    assert [entry.name for entry in rows] == names
    assert [entry.pictures for entry in rows] == [3, 2, 3, *[2] * 12, 3, 3, 2]
    assert ["loss.flow=0.0" in command for command in launched] == [
        *(True, False, False, True, True, True),  # hybrid, agent, mala
        *(True, False),  # the hybrid's other seed
        False,  # the window
    ]
    assert ["run.seed=1" in command for command in launched] == [*[False] * 6, *[True] * 2, False]
    assert ["layerwise.steps=1" in command for command in launched] == [*[False] * 3, *[True] * 3, *[False] * 3]
    assert all((f"| {wide} |" in report) == (number >= 5) for number, report in enumerate(reports))  # row by row
    content = json.loads((tmp_path / "results" / "marks.json").read_text())
    assert [mark["name"] for mark in content["marks"]] == [mark.name for mark in run.marks()]
    assert len(run.marks()) == 2 + 2 + 3 + 3 + 3 + 2
    mixed = dict(option.split("=", 1) for option in launched[5] if option.startswith("method."))
    assert mixed.keys() == {"method.transformer_blocks.*.attn", "method.single_transformer_blocks.*.attn"}
    assert all(text.startswith(('{method = "mala", ', '{method = "hybrid", ')) for text in mixed.values())
    assert all(f"| {name} |" in reports[-1] for name in names)
    assert (tmp_path / "results" / "marks.md").read_text() == reports[-1]
    assert (tmp_path / "results" / "marks.png").is_file()

    again = marks.Marks(base, tmp_path / "work", plan)
    again.run(lambda: None)
    assert len(launched) == 9
    assert [entry.comparison for entry in again.rows()] == [entry.comparison for entry in rows]
