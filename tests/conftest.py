"""Settings of every test: offline, one thread and seed, Triton interpreted, new memory filled with NaN."""

import gc
import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest
import torch

from benchmarks.gpu.interpreter import speed_up_interpreter

hypothesis.settings.register_profile("lineardit", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("lineardit")


class TorchRandom:
    """torch's global generator in the form that hypothesis seeds before every example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)


if find_spec("triton"):
    speed_up_interpreter()


# The files that take longest among those with few tests.
FIRST_FILES = (
    "kernels/test_kernel_resources.py",
    "benchmarks/test_gpu_smoke.py",
    "linearize/test_compiling.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run these files first, so that no process is left with one of them at the end."""
    order = {Path(__file__).parent / file: index for index, file in enumerate(FIRST_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Freeze what is imported by now, so that garbage collections do not traverse it, which takes long."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from this seed of torch's global generator."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """`torch.empty` and its relatives give NaN (integers: their maximum), so that reads of unwritten memory show up."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def logging_levels() -> Iterator[None]:
    """Reset the levels that a command sets for its process, also in a module's fixture before the test."""
    known = logging.root.manager.loggerDict
    for name, logger in list(known.items()):
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "lineardit":
            _set_level(logger, logging.NOTSET)
    before = {logger: logger.level for logger in (logging.root, *known.values()) if isinstance(logger, logging.Logger)}
    yield
    for logger, level in before.items():
        _set_level(logger, level)


def _set_level(logger: logging.Logger, level: int) -> None:
    if logger.level != level:  # setting one walks over all loggers
        logger.setLevel(level)
