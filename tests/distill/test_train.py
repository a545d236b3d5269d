"""Whole runs of a few steps: the same with two processes, after kill -9, and never over a NaN."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from lineardit import from_pretrained
from lineardit.distill.__main__ import main
from lineardit.distill.config import DistillConfig, config_to_tables
from lineardit.distill.train import distill, load_base, start_accelerator
from lineardit.distill.trainer import DivergedError, Trainer, learning_rate
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
MakeConfig = Callable[..., DistillConfig]


def _rows(run: Path) -> list[dict[str, float]]:
    with (run / "loss.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "lineardit.safetensors")


def _write(config: DistillConfig, path: Path) -> Path:
    """The config as TOML; JSON's values are TOML's, but for null."""
    tables = config_to_tables(config)
    lines = [
        f"{table}.{key} = {json.dumps(value)}"
        for table, settings in tables.items()
        for key, value in settings.items()
        if value is not None
    ]
    path.write_text("\n".join(lines))
    return path


def _launch(config: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "lineardit.distill", str(config), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
