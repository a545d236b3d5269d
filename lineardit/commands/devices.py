"""The device that a command runs on, and the dtype of weights that suits it."""

import os

import torch

from ..linearize.adapters.opening import DTYPES
from ..linearize.errors import did_you_mean


def available_devices() -> list[str]:
    """The names of this machine's devices."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def find_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA (under a launcher the process's own), else Apple's GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    devices = available_devices()
    if name == "auto":
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return torch.device(own if own in devices else "cuda" if "cuda:0" in devices else devices[-1])
    if name not in devices and not (name == "cuda" and "cuda:0" in devices):
        raise ValueError(f"device must be auto or one of {', '.join(devices)}, got {name!r}")
    return torch.device(name)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        ValueError: no such dtype.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}{did_you_mean(name, DTYPES)}")
    return DTYPES[name]
