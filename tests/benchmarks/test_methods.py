"""benchmarks/methods.py: equal training for every row, resuming, and marks at their targets."""

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_distill import build_tiny

from lineardit import Clear, Mala
from lineardit.distill.evaluate import Comparison

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("methods")


@pytest.fixture
def report(methods: Any) -> Any:
    return importlib.import_module("methods_report")


def picture_row(report: Any, *, objects: int = 90, coherence: int = 90, latent_mse: float | None = 1.0) -> Any:
    """A row of 100 objects and 100 pictures; a latent MSE of None makes it the teacher's."""
    comparison = None
    if latent_mse is not None:
        comparison = Comparison(pictures=100, latent_mse=latent_mse, psnr=20, ssim=0.5, differences={})
    scores = {"objects": (objects, 100), "coherence": (coherence, 100)}
    return report.Row(name="a", pictures=100, scores=scores, seconds_per_picture=1, comparison=comparison)


def method_row(report: Any, name: str, students: Sequence[Any]) -> Any:
    return report.MethodRow(
        name=name, flops=1, swapped=1, layers=1, trained=1, seconds_per_step=1, seconds_of_teacher=2, machine="here",
        untrained=picture_row(report), students=tuple(students),
    )  # fmt: skip


def test_quick_run_makes_every_row_and_resumes(methods: Any, report: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_tiny().save_pretrained(base)
    plan = replace(methods.quick_plan(), side=16, text_tokens=16, step_side=16, trained=5_000)
    partial = {methods.SINGLE: Clear(radius=2)}
    table = methods.MethodTable(base, tmp_path / "work", plan)
    results, configs = tmp_path / "results", (Mala(), partial)
    first = table.run(configs, plan.seeds, results, lambda name: name == "Mala()")
    assert list(first.rows) == ["Mala()"]
    assert "Not made yet: Clear(radius=2) in" in (results / "methods.md").read_text()
    complete = table.run(configs, plan.seeds, results)
    rows = complete.ordered()
    assert [row.name for row in rows] == ["Mala()", "Clear(radius=2) in single_transformer_blocks.*.attn"]
    assert rows[0] == first.rows["Mala()"]
    assert [(row.swapped, row.layers) for row in rows] == [(2, 2), (1, 2)]
    assert [row.trained / plan.trained for row in rows] == pytest.approx([1, 1], abs=0.05)
    assert rows[1].flops == (methods.flops(None) + methods.flops(Clear(radius=2))) // 2
    assert len(list((tmp_path / "work" / "runs").glob("*/loss.csv"))) == 2
    content = json.loads((results / "methods.json").read_text())
    assert [row["name"] for row in content["rows"]] == [row.name for row in rows]
    text = (results / "methods.md").read_text()
    assert all(f"| {row.name} |" in text for row in rows) and all(mark.name in text for mark in complete.marks())
    assert (results / "methods.png").stat().st_size > 10_000
    with Image.open(results / "methods" / "Mala.jpg") as strip:
        assert strip.size == (2 * 16, 16)

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    again = methods.MethodTable(base, tmp_path / "work", plan).run(configs, plan.seeds, tmp_path / "others")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")} == files
    assert [row.students for row in again.ordered()] == [row.students for row in rows]
    elsewhere = methods.MethodTable(base, tmp_path / "elsewhere", plan).run(configs, plan.seeds, results)
    assert (elsewhere.rows, elsewhere.proposals) == (complete.rows, complete.proposals)  # nothing was left to do
    with pytest.raises(ValueError, match="started with other train_steps"):
        methods.MethodTable(base, tmp_path / "work", replace(plan, train_steps=3))
    with pytest.raises(ValueError, match=r"json is of another plan \(train_steps\)"):
        methods.MethodTable(base, tmp_path / "new", replace(plan, train_steps=3)).run(configs, plan.seeds, results)


def test_row_made_elsewhere_gets_students_of_further_seeds(methods: Any, tmp_path: Path) -> None:
    base, results = tmp_path / "base", tmp_path / "results"
    build_tiny().save_pretrained(base)
    plan = replace(methods.quick_plan(), side=16, text_tokens=16, step_side=16, trained=5_000, seeds=(0, 1))
    first = methods.MethodTable(base, tmp_path / "work", plan).run((Mala(),), (0,), results).rows["Mala()"]
    strip = (results / "methods" / "Mala.jpg").read_bytes()
    elsewhere = methods.MethodTable(base, tmp_path / "elsewhere", plan).run((Mala(),), (0, 1), results)
    assert [path.name for path in (tmp_path / "elsewhere" / "runs").iterdir()] == ["Mala--1"]
    row = elsewhere.rows["Mala()"]
    assert row == replace(first, students=row.students)
    assert row.students[0] == first.students[0]
    assert [student.name for student in row.students] == ["Mala(), seed 0", "Mala(), seed 1"]
    assert (results / "methods" / "Mala.jpg").read_bytes() == strip


def test_window_of_equal_flops_is_the_smallest_window_of_that_cost(methods: Any) -> None:
    for config in (Mala(), Clear(radius=4, pool_tokens=64)):
        window = methods.window_of_equal_flops(config)
        assert methods.flops(Clear(radius=window.radius - 0.5)) < methods.flops(config) <= methods.flops(window)


def test_every_method_can_be_fitted_to_equal_parameter_counts(methods: Any, tmp_path: Path) -> None:
    table = methods.MethodTable(methods.path(), tmp_path / "work", replace(methods.Plan(), captions=1))
    for method in methods.METHODS:
        fit = table.fit(method)
        assert fit.rank >= 1
        assert fit.trained / table.plan.trained == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("coherence", "latent_mses", "met"),
    [
        ((89, 88, 88), (0.4, 0.4, 0.4), True),
        ((88, 88, 87), (0.4, 0.4, 0.4), False),  # more than 2 points below the teacher
        ((95, 95, 80), (0.4, 0.4, 0.4), False),  # not on every seed
        ((89, 88, 88), (0.4, 0.5, 0.4), False),
    ],
)
def test_hybrid_marks_hold_on_every_seed(
    report: Any, coherence: Sequence[int], latent_mses: Sequence[float], met: bool
) -> None:
    teacher = picture_row(report, coherence=90, latent_mse=None)
    students = [
        picture_row(report, coherence=share, latent_mse=error)
        for share, error in zip(coherence, latent_mses, strict=True)
    ]
    local = method_row(report, "Clear", [picture_row(report, coherence=85, latent_mse=0.5)] * 3)
    (mark,) = report.hybrid_marks(teacher, [(method_row(report, "Hybrid", students), local)])
    assert mark.met == met


def test_follow_and_proposal_marks_hold_at_the_target(report: Any) -> None:
    teacher = picture_row(report, objects=90, latent_mse=None)
    rows = [
        method_row(report, name, [picture_row(report, objects=objects)])
        for name, objects in (("Agent(num_agents=4)", 85), ("Mala() in x", 84), ("Clear(radius=4)", 10))
    ]
    assert [mark.met for mark in report.follow_marks(teacher, rows)] == [True, False]
    uniform, better, worse = (picture_row(report, latent_mse=error) for error in (0.5, 0.4, 0.5))
    assert report.proposal_mark([(uniform, better)] * 3 + [(uniform, worse)]).met
    assert not report.proposal_mark([(uniform, better)] * 2 + [(uniform, worse)] * 2).met
