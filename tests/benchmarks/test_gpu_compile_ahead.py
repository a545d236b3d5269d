"""Kernels are compiled by several processes before correctness is measured."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import compile_ahead
from benchmarks.gpu.bench import Bench, Measurement, Task
from benchmarks.gpu.records import Head, Results, Row, load

HEAD = Head(gpu="a card", date="", command="", commit="", versions={}, smoke=True, impl="triton")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    results = Results(path=tmp_path / "results.json", head=HEAD)
    results.add(Row(part="correctness", case="2", impl="triton", status="measured", took=1))
    return results.path


def test_each_process_compiles_its_share_of_missing_cases_and_saves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def tasks(_: Bench) -> Any:
        def measure(number: int) -> Measurement:
            measured.append(number)
            raise RuntimeError("the kernel is wrong")

        for number in range(8):
            yield Task(part="correctness", case=f"{number}", impl="triton", measure=lambda n=number: measure(n))

    monkeypatch.setattr(compile_ahead, "case_tasks", tasks)
    before = path.read_text()
    for deadline in (time.monotonic() + 60, time.monotonic() - 1):
        monkeypatch.setattr(sys, "argv", ["compile_ahead", str(path), str(deadline), "2", "3"])
        compile_ahead.main()
    monkeypatch.setattr(sys, "argv", ["compile_ahead", str(path), str(time.monotonic() + 60), "1", "3"])
    compile_ahead.main()
    assert measured == [5, 1, 4, 7]
    assert path.read_text() == before


def test_slow_processes_are_ended_after_half_of_the_time_left(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compile_ahead.os, "sched_getaffinity", lambda _: range(4))
    slow = path.with_name("slow")
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(compile_ahead.sys, "executable", str(slow))
    start = time.monotonic()
    compile_ahead.compile_ahead(path, start + 2)
    assert 1 <= time.monotonic() - start < 10
    assert capsys.readouterr().out == "3 processes compiled kernels for 1 s\n"
    assert [row.case for row in load(path).rows] == ["2"]
