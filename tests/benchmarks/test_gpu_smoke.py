"""benchmarks/gpu.sh --smoke: the whole GPU benchmark at tiny sizes, and what it writes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.names import CLEAR_FLEX, CLEAR_STEP, DENSE_STEP, FOCUS_STEP, HYBRID_STEP, OUR_STEPS
from benchmarks.gpu.records import PARTS, load
from lineardit.kernels.window import implementations

ROOT = Path(__file__).parents[2]
IMPL = "triton" if "triton" in implementations() else "tiled"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [ROOT / "benchmarks/gpu.sh", "--smoke", "--impl", IMPL, "--output", folder, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """What the script printed, and its file."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.json")
    yield done.stdout, path


def test_smoke_measures_every_part(smoke: tuple[str, Path]) -> None:
    results = load(smoke[1])
    measured = {part: {row.impl for row in results.rows_of_part(part) if row.status == "measured"} for part in PARTS}
    assert measured["correctness"] >= {IMPL, CLEAR_FLEX, "flex tiles"}
    assert measured["operator"] >= {IMPL, CLEAR_FLEX, "flex tiles", "dense flash"}
    assert measured["model"] == {DENSE_STEP, CLEAR_STEP, *OUR_STEPS.values(), HYBRID_STEP, FOCUS_STEP}
    assert measured["memory"] >= {IMPL, "dense flash", DENSE_STEP, OUR_STEPS[8]}


def test_smoke_leaves_nothing_unexplained(smoke: tuple[str, Path]) -> None:
    rows = load(smoke[1]).rows
    assert {row.status for row in rows} == {"measured", "not available"}
    assert all(row.note for row in rows if row.status == "not available")


def test_smoke_prints_tables_and_marks(smoke: tuple[str, Path]) -> None:
    printed = smoke[0]
    assert all(f"== {part}: " in printed for part in PARTS)
    assert "milliseconds: of one call, median" in printed and "not measured >= 3.8" in printed


def test_rerun_measures_only_what_is_missing(smoke: tuple[str, Path], tmp_path: Path) -> None:
    path = tmp_path / smoke[1].name
    data: dict[str, Any] = json.loads(smoke[1].read_text())
    kept = [row for row in data["rows"] if row["impl"] != "rates"]
    path.write_text(json.dumps(data | {"rows": kept}))
    done = run(tmp_path, "--only", "operator")
    assert done.returncode == 0, done.stderr
    rows = load(path).rows
    assert [row for row in rows if row.impl != "rates"] == [row for row in load(smoke[1]).rows if row.impl != "rates"]
    assert [row.impl for row in rows].count("rates") == 1
