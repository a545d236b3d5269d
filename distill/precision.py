"""Whether bfloat16 is faster on this machine: on a CPU without instructions for it, it is much slower than float32."""

import logging
import time
from functools import lru_cache

import torch

from .config import DistillConfig

logger = logging.getLogger(__name__)


def uses_autocast(config: DistillConfig, device: torch.device) -> bool:
    """Whether `run.mixed_precision` makes the student compute in bfloat16; warns if that is slow on this device."""
    mode = config.run.mixed_precision
    if mode == "auto":
        return config.base.dtype == "bfloat16" or bfloat16_is_faster(device.type)
    if mode == "bf16" and not bfloat16_is_faster(device.type):
        logger.warning(
            "run.mixed_precision = 'bf16' is slower than float32 on this %s; 'no' or 'auto' computes in float32",
            device.type.upper(),
        )
    return mode == "bf16"


@lru_cache  # measured once for each kind of device
def bfloat16_is_faster(device_type: str) -> bool:
    """On a GPU, whether it has bfloat16 instructions; elsewhere, measured on a matrix product of a layer's size."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.ones(size, device=device_type, dtype=dtype) for size in ((512, 256), (256, 512)))
        torch.mm(left, right)
        seconds[dtype] = min(_seconds(left, right) for _ in range(3))
    return seconds[torch.bfloat16] < seconds[torch.float32]


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    began = time.perf_counter()
    torch.mm(left, right).sum().item()  # waits for the device
    return time.perf_counter() - began
