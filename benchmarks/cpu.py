"""Window attention against dense attention on this CPU: time of alternating pairs, memory in fresh processes.

    python benchmarks/cpu.py [--threads 2] [--repeats 7] [--clock wall|cpu] [--only pairs|growth|memory] [--json FILE]

Prints one row per figure with the mark that it should reach, then the same as JSON.
Times are medians in milliseconds; memory is the growth of peak resident memory, in MiB, by one forward and backward.
On a busy machine, `--threads 1 --clock cpu` counts only the CPU time of the process.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lineardit.kernels.window import window_attention


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention call."""

    side: int  # the grid is side x side tokens
    radius: float = 8
    text_len: int = 512
    batch: int = 1
    num_heads: int = 4
    head_dim: int = 64
    autocast: bool = False  # to bfloat16

    def __str__(self) -> str:
        size = f"{self.side}x{self.side} + {self.text_len} text, {self.num_heads} heads of {self.head_dim}"
        return f"{size}, radius {self.radius}" + f", batch {self.batch}" * (self.batch > 1) + ", bf16" * self.autocast

    def tensors(self) -> list[Tensor]:
        """Query, key, value and the gradient of the output, [B, H, N, D]."""
        size = (self.batch, self.num_heads, self.text_len + self.side**2, self.head_dim)
        return [torch.randn(size, requires_grad=index < 3) for index in range(4)]

    def mask(self) -> Tensor:
        """[N, N] bool."""
        positions = torch.cartesian_prod(torch.arange(self.side), torch.arange(self.side)).float()
        mask = torch.ones((self.text_len + self.side**2,) * 2, dtype=torch.bool)
        mask[self.text_len :, self.text_len :] = torch.cdist(positions, positions) < self.radius
        return mask


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `ratio` should be at least `mark`, or at most if `better` is "lower"."""

    what: str
    ours: float
    other: float
    ratio: float
    mark: float
    better: str = "higher"

    @property
    def met(self) -> bool:
        return self.ratio >= self.mark if self.better == "higher" else self.ratio <= self.mark


# (shape, mark of the forward, mark of forward + backward)
AGAINST_DENSE = [(Shape(side=64), 1.5, 1.5), (Shape(side=128), 5.5, 5.5)]
AGAINST_MASKED = [Shape(side=side) for side in (4, 8, 16, 24, 32, 48)] + [
    Shape(side=16, text_len=0),
    Shape(side=32, radius=16),
    Shape(side=48, radius=32),
    Shape(side=32, radius=4, text_len=64, batch=8, head_dim=32),
    Shape(side=32, radius=4, text_len=64, batch=8, head_dim=32, autocast=True),
]
GROWTH = (256, 512)


def step(shape: Shape, name: str, *, backward: bool) -> Callable[[], None]:
    """One call of "window", "dense" or "masked" attention on its own tensors."""
    query, key, value, grad_out = shape.tensors()
    mask = shape.mask() if name == "masked" else None

    def attend() -> Tensor:
        if name != "window":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        grid = (shape.side, shape.side)
        return window_attention(query, key, value, grid=grid, radius=shape.radius, text_len=shape.text_len)

    def run() -> None:
        with torch.set_grad_enabled(backward), autocast(shape):
            out = attend()
        if backward:
            torch.autograd.grad(out, (query, key, value), grad_out.to(out.dtype))

    return run


def autocast(shape: Shape) -> torch.autocast | nullcontext:
    return torch.autocast("cpu", dtype=torch.bfloat16) if shape.autocast else nullcontext()


@dataclass(frozen=True, kw_only=True)
class Timer:
    repeats: int
    clock: Callable[[], float]  # in seconds

    def milliseconds(self, run: Callable[[], None]) -> float:
        start = self.clock()
        run()
        return 1e3 * (self.clock() - start)

    def medians(self, *runs: Callable[[], None]) -> list[float]:
        """Medians of alternating runs, after one warm-up run of each."""
        for run in runs:
            run()
        # Short calls are repeated, so that each measurement takes some milliseconds.
        inner = max(1, math.ceil(10 / self.milliseconds(runs[-1])))
        rounds = [
            [sum(self.milliseconds(run) for _ in range(inner)) / inner for run in runs] for _ in range(self.repeats)
        ]
        return [statistics.median(times) for times in zip(*rounds, strict=True)]


def compare(shape: Shape, other: str, timer: Timer, *, backward: bool, mark: float) -> Row:
    ours, theirs = timer.medians(*(step(shape, name, backward=backward) for name in ("window", other)))
    what = f"{shape}: {direction(backward)} against {other}"
    return show(Row(what=what, ours=ours, other=theirs, ratio=theirs / ours, mark=mark))


def direction(backward: bool) -> str:
    return "forward + backward" if backward else "forward"


def pair_rows(timer: Timer) -> list[Row]:
    rows = []
    for shape, *marks in AGAINST_DENSE:
        for backward, mark in zip((False, True), marks, strict=True):
            rows.append(compare(shape, "dense", timer, backward=backward, mark=mark))
    for shape in AGAINST_MASKED:
        for backward in (False, True):
            rows.append(compare(shape, "masked", timer, backward=backward, mark=0.95))
    return rows


def growth_rows(timer: Timer) -> list[Row]:
    """Time from 65,536 to 262,144 tokens."""
    rows = []
    for backward in (False, True):
        runs = (step(Shape(side=side), "window", backward=backward) for side in GROWTH)
        small, large = replace(timer, repeats=min(timer.repeats, 3)).medians(*runs)
        what = f"{Shape(side=GROWTH[1])} against {GROWTH[0]}x{GROWTH[0]}: {direction(backward)}"
        rows.append(show(Row(what=what, ours=large, other=small, ratio=large / small, mark=5.0, better="lower")))
    return rows


def memory_rows() -> list[Row]:
    """Peak memory of a forward and backward, beyond that of the inputs."""
    ours, dense = fresh_process_memory(128, "window"), fresh_process_memory(128, "dense")
    what = f"{Shape(side=128)}: memory against dense"
    rows = [show(Row(what=what, ours=ours, other=dense, ratio=ours / dense, mark=2.5, better="lower"))]
    small, large = (fresh_process_memory(side, "window") for side in GROWTH)
    what = f"{Shape(side=GROWTH[1])} against {GROWTH[0]}x{GROWTH[0]}: memory"
    rows.append(show(Row(what=what, ours=large, other=small, ratio=large / small, mark=4.2, better="lower")))
    return rows


def fresh_process_memory(side: int, name: str) -> float:
    """MiB, measured by this script in a process started for it."""
    command = [sys.executable, __file__, "--measure-memory", name, str(side), "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(name: str, side: int) -> float:
    """Growth of this process's peak resident memory by one forward and backward, in MiB."""
    step(Shape(side=8), name, backward=True)()
    run = step(Shape(side=side), name, backward=True)
    before = peak_resident_memory()
    run()
    return peak_resident_memory() - before


def peak_resident_memory() -> float:
    """MiB of this process; `getrusage` would report its parent's peak if that was higher."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def show(row: Row) -> Row:
    mark = f"{'>=' if row.better == 'higher' else '<='} {row.mark:<5} {'met' if row.met else 'MISSED'}"
    print(f"{row.what:100} {row.ours:9.1f} {row.other:9.1f} {row.ratio:7.2f} {mark}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--only", choices=["pairs", "growth", "memory"], action="append")
    parser.add_argument("--json", help="file for the JSON instead of the terminal")
    parser.add_argument("--measure-memory", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.measure_memory:
        name, side = arguments.measure_memory
        print(measure_memory(name, int(side)))
        return

    only = arguments.only or ["pairs", "growth", "memory"]
    print(f"{'':100} {'window':>9} {'other':>9} {'ratio':>7} mark")
    timer = Timer(repeats=arguments.repeats, clock=time.process_time if arguments.clock == "cpu" else time.perf_counter)
    rows = pair_rows(timer) if "pairs" in only else []
    rows += growth_rows(timer) if "growth" in only else []
    rows += memory_rows() if "memory" in only else []
    results = {
        "torch": torch.__version__,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "clock": arguments.clock,
        "rows": [asdict(row) | {"met": row.met} for row in rows],
    }
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    else:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
