"""A FLUX pipeline of two blocks with random weights, prompts for it, and distillations as a user starts them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

from lineardit.distill.config import DistillConfig
from lineardit.distill.config_tables import as_toml, config_to_tables
from lineardit.examples.tiny_flux.model import build_pipeline

ROOT = Path(__file__).parents[1]

PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "triangle", "cross")
]
SIZES = ((24, 32), (32, 24))  # pixels; a token is 4 x 4

# Settings as a user writes them, to be formatted with base, samples and run.
CONFIG = """
[base]
model = "{base}"

[data]
directory = "{samples}"

[method]
method = "clear"
radius = 2

[trained]
kind = "lora"
rank = 2

[run]
directory = "{run}"
steps = 2
batch_size = 2

[validate]
samples = 0
"""


def build_tiny(*, guidance_embeds: bool = False) -> FluxPipeline:
    pipe = build_pipeline(0)
    pipe.register_modules(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=guidance_embeds,
        ).eval()
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_config(config: DistillConfig, path: Path) -> Path:
    """The config as TOML."""
    tables = config_to_tables(config)
    lines = [
        f"{table}.{key} = {as_toml(value)}"
        for table, entries in tables.items()
        for key, value in entries.items()
        if value is not None
    ]
    path.write_text("\n".join(lines))
    return path


def launch_run(config: Path, *arguments: str, processes: int = 1) -> subprocess.Popen[bytes]:
    """A distillation in a new group of processes, which can be killed together."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    return _start([sys.executable, *launcher, "-m", "lineardit.distill", str(config), *arguments])


# Workers forked from one process right after its imports; all are killed when the first fails.
FORKED = """
import os, signal, socket, sys
import lineardit.distill.train
from lineardit.distill.__main__ import main

processes = int(sys.argv.pop(1))
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
for rank in range(processes):
    if not os.fork():
        os.environ.update({name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        sys.exit(main())
for _ in range(processes):
    if os.wait()[1]:
        os.killpg(0, signal.SIGKILL)
"""


def fork_run(config: Path, *, processes: int) -> subprocess.Popen[bytes]:
    """A distillation in several processes without a launcher, which halves its time."""
    return _start([sys.executable, "-c", FORKED, str(processes), str(config)])


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def loss_rows(run: Path) -> list[dict[str, float]]:
    """The rows of a run's loss.csv."""
    return table(run / "loss.csv")


def table(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV of numbers, without empty cells."""
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def trained_weights(run: Path) -> dict[str, Tensor]:
    """The weights of a run's adapter."""
    return load_file(run / "adapter" / "lineardit.safetensors")


def steps_of(rows: list[dict[str, float]]) -> list[float]:
    return [row["step"] for row in rows]


def assert_same_weights(run: Path, other: Path) -> None:
    """The adapters of both runs are equal, bit for bit."""
    weights, other_weights = trained_weights(run), trained_weights(other)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
