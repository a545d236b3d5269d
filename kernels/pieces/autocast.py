"""What autocast makes of the inputs of attention."""

import torch
from torch import Tensor


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor."""
    device_type = tensor.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def as_autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast casts the inputs of `scaled_dot_product_attention`: not at all where it is off, nor float64."""
    if not autocast_enabled(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
