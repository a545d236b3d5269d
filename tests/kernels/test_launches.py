"""Kernel launches of real calls compile for sm_90 as Triton specializes them there, within CUDA's limits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from benchmarks.kernel_resources import SHARED_MEMORY
from lineardit.kernels.focus import triton_kernels as focus_kernels
from lineardit.kernels.window import triton_kernels as window_kernels

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "launches.py"
LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_every_kernel_is_launched(launches):
    names = [*vars(window_kernels), *vars(focus_kernels)]
    assert {launch["kernel"] for launch in launches} == {
        name for name in names if name.startswith(("window_", "focus_"))
    }
    assert {launch["constants"]["UNIT"] for launch in launches} == {1, 8}
    assert {launch["constants"].get("DISJOINT") for launch in launches} == {None, True, False}


def test_launches_stay_within_the_device_limits(launches):
    for launch in launches:
        assert all(1 <= size <= most for size, most in zip(launch["grid"], LARGEST_GRID, strict=True)), launch
        assert launch["shared"] <= SHARED_MEMORY[90], launch


def test_integer_arguments_are_int32_and_scale_is_float32(launches):
    for launch in launches:
        numbers = {name: kind for name, kind in launch["types"].items() if name.islower()}
        assert numbers.pop("scale") == "fp32"
        assert set(numbers.values()) == {"i32"}, launch


def test_pointers_are_aligned_and_sizes_are_not_specialized(launches):
    """A row of head dimension 20 is not a multiple of 16 bytes, so the image after its text is unaligned."""
    for launch in launches:
        pointers = {name for name, kind in launch["types"].items() if kind.startswith("*")}
        specialized = set(launch["specialized"])
        assert specialized - pointers <= {"num_cells"}, launch
        if launch["constants"]["HEAD_DIM"] != 20:
            assert pointers <= specialized, launch
