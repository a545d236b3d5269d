"""Peak memory of the cascade on a CPU: `python benchmarks/high_resolution_memory.py`, minutes on two idle cores.

Each size in a fresh process, one step per stage, with the small model and local attention: the growth of the process
over its size with the pipeline loaded and a smallest picture drawn. The values of the weights do not matter. Writes
benchmarks/results/high_resolution_memory.json and .md; `make high-resolution` includes it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch

from lineardit import Clear, HighResolutionPipeline, linearize_
from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.cost import resident_peak
from lineardit.distill.files import write_json
from lineardit.distill.launch import child_environment
from lineardit.examples.tiny_flux import path
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.folders import write_atomically
from lineardit.pipelines.plan import Settings

RESULTS = Path(__file__).with_name("results")
SIDES = (512, 1024, 2048)
MAX_GROWTH = 4.2  # largest growth factor for four times the pixels
MIB = 2**20
CAPTION = "a red circle at the top left and a blue cross at the middle right on striped sand"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory for one square picture, in MiB."""

    side: int  # pixels
    idle: float  # of the process before the picture
    growth: float  # of the peak over that
    seconds: float

    @property
    def peak(self) -> float:
        """The process at its peak; `getrusage` would report its parent's peak if that was higher."""
        return self.idle + self.growth


def measure(side: int) -> Memory:
    """Measure in this process, which should be fresh."""
    pipe = open_pipeline(path())
    linearize_(pipe, Clear(radius=4))
    high = HighResolutionPipeline.from_pipe(pipe)
    high.set_progress_bar_config(disable=True)
    text_tokens = 64
    smallest = high.plan(32, 32, num_inference_steps=1)
    plan = high.plan(side, side, num_inference_steps=1, settings=Settings(steps=1))
    for one in (smallest, plan):
        idle, began = psutil.Process().memory_info().rss, time.perf_counter()
        with resident_peak() as grown:
            generator = torch.Generator("cpu").manual_seed(0)
            high(CAPTION, plan=one, max_sequence_length=text_tokens, generator=generator)
    return Memory(
        side=side,
        idle=idle / MIB,
        growth=grown[0] / MIB,
        seconds=time.perf_counter() - began,
    )


def measure_fresh(sides: Sequence[int]) -> list[Memory]:
    """Measure each size in a fresh process."""
    made = []
    for side in sides:
        command = [sys.executable, __file__, "--one", str(side)]
        done = subprocess.run(command, env=child_environment(), stdout=subprocess.PIPE, text=True, check=True)
        made.append(Memory(**json.loads(done.stdout.splitlines()[-1])))
    return made


def growths(memory: Sequence[Memory]) -> list[tuple[str, float]]:
    """Growth factors from each size to the next."""
    return [(f"{one.side} to {two.side} px", two.growth / one.growth) for one, two in pairwise(memory)]


def table(memory: Sequence[Memory]) -> str:
    """A Markdown table."""
    lines = ["| pixels | growth over idle, MiB | times | whole process, MiB | idle, MiB | seconds |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    times = ["", *(f"{ratio:.2f}" for _, ratio in growths(memory))]
    lines += [
        f"| {one.side} | {one.growth:.0f} | {ratio} | {one.peak:.0f} | {one.idle:.0f} | {one.seconds:.0f} |"
        for one, ratio in zip(memory, times, strict=True)
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="pixels")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", type=int, metavar="SIDE", help="measure this process and print JSON")
    options = parser.parse_args()
    quiet_libraries()
    if options.one:
        print(json.dumps(asdict(measure(options.one))))
        return
    memory = measure_fresh(options.sides)
    write_json(options.results / "high_resolution_memory.json", {"memory": [asdict(one) for one in memory]})
    text = f"# Memory of the cascade on a CPU\n\n{table(memory)}\n"
    write_atomically(options.results / "high_resolution_memory.md", lambda temporary: temporary.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
