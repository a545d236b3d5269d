"""Starts a distillation in processes of its own, as a user would: `accelerate launch -m lineardit.distill CONFIG`."""

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

PATIENCE = 30  # seconds for an interrupted child to end by itself
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore::FutureWarning"}


def launch(config: Path, options: Sequence[str] = (), *, processes: int = 1) -> int:
    """Run a distillation to its end; its exit code.

    Args:
        config: The run's settings, a TOML file.
        options: For the distillation, such as ("--resume", "latest").
        processes: On this machine; several on CPUs too.
    """
    several = ["--multi_gpu"] if processes > 1 else []  # without it accelerate starts one on CPUs, whatever the number
    settings = ["--quiet", *several, "--num_machines", "1", "--num_processes", str(processes)]
    settings += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    settings += ["--num_cpu_threads_per_process", str(max(1, torch.get_num_threads() // processes))]  # else one
    arguments = [*settings, "-m", "lineardit.distill", str(config), *options]
    logger.info("%s", shlex.join(["accelerate", "launch", *arguments]))
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    with subprocess.Popen(command, env=child_environment()) as process, stops_with_this(process):
        try:
            return process.wait()
        except KeyboardInterrupt:  # of a terminal, which interrupts the children as well
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=PATIENCE)
            _signal(process, signal.SIGTERM)
            raise


@contextmanager
def stops_with_this(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, a signal that ends this process (SIGTERM) ends the child and its children, which else would go on."""

    def stop(signal_number: int, _frame: object) -> None:
        _signal(process, signal_number)

    if threading.current_thread() is not threading.main_thread():  # only there Python hears signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To a child and its children."""
    if process.poll() is not None:
        return
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            one.send_signal(number)


def child_environment() -> Mapping[str, str]:
    """For a child that finds the same package as this process, installed or not, and keeps the libraries quiet."""
    package = Path(str(sys.modules["lineardit"].__file__)).parent
    search_path = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return QUIET | os.environ | {"PYTHONPATH": search_path}
