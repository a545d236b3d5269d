"""The file of the GPU benchmark: only its own format is read, and no row is lost."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import failed_row, run_parts
from benchmarks.gpu.environment import file_name
from benchmarks.gpu.marks import marks
from benchmarks.gpu.names import ALL_WEIGHTS, CLEAR_FLEX, IN_CHUNKS, OUR_STEPS, case_name
from benchmarks.gpu.records import SETTLED, STATUSES, Head, Results, Row, load, open_results
from benchmarks.gpu.tables import marks_table, part_tables

ROOT = Path(__file__).parents[2]
HEAD = Head(
    gpu="NVIDIA H200",
    date="2026-11-21",
    command="benchmarks/gpu.sh",
    commit="abc1234",
    versions={"torch": "2.11.0"},
    smoke=False,
    impl="triton",
)


def row(case: str, impl: str = "triton", *, part: str = "operator", status: str = "measured", **figures: float) -> Row:
    return Row(part=part, case=case, impl=impl, status=status, took=1.0, figures=figures)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return open_results(tmp_path / file_name(HEAD), HEAD)


def test_file_name_names_the_card_and_the_day() -> None:
    assert file_name(HEAD) == "nvidia-h200-2026-11-21.json"


def test_load_reads_what_was_saved(results: Results) -> None:
    results.add(row("a", milliseconds=1.5))
    results.start(("operator", "b", "triton"))
    results.marks = marks(results)
    results.save()
    assert load(results.path) == results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format"),
        ({"gpu": 7}, "gpu"),
        ({"unknown": 1}, "fields"),
        ({"rows": [{"part": "operator"}]}, "fields"),
        ({"rows": [vars(row("a")) | {"figures": {"furlongs": 1.0}}]}, "furlongs"),
        ({"rows": [vars(row("a")) | {"figures": {"seconds": "1"}}]}, "figures"),
        ({"rows": [vars(row("a")) | {"status": "perhaps"}]}, "perhaps"),
    ],
)
def test_load_refuses_another_format(results: Results, change: dict[str, object], message: str) -> None:
    results.path.write_text(json.dumps(json.loads(results.path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(results.path)


def test_rows_of_the_same_sources_are_kept(results: Results) -> None:
    results.add(row("a"))
    again = open_results(results.path, replace(HEAD, command="another"))
    assert again.rows == results.rows and load(results.path).head.command == "another"


def test_optional_packages_may_be_added_and_removed(results: Results) -> None:
    results.add(row("a"))
    with_diffusers = replace(HEAD, versions=HEAD.versions | {"diffusers": "0.42.1"})
    assert open_results(results.path, with_diffusers).rows == results.rows
    without = open_results(results.path, HEAD)
    assert without.rows == results.rows
    assert without.head.versions == with_diffusers.versions


@pytest.mark.parametrize("change", [{"commit": "def5678"}, {"versions": {"torch": "2.13.0"}}, {"impl": "tiled"}])
def test_rows_of_other_sources_stay_in_a_separate_file(results: Results, change: dict[str, object]) -> None:
    results.add(row("a"))
    fresh = open_results(results.path, replace(HEAD, **change))  # type: ignore[arg-type]
    (other,) = set(results.path.parent.glob("*.json")) - {results.path}
    assert fresh.rows == [] and load(other).rows == results.rows


def test_forget_drops_the_rows_to_be_measured_again(results: Results) -> None:
    for status in STATUSES:
        results.add(row(status, status=status))
    results.add(row("other", part="model", status="failed"))
    results.forget(["operator"], statuses=set(STATUSES) - set(SETTLED))
    assert [entry.case for entry in load(results.path).rows] == ["measured", "not available", "other"]
    results.forget(["operator"])
    assert [entry.case for entry in load(results.path).rows] == ["other"]


def test_failed_row_is_the_one_that_was_running(results: Results) -> None:
    results.start(("operator", "a", "triton"))
    failed = failed_row(load(results.path), "model", 1, "Traceback\nRuntimeError: no luck\n")
    results.add(failed)
    assert (failed.key, failed.status) == (("operator", "a", "triton"), "failed")
    assert "no luck" in failed.note and load(results.path).running is None


# Replaces Python: its first process fails within a row, the second finds that row in the file and succeeds.
WORKER = """#!{python}
import sys
sys.path.insert(0, {root!r})
from benchmarks.gpu.records import load
from pathlib import Path
results = load(Path(sys.argv[3]))
if not results.rows:
    results.start(("operator", "a", "triton"))
    raise ValueError("the card is broken")
"""


def test_run_continues_after_a_failed_process(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker"
    worker.write_text(WORKER.format(python=sys.executable, root=str(ROOT)))
    worker.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(worker))
    (failed,) = run_parts(results.path, ["operator"], seconds=60).rows
    assert (failed.key, failed.status) == (("operator", "a", "triton"), "failed")
    assert "ValueError: the card is broken" in failed.note


def test_marks_hold_at_the_target(results: Results) -> None:
    for radius, side, ours, clear in ((16, 256, 6.5, 19.5), (8, 512, 10.0, 34.9)):
        results.add(row(case_name(side, radius, backward=False), milliseconds=ours))
        results.add(row(case_name(side, radius, backward=False), CLEAR_FLEX, milliseconds=clear))
    results.add(row(case_name(256, 16, backward=True), milliseconds=6.5 + 4 * 6.5))
    for size, speedup in (("4K", 3.8), ("8K", 11.9)):
        results.add(row(size, OUR_STEPS[8], part="model", speedup=speedup))
    for size, gib, note in (("8K", 60.0, ALL_WEIGHTS), ("4K", 20.0, "with the weights of 3 of 57 units")):
        results.add(replace(row(f"step, {size}", OUR_STEPS[8], part="memory", peak_gib=gib), note=note))
    results.add(replace(row("step, 8K", IN_CHUNKS, part="memory", peak_gib=40.1), note=ALL_WEIGHTS))
    assert [mark.met for mark in marks(results)[:9]] == [True, True, True, False, True, True, False, None, None]
    assert [mark.met for mark in marks(results)[9:]] == [True, False, None]
    table = marks_table(marks(results))
    assert table.count(" met ") + table.count(" met\n") == 6 and table.count("MISSED") == 3


def test_tables_show_every_case_and_reason(results: Results) -> None:
    results.add(row("4K, forward", milliseconds=12.34))
    results.add(replace(row("8K, forward", status="not available"), note="out of memory"))
    tables = part_tables(results, "operator")
    assert "12.3" in tables and "triton: not available: out of memory" in tables


def test_draw_makes_a_picture(results: Results, tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.gpu.plot", exc_type=ImportError)
    for side, time in ((64, 0.5), (256, 6.5)):
        results.add(row(case_name(side, 16, backward=False), milliseconds=time))
        results.add(row(case_name(side, None, backward=False), "dense flash", milliseconds=2 * time))
    assert plot.operator_series(results, 16) == {"triton": {64: 0.5, 256: 6.5}, "dense": {64: 1.0, 256: 13.0}}
    plot.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
