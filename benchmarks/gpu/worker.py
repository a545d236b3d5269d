"""Runs parts in one process: `python -m benchmarks.gpu.worker FILE DEADLINE PART...`.

Measures the rows that the file does not have yet. An error fails its row; one that leaves the GPU unusable ends the
process as well. The parent process reads the row from the file, and restarts after it.
"""

import gc
import importlib
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path

import torch

from .bench import FULL, SMOKE, Bench, Measurement, OutOfTimeError, Task, UnavailableError
from .interpreter import speed_up_interpreter
from .records import Row, finite, load
from .tables import line

MODULES = {"correctness": "correctness", "operator": "operator_speed", "model": "model_step", "memory": "peak_memory"}


def measure(task: Task, bench: Bench) -> None:
    """Measure one row; write it to the file and the terminal."""
    results = bench.results
    if results.find(*task.key) is not None:
        return
    start = time.monotonic()

    def row(status: str, measured: Measurement) -> Row:
        took, figures = time.monotonic() - start, finite(measured.figures)
        return Row(
            part=task.part,
            case=task.case,
            impl=task.impl,
            status=status,
            took=round(took, 1),
            figures=figures,
            note=measured.note,
        )

    if bench.seconds_left() < 0:
        results.add(row("left out", Measurement(figures={}, note="the time of this part was spent; run it again")))
        return
    results.start(task.key)
    try:
        measured = task.measure()
        done = row("measured" if measured.passed else "failed", measured)
    except UnavailableError as reason:
        done = row("not available", Measurement(figures={}, note=str(reason)))
    except OutOfTimeError as reason:
        done = row("left out", Measurement(figures={}, note=str(reason)))
    except torch.OutOfMemoryError:
        done = row("not available", Measurement(figures={}, note="out of memory on this card"))
    except Exception as error:  # noqa: BLE001 the other rows can still be measured
        if bench.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the context is broken
        traceback.print_exc()
        done = row(
            "failed", Measurement(figures={}, note=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        )
    results.add(done)
    print(line(done), flush=True)
    if bench.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    path, deadline, *parts = sys.argv[1:]
    results = load(Path(path))
    bench = Bench(scale=SMOKE if results.head.smoke else FULL, results=results, deadline=float(deadline))
    torch.manual_seed(0)
    if results.head.smoke and find_spec("triton"):
        speed_up_interpreter()
    for part in parts:
        print(f"\n-- {part}", flush=True)
        for task in importlib.import_module(f".{MODULES[part]}", __package__).tasks(bench):
            measure(task, bench)


if __name__ == "__main__":
    main()
