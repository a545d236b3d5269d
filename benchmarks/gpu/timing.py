"""Time and peak memory of a call, on a GPU or (smoke runs) a CPU."""

import math
import resource
import statistics
import time
from collections.abc import Callable

import torch

FLUSH_BYTES = 2**30
MEASURING_SECONDS = 0.3  # seconds of measuring


def seconds(
    run: Callable[[], object], device: torch.device, *, repeats: int, budget: float = MEASURING_SECONDS
) -> float:
    """Median time of a call that ran before.

    On a GPU, device time by events, with cold caches: other memory is written before each run, which also gives the
    host a head start. Three to `repeats` runs, for about `budget` seconds; one if it takes over three times as long.
    """
    measure = _on_gpu if device.type == "cuda" else _on_cpu
    first = measure(run, 1)
    if first > 3 * budget or repeats == 1:
        return first
    return measure(run, min(repeats, max(3, math.ceil(budget / first))))


def peak_gib(run: Callable[[], object], device: torch.device) -> float:
    """Peak GiB allocated during the call, earlier allocations included; on a CPU, the process's peak so far."""
    if device.type != "cuda":
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def shared_memory(device: torch.device) -> int:
    """Largest number of bytes that a program may take on this GPU."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def _on_gpu(run: Callable[[], object], repeats: int) -> float:
    free, _ = torch.cuda.mem_get_info()
    flush = torch.empty(min(FLUSH_BYTES, free // 8), dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _on_cpu(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
