"""How tensors are handed to a Triton kernel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def block_d(head_dim: int) -> int:
    """Width of a row inside the kernels: a power of two, at least 16 for the matrix units."""
    return max(16, triton.next_power_of_2(head_dim))


def with_strides(*tensors: Tensor) -> list[Any]:
    """Each tensor and its strides over batch, head and token."""
    return [item for tensor in tensors for item in (tensor, *tensor.stride()[:3])]


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
