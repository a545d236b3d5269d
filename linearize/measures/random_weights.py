"""A denoiser of full size with random weights, to measure what does not depend on their values, such as time."""

from typing import Any, cast

import diffusers
import torch
from torch import nn

from ..adapters.base import cast_as_loaded_


def random_model(model_class: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A freshly initialized diffusers model, in the dtypes of a loaded one, frozen."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # casting from float32 would need twice the memory
    try:
        with torch.device(device):
            model = cast(nn.Module, getattr(diffusers, model_class).from_config(config))
    finally:
        torch.set_default_dtype(default_dtype)
    cast_as_loaded_(model, dtype)
    return model.eval().requires_grad_(False)
