"""Training a LoRA on frozen weights in 8 or 4 bits, as in QLoRA (arXiv:2305.14314)."""

import torch
from torch import nn

from ..linearize.adapters.quantization import SETTING
from ..linearize.weights.quantized import is_quantized


def check_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """Check on the first quantized layer that gradients pass through it to the trained weights before it.

    As in a training step, a forward without gradients comes first: on some CPUs bitsandbytes then repacks its layers.

    Raises:
        ValueError: they do not, for example because activations are quantized as well.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and is_quantized(layer.weight):
            values = torch.ones(1, layer.in_features, dtype=dtype, device=layer.weight.device, requires_grad=True)
            with torch.no_grad():
                layer(values.detach())
            try:
                layer(values).sum().backward()
                passes = values.grad is not None and bool(values.grad.any())
            except RuntimeError:  # it has no backward
                passes = False
            if not passes:
                raise ValueError(
                    f"no gradient passes through {name}, whose weight is a {type(layer.weight).__name__}: use a kind "
                    f"of {SETTING} that quantizes only weights"
                )
            return
