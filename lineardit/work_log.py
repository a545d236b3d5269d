"""A log of long work that can be interrupted: the running piece, the time of each, and the machine's speed."""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .distill.cost import time_call
from .distill.files import write_json

logger = logging.getLogger(__name__)

FILE = "stages.json"


class WorkLog:
    """Logs which piece runs, and records in a folder the time of each piece over all calls.

    Args:
        directory: New, or that of an interrupted call with the same settings.
        settings: All settings that change results, as JSON values.
    Raises:
        ValueError: the folder holds something else, or was started with other settings.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.file = directory / FILE
        self.record: dict[str, Any] = {"settings": settings, "seconds": {}, "cpu_seconds": {}}
        if self.file.is_file():
            self.record = json.loads(self.file.read_text())
            if changed := [name for name, value in settings.items() if self.record["settings"].get(name) != value]:
                raise ValueError(
                    f"{directory} was started with other {', '.join(changed)}: remove it, or name another folder"
                )
        elif directory.exists() and any(directory.iterdir()):
            raise ValueError(f"{directory} is not empty and was not started by this command: name another folder")
        directory.mkdir(parents=True, exist_ok=True)
        self._add("start", cpu_seconds=cpu_seconds())  # the libraries are loaded by now

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        logger.info("%s", name)
        began, cpu_began = time.perf_counter(), cpu_seconds()
        try:
            yield
        finally:
            self._add(name, seconds=time.perf_counter() - began, cpu_seconds=cpu_seconds() - cpu_began)

    def _add(self, name: str, **durations: float) -> None:
        for key, seconds in durations.items():
            self.record[key][name] = round(self.record[key].get(name, 0.0) + seconds, 2)
        write_json(self.file, self.record)

    def total(self) -> dict[str, float]:
        """{"seconds": of the clock, "cpu_seconds": user and system} over all pieces and calls."""
        return {key: sum(self.record[key].values()) for key in ("seconds", "cpu_seconds")}


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def describe_machine() -> str:
    """What times on this machine depend on, for a report."""
    vectors = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{count} of {vectors}, float32 matrix product: {matmul_gflops():.0f} GFLOP/s"


def describe_device(device: torch.device) -> str:
    """The GPU's name with torch's version; for the CPU, `describe_machine`."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return describe_machine() if device.type == "cpu" else str(device)


@lru_cache
def matmul_gflops() -> float:
    """CPU speed in a float32 product of 1024 x 1024 matrices, median of 20, cached: for comparing machines."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / median(time_call(lambda: torch.mm(left, right)) for _ in range(20)) / 1e9
