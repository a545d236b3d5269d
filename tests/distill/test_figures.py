"""The CSV of a run: rows are kept while the disk is full, and a damaged file is refused."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_distill import table

from lineardit.distill import figures
from lineardit.distill.config import DistillConfig
from lineardit.distill.figures import StepLog
from lineardit.distill.train import distill


def test_step_log_keeps_rows_until_the_disk_has_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "loss.csv"
    log = StepLog(path, ["loss"])
    log.append({"step": 1, "loss": 0.5})
    path.rename(tmp_path / "first.csv")
    path.symlink_to("/dev/full")
    log.append({"step": 2, "loss": 0.25})
    log.append({"step": 3, "loss": 0.125})
    assert [row["step"] for row in table(path)] == [1, 2, 3]
    assert caplog.text.count("cannot be written (No space left on device): its rows stay in memory") == 1


def test_full_disk_loses_the_loss_curve_but_not_the_run(
    make_config: Callable[..., DistillConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, _: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(figures, "write_atomically", full)
    config = make_config(run={"steps": 3}, save={"log_every": 1})
    assert distill(config).is_dir()
    assert [path.name for path in config.run.folder.glob("loss*")] == []
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "loss.csv cannot be written (No space left on device)" in warning


@pytest.mark.parametrize(
    "content",
    ["step,loss\n1,much\n", "step,loss\nfirst,1\n", "loss\n1\n", "step,loss\n1,2,3\n", "step,loss,more\n1,2,3\n"],
)
def test_step_log_refuses_a_damaged_table(content: str, tmp_path: Path) -> None:
    path = tmp_path / "loss.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"loss.csv is damaged \(.*\): repair it, or move it away to start a new one"):
        StepLog(path, ["loss"])
    assert path.read_text() == content
