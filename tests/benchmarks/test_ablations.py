"""benchmarks/ablations.py: students that differ only in their row's settings, and the report."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_distill import build_tiny

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("ablations")


def test_every_row_is_made_and_reported(ablations: Any, tmp_path: Path) -> None:
    build_tiny().save_pretrained(tmp_path / "base")
    plan = ablations.Plan(
        side=16, steps=1, captions=2, samples=4, train_steps=1, batch_size=2, text_tokens=16, shown=2, radius=2
    )
    run = ablations.Ablations(tmp_path / "base", tmp_path / "work", plan)
    chosen = {name: ablations.ROWS[name] for name in (ablations.BASELINE, "no attention loss")}
    rows = run.run(tmp_path / "results", chosen)
    assert [row.name for row in rows] == ["teacher", "0 steps", "all terms", "no attention loss"]
    assert {row.pictures for row in rows} == {2}
    report = (tmp_path / "results" / "ablations.md").read_text()
    assert "| no attention loss | 2 |" in report and (tmp_path / "results" / "ablations.png").is_file()
    assert len(json.loads((tmp_path / "results" / "ablations.json").read_text())["rows"]) == 4


def test_rows_differ_from_the_baseline_only_in_their_settings(ablations: Any, tmp_path: Path) -> None:
    run = ablations.Ablations(build(tmp_path), tmp_path / "work", ablations.Plan())
    configs = {name: run.config(name, changes) for name, changes in ablations.ROWS.items()}
    baseline = configs[ablations.BASELINE]
    assert (baseline.loss.flow, baseline.loss.prediction, baseline.loss.attention) == (0.1, 1.0, 1.0)
    assert configs["no attention loss"].loss.attention == 0 and configs["400 steps"].run.steps == 400
    assert {config.data.directory for config in configs.values()} == {baseline.data.directory}
    assert len({config.run.directory for config in configs.values()}) == len(configs)


def build(folder: Path) -> Path:
    build_tiny().save_pretrained(folder / "base")
    return folder / "base"
