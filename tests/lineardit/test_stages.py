"""Long work in stages: what is kept of it, and what is refused."""

import json
from pathlib import Path

import pytest

from lineardit.stages import Stages, cpu_seconds, matmul_gflops


def test_stages_add_up_over_calls(tmp_path: Path) -> None:
    for _ in range(2):
        stages = Stages(tmp_path / "work", {"steps": 3})
        before = stages.total()
        with pytest.raises(KeyboardInterrupt), stages.stage("first"):
            deadline = cpu_seconds() + 0.05
            while cpu_seconds() < deadline:
                pass
            raise KeyboardInterrupt
        after = stages.total()
        assert after["cpu_seconds"] - before["cpu_seconds"] >= 0.04
        assert after["seconds"] - before["seconds"] >= 0.04
    record = json.loads((tmp_path / "work" / "stages.json").read_text())
    assert record["seconds"]["first"] >= 0.08
    assert record["cpu_seconds"]["start"] > 0


def test_stages_refuse_other_settings_and_other_folders(tmp_path: Path) -> None:
    Stages(tmp_path / "work", {"steps": 3, "radius": 4})
    with pytest.raises(ValueError, match=r"work was begun with other radius: remove it"):
        Stages(tmp_path / "work", {"steps": 3, "radius": 5})
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and was not begun here"):
        Stages(tmp_path, {})


def test_matmul_gflops_is_a_speed() -> None:
    assert 0.1 < matmul_gflops() < 1e6
