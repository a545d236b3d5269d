"""How tensors are handed to a Triton kernel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def block_d(head_dim: int) -> int:
    """Width of a row inside the kernels: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(head_dim))


def max_stages(dtype: torch.dtype) -> int:
    """The most stages that loads may have, as Triton counts them: 1 loads nothing ahead.

    Products of float32 take no tensor cores and hold their operands in registers: with loads ahead they spill (compiled
    for 9.0, 5 to 13 KB a thread), and take up to half a minute each to compile.
    """
    return 1 if dtype == torch.float32 else 3


STRIDE_UNIT = 8  # elements of half precision are 16 bytes, the most that a thread loads at once


def with_strides(*tensors: Tensor) -> tuple[list[Any], int]:
    """Each tensor and its strides over batch, head and token, in units of the second: 8 elements if all are multiples.

    Triton by itself asks whether a stride is a multiple of 16. That between heads of dimension 40 or 72 is not, and
    rows would be loaded 2 bytes at a time.
    """
    strides = [[step if size > 1 else 0 for step, size in zip(one.stride(), one.shape, strict=True)] for one in tensors]
    aligned = all(step % STRIDE_UNIT == 0 for steps in strides for step in steps[:3])
    unit = STRIDE_UNIT if aligned else 1
    arguments = [
        item
        for tensor, steps in zip(tensors, strides, strict=True)
        for item in (tensor, *(step // unit for step in steps[:3]))
    ]
    return arguments, unit


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where a token's row is one piece of memory, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def split(length: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(parts, length of a part in multiples of `block`), so that `programs` for each part keep the device busy."""
    blocks = triton.cdiv(length, block)
    parts = min(blocks, triton.cdiv(_programs_wanted(device), programs))
    part_len = triton.cdiv(blocks, parts) * block
    return triton.cdiv(length, part_len), part_len


def _programs_wanted(device: torch.device) -> int:
    """Four for each multiprocessor, so that none idles long at the end."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels run on the tensor's card, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
