"""Compiles the Triton kernels on all cores at once, into Triton's disk cache, before rows are measured one by one.

    python -m benchmarks.gpu.compile_ahead FILE DEADLINE PLACE COUNT

is one of COUNT such processes: it runs its share of the correctness cases and discards the results.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from .bench import FULL, SMOKE, Bench
from .correctness import case_tasks
from .environment import ROOT
from .records import load

MAX_PROCESSES = 12  # each takes a few hundred MiB of the GPU's memory


def compile_ahead(path: Path, deadline: float) -> None:
    """Run the processes until all cases are done, for at most half of the time that is left."""
    start, count = time.monotonic(), min(len(os.sched_getaffinity(0)) - 1, MAX_PROCESSES)
    if count < 2:
        return
    command = [sys.executable, "-m", f"{__package__}.compile_ahead", str(path), f"{deadline:.0f}"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    runs = [subprocess.Popen([*command, str(place), str(count)], cwd=ROOT, **silent) for place in range(count)]
    limit = (start + deadline) / 2
    for run in runs:
        try:
            run.wait(max(limit - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
    print(f"{count} processes compiled kernels for {time.monotonic() - start:.0f} s", flush=True)
    failed = sum(run.returncode not in (0, -signal.SIGKILL) for run in runs)
    if failed:
        print(f"{failed} of them ended with an error: their kernels are compiled as rows are measured", flush=True)


def main() -> None:
    path, deadline, place, count = sys.argv[1:]
    results = load(Path(path))
    bench = Bench(scale=SMOKE if results.head.smoke else FULL, results=results, deadline=float(deadline))
    torch.manual_seed(0)
    for task in islice(case_tasks(bench), int(place), None, int(count)):
        if bench.seconds_left() > 0 and results.find(*task.key) is None:
            with contextlib.suppress(Exception):  # reported when the row is measured
                task.measure()


if __name__ == "__main__":
    main()
