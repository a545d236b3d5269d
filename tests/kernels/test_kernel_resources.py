"""The Triton kernels compile for common GPUs, with no more registers or memory than the committed table."""

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from lineardit.kernels.focus import triton_kernels as focus_kernels
from lineardit.kernels.window import triton_kernels as window_kernels

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernel_resources.py"


@pytest.mark.parametrize(
    "archs", [["80", "86", "90"], pytest.param(["100", "120"], marks=pytest.mark.slow)], ids=" ".join
)
def test_kernels_compile_within_the_committed_resources(archs):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, SCRIPT, "--archs", *archs], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(f"sm_{arch} window_forward" in run.stdout for arch in archs)
    assert "nothing grew" in run.stdout  # not "nothing compared", as for another version of Triton


def test_growth_reports_what_grew():
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = {"tiles": "q8x16 k8x8 w8 s2", "registers": 200, "stack_bytes": 0, "shared_bytes": 1000, "narrow_loads": 0}
    assert module.growth({"a": row}, {"a": row}) == []
    assert module.growth({"a": {**row, "registers": 100}}, {"a": row}) == []
    assert module.growth({"a": {**row, "stack_bytes": 8}}, {"a": row}) == ["a: stack_bytes 8, in the table 0"]
    assert module.growth({"a": {**row, "tiles": "q8x8"}}, {"a": row}) == [
        "a: tiles q8x8, in the table q8x16 k8x8 w8 s2"
    ]
    assert module.growth({"a": row}, {}) == ["a: not in the table"]


ALIGNED = {"num_cells"}  # depends on the method, not on the image; a multiple of 16 allows wider loads
FLOATS = {"scale"}


@pytest.mark.parametrize("module", [window_kernels, focus_kernels], ids=["window", "focus"])
def test_image_sizes_do_not_make_triton_recompile(module: Any) -> None:
    """UNSPECIALIZED holds every integer argument but those of ALIGNED, and nothing else."""
    integers = set()
    for name in vars(module):
        if name.startswith(module.__name__.split(".")[-2]):  # window_forward, focus_grad_cell, ...
            arguments = inspect.signature(getattr(module, name).fn).parameters
            integers |= {argument for argument in arguments if argument.islower()}
    assert integers - ALIGNED - FLOATS == set(module.UNSPECIALIZED)
