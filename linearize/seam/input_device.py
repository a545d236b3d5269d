"""Runs a module on its input's device: offloading enabled before `linearize_` does not move a method's weights.

Group offloading moves weights when `forward` runs, so it misses the parts of a hybrid whose other methods are called.
"""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_on_input_device(module: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
    """module(x, ...), with weights on another device copied to the device of x."""
    elsewhere = [weight for weight in module.parameters() if weight.device != x.device]
    if not elsewhere or any(weight.is_meta for weight in elsewhere):  # offloaded: its own hook loads the weights
        return module(x, *args, **options)
    weights = {name: weight.to(x.device) for name, weight in module.named_parameters()}
    return functional_call(module, weights, (x, *args), options)
