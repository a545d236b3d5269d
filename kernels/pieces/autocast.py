"""Autocast for the inputs of attention."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device_type = tensor.device.type
    return _has_autocast(device_type) and torch.is_autocast_enabled(device_type)


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace `is_autocast_available`
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast for the device of a tensor; the meta device has none to turn off."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device, cast as autocast casts the inputs of `scaled_dot_product_attention`.

    Unchanged if autocast is off; float64 stays float64.
    """
    if not autocast_enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
