"""The processes that `lineardit distill --processes N` starts: all of them end, with one error message."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny_distill import launch_run, write_config

from lineardit.distill import launch
from lineardit.distill.config import DistillConfig

MakeConfig = Callable[..., DistillConfig]


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`fake_python(script)` makes the launcher start this shell script; returns a file that the script may touch."""

    def install(script: str) -> Path:
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        return tmp_path / "started"

    return install


def _signal_once_created(path: Path, number: int) -> None:
    """Send this process a signal as soon as the file exists."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait).start()


SENTENCE = "lineardit.distill: run.batch_size must be a multiple of processes x run.gradient_accumulation = 2, got 3"


def test_error_of_all_processes_is_printed_once(
    make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_config(make_config(run={"batch_size": 3}), tmp_path / "config.toml")
    assert launch.launch(file, processes=2) == 2
    assert capfd.readouterr().err.strip() == SENTENCE


@pytest.mark.slow
def test_error_of_all_processes_is_printed_once_under_torchrun(make_config: MakeConfig, tmp_path: Path) -> None:
    """torchrun's own report follows."""
    process = launch_run(write_config(make_config(run={"batch_size": 3}), tmp_path / "config.toml"), processes=2)
    assert process.communicate()[1].decode().count(SENTENCE) == 1
    assert process.returncode == 1


@pytest.mark.parametrize(("shutdown_wait", "finishes"), [(30.0, True), (0.1, False)])
def test_interrupted_launch_gives_its_workers_time_to_end(
    shutdown_wait: float,
    finishes: bool,
    fake_python: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started, ended = tmp_path / "started", tmp_path / "ended"
    fake_python(f"trap '' INT\ntouch {started}\nsleep {1 if finishes else 60} && touch {ended}")
    monkeypatch.setattr(launch, "SHUTDOWN_WAIT", shutdown_wait)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT
    _signal_once_created(started, signal.SIGINT)
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            launch.launch(tmp_path / "config.toml", processes=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.exists() == finishes
    assert time.perf_counter() - start < 30


def test_sigterm_to_the_launcher_ends_its_workers(fake_python: Callable[[str], Path], tmp_path: Path) -> None:
    started = fake_python(f"echo $$ > {tmp_path}/worker-$RANK\ntouch {tmp_path}/started\nexec sleep 60")
    _signal_once_created(started, signal.SIGTERM)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        launch.launch(tmp_path / "config.toml", processes=2)
    assert not any(psutil.pid_exists(int(worker.read_text())) for worker in tmp_path.glob("worker-*"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("end", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_failed_worker_ends_the_others(
    end: str, code: int, fake_python: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake_python(f"if [ $RANK = 1 ]; then {end}; fi\nexec sleep 60")
    start = time.perf_counter()
    assert launch.launch(tmp_path / "config.toml", processes=2) == code
    assert time.perf_counter() - start < 30
    assert ("process 1 was ended by SIGKILL; --resume latest" in caplog.text) == (code == 137)


def test_worker_ends_after_its_launcher_is_killed() -> None:
    reader, writer = os.pipe()
    launcher = os.fork()
    if not launcher:
        worker = os.fork()
        if not worker:
            launch.exit_with_launcher(os.getppid())
        else:
            os.write(writer, f"{worker} ".encode())
        time.sleep(60)
        os._exit(0)
    worker = psutil.Process(int(os.read(reader, 20)))
    assert worker.is_running()
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    start = time.perf_counter()
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE and time.perf_counter() - start < 20:
        time.sleep(0.05)
    assert time.perf_counter() - start < 20
