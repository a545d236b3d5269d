"""The log of long work: durations over several calls, and refused folders."""

import json
from pathlib import Path

import pytest

from lineardit import work_log
from lineardit.work_log import WorkLog, describe_machine, matmul_gflops


def test_stages_add_up_over_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"wall": 100.0, "cpu": 1.5}
    monkeypatch.setattr(work_log.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(work_log, "cpu_seconds", lambda: clock["cpu"])
    for call in (1, 2):
        work = WorkLog(tmp_path / "work", {"steps": 3})
        with pytest.raises(KeyboardInterrupt), work.timed("first"):
            clock["wall"] += 3
            clock["cpu"] += 5
            raise KeyboardInterrupt
        record = json.loads((tmp_path / "work" / "stages.json").read_text())
        assert record["seconds"]["first"] == 3 * call
        assert record["cpu_seconds"]["first"] == 5 * call
    assert record["cpu_seconds"]["start"] == 1.5 + 6.5  # CPU time at the start of each call, such as imports
    assert work.total() == {"seconds": 6, "cpu_seconds": 10 + 8}


def test_work_log_refuses_other_settings_and_other_folders(tmp_path: Path) -> None:
    WorkLog(tmp_path / "work", {"steps": 3, "radius": 4})
    with pytest.raises(ValueError, match=r"work was started with other radius: remove it"):
        WorkLog(tmp_path / "work", {"steps": 3, "radius": 5})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and was not started by this command"):
        WorkLog(tmp_path, {})


def test_describe_machine_includes_its_speed() -> None:
    assert f"product: {matmul_gflops():.0f} GFLOP/s" in describe_machine()
    assert 0.1 < matmul_gflops() < 1e6
