"""benchmarks/nearness.py: rows, costs, report and picture of a quick run."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lineardit import Clear

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/nearness.py as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("nearness")


def test_quick_run_writes_a_row_for_each_method(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["nearness.py", "--quick", "--results", str(tmp_path)])
    script.main()
    rows = json.loads((tmp_path / "nearness.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["softmax over everything", "Clear(radius=4)", "Mala()"]
    assert rows[0]["mean"] == 0 < rows[1]["mean"] < rows[2]["mean"]
    assert all(len(row["errors"]) == 2 for row in rows)
    assert (tmp_path / "nearness.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "nearness.png").is_file()


def test_keys_per_token_counts_the_keys_of_an_image_token(script: Any) -> None:
    assert script.keys_per_token(None) == 64 + 1024
    assert script.keys_per_token(Clear(radius=100)) == 64 + 1024
    within = sum(a * a + b * b < 4 for a in range(-2, 3) for b in range(-2, 3))
    assert 0.9 * within < script.keys_per_token(Clear(radius=2)) - 64 < within  # fewer at the border
