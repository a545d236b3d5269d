"""Launch arguments of the Triton kernels."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def block_d(head_dim: int) -> int:
    """Width of a row inside the kernels: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(head_dim))


def max_stages(dtype: torch.dtype) -> int:
    """The largest `num_stages` of Triton's loads; 1 loads nothing ahead.

    float32 products use no tensor cores and keep their operands in registers: with loads ahead, kernels spill (5 to
    13 KB per thread, compiled for 9.0) and take up to half a minute each to compile.
    """
    return 1 if dtype == torch.float32 else 3


STRIDE_UNIT = 8  # half-precision elements are 16 bytes, the most that a thread loads at once


def with_strides(*tensors: Tensor) -> tuple[list[Any], int]:
    """Each tensor and its strides over batch, head and token, and their unit in elements: 8 if it divides all, else 1.

    Triton itself only detects strides that are multiples of 16. Between heads of dimension 40 or 72 they are not, and
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
    """The tensor itself if each token's row is contiguous, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def split(length: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(parts, length of a part, a multiple of `block`), such that `programs` per part keep the device busy."""
    blocks = triton.cdiv(length, block)
    parts = min(blocks, triton.cdiv(_target_programs(device), programs))
    part_len = triton.cdiv(blocks, parts) * block
    return triton.cdiv(length, part_len), part_len


def _target_programs(device: torch.device) -> int:
    """Four per multiprocessor, so that none idles for long at the end."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context to run kernels on the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
