"""What a run on a GPU would measure, listed on the CPU; and how an error is judged."""

import importlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.bench import FULL, SMOKE, Bench, Measurement, Task
from benchmarks.gpu.judging import verdict
from benchmarks.gpu.names import CLEAR_FLEX, DENSE, OUR_STEPS, case_name
from benchmarks.gpu.records import PARTS, Head, Results
from benchmarks.gpu.worker import MODULES, measure

HEAD = Head(gpu="a card", date="", command="", commit="", versions={}, smoke=False, impl="triton")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    results = Results(path=tmp_path / "results.json", head=HEAD)
    return Bench(scale=FULL, results=results, deadline=time.monotonic() + 60)


@pytest.mark.parametrize("part", PARTS)
def test_tasks_of_a_part_have_unique_names(bench: Bench, part: str) -> None:
    keys = [task.key for task in importlib.import_module(f"benchmarks.gpu.{MODULES[part]}").tasks(bench)]
    assert len(keys) == len(set(keys)) > 0
    assert {key[0] for key in keys} == {part}


def test_parts_without_models_need_no_diffusers() -> None:
    """A rented machine often has only torch and triton."""
    code = (
        "import sys; sys.modules['diffusers'] = None; import benchmarks.gpu.correctness, benchmarks.gpu.operator_speed"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_operator_is_measured_at_every_size_and_radius(bench: Bench) -> None:
    keys = {task.key[1:] for task in importlib.import_module("benchmarks.gpu.operator_speed").tasks(bench)}
    for side in (64, 128, 256, 512):
        for backward in (False, True):
            assert {(case_name(side, None, backward=backward), name) for name in DENSE} <= keys
            for radius in (8, 16, 32):
                case = case_name(side, radius, backward=backward)
                assert {(case, "triton"), (case, CLEAR_FLEX), (case, "flex tiles"), (case, "natten")} <= keys


def test_error_fails_only_its_own_row(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> Measurement:
        raise RuntimeError("the kernel\nis wrong")

    smoke_bench = replace(bench, scale=SMOKE)
    for case, measure_it in (("a", wrong), ("b", lambda: Measurement(figures={"seconds": 1.0}))):
        measure(Task(part="model", case=case, impl="triton", measure=measure_it), smoke_bench)
    first, second = bench.results.rows
    assert (first.status, first.note, second.status) == ("failed", "RuntimeError: the kernel is wrong", "measured")
    assert "Traceback" in capsys.readouterr().err


def test_steps_needed_for_marks_come_first(bench: Bench) -> None:
    tasks = importlib.import_module("benchmarks.gpu.model_step").tasks(bench)
    keys = [task.key[1:] for task in tasks]
    for impl, first in (("dense", ["4K", "8K", "1K"]), (OUR_STEPS[8], ["4K", "8K", "1K"]), (OUR_STEPS[16], ["1K"])):
        assert [size for size, name in keys if name == impl][: len(first)] == first


@pytest.mark.parametrize(
    ("error", "passed"), [(0.0, True), (0.0019, True), (0.0041, False), (float("nan"), False), (float("inf"), False)]
)
def test_verdict_allows_twice_the_error_of_the_reference(error: float, passed: bool) -> None:
    exact = torch.zeros(2, 3, dtype=torch.float64)
    exact[0, 0] = 1e-9  # so small that the allowance for rounding is negligible
    low = exact.float() + 0.001
    actual = exact.float()
    actual[1, 2] += error
    result = verdict([low, actual], [exact, exact], [low, low])
    assert result.passed is passed
    assert ("WRONG: gradient 0" in result.note) is not passed
