"""What autocast makes of the inputs of attention."""

import torch
from torch import Tensor


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    return _has_autocast(tensor.device.type) and torch.is_autocast_enabled(tensor.device.type)


@torch.compiler.assume_constant_result  # torch 2.11 cannot trace the question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def as_autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast casts the inputs of `scaled_dot_product_attention`: not at all where it is off, nor float64."""
    if not autocast_enabled(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
