"""What holds for every test: offline, one thread, one seed, and fresh memory that is full of NaN."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("lineardit", derandomize=True, deadline=None, max_examples=25, database=None)
hypothesis.settings.load_profile("lineardit")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from this seed of torch's global generator."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """`torch.empty` and its relatives give NaN (integers: their maximum), so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
