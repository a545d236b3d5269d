"""Starts a distillation in separate processes on this machine, as `accelerate launch -m lineardit.distill` would.

A run that ends with a one-sentence error prints that sentence only; other launchers add a traceback of their own.
"""

import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SHUTDOWN_WAIT = 30  # seconds for an interrupted process to end by itself
POLL = 0.1  # seconds between polls of the processes
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}

Worker = subprocess.Popen[bytes]


def launch(config: Path, options: Sequence[str] = (), *, processes: int = 1) -> int:
    """Run a distillation to its end; returns the exit code of the first process that fails, else 0.

    Args:
        config: The run's settings, a TOML file.
        options: For the distillation, such as ("--resume", "latest").
        processes: Number of processes on this machine; may be several on CPUs too.
    """
    words = ["-m", "lineardit.distill", str(config), *options]
    logger.info("%s%s", shlex.join(["python", *words]), f", in {processes} processes" if processes > 1 else "")
    command = [sys.executable, *words, "--launcher", str(os.getpid())]
    workers: list[Worker] = []
    with _end_on_exit(workers) as signals:
        try:
            for environment in _environments(processes):
                workers.append(subprocess.Popen(command, env=environment))
            return _first_failure(workers, signals)
        except KeyboardInterrupt:  # from a terminal, which interrupts the workers as well
            with suppress(subprocess.TimeoutExpired):
                _wait(workers, SHUTDOWN_WAIT)
            raise


def _environments(processes: int) -> list[Mapping[str, str]]:
    """The environment of each process: variables that torch.distributed reads, and its share of the threads."""
    threads = str(max(1, torch.get_num_threads() // processes))
    environment = {**child_environment(), "OMP_NUM_THREADS": threads}
    if processes == 1:
        return [environment]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {name: str(value) for name, value in group.items()}
    return [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _first_failure(workers: Sequence[Worker], signals: Sequence[int]) -> int:
    """Wait for all, or the first failure, which would hang the rest; its exit code or 0, SystemExit on a signal."""
    while True:
        if signals:
            raise SystemExit(128 + signals[0])
        codes = [one.poll() for one in workers]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                logger.error(
                    "process %d was ended by %s; --resume latest continues after the newest checkpoint", rank, name
                )
                return 128 - code
            if code:
                return code
        if None not in codes:
            return 0
        time.sleep(POLL)


@contextmanager
def _end_on_exit(workers: Sequence[Worker]) -> Iterator[list[int]]:
    """End all workers on exit; inside, SIGTERM is only recorded, since it may arrive while a worker starts."""
    signals: list[int] = []

    def record(number: int, _frame: object) -> None:
        signals.append(number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # Python handles signals only there
    previous = signal.signal(signal.SIGTERM, record) if in_main_thread else None
    try:
        yield signals
    finally:
        _signal(workers, signal.SIGTERM)
        try:
            _wait(workers, SHUTDOWN_WAIT)
        except subprocess.TimeoutExpired:
            _signal(workers, signal.SIGKILL)
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _signal(workers: Sequence[Worker], number: int) -> None:
    for one in workers:
        one.send_signal(number)  # no effect on one that has ended


def _wait(workers: Sequence[Worker], seconds: float) -> None:
    """Wait until all have ended, for this long in total at most."""
    deadline = time.monotonic() + seconds
    for one in workers:
        one.wait(timeout=max(0, deadline - time.monotonic()))


def exit_with_launcher(launcher: int) -> None:
    """End this process soon after its parent, the launcher, which may be killed before it can end its workers.

    Orphaned workers would otherwise keep running unseen and hold the run's folder.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write("lineardit.distill: the launcher was killed; --resume latest continues\n")
            sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def child_environment() -> Mapping[str, str]:
    """The environment of a child: it finds the same package as this process, installed or not, with quiet libraries."""
    package = Path(str(sys.modules["lineardit"].__file__)).parent
    search_path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return QUIET_ENVIRONMENT | os.environ | {"PYTHONPATH": search_path}
