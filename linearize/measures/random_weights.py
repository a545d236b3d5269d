"""A denoiser in its true shape with random weights: for what does not depend on their values, such as time."""

from typing import Any, cast

import diffusers
import torch
from torch import nn

from ..adapters.base import cast_as_loaded_


def random_model(model_class: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The weights that a class of diffusers begins with, in the dtypes of a loaded model, frozen."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # at once, or float32 would need twice the memory
    try:
        with torch.device(device):
            model = cast(nn.Module, getattr(diffusers, model_class).from_config(config))
    finally:
        torch.set_default_dtype(before)
    cast_as_loaded_(model, dtype)
    return model.eval().requires_grad_(False)
