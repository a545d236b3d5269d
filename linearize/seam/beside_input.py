"""A method's weights beside their input: offloading that was enabled before `linearize_` moves none of them."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_beside(module: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
    """module(x, ...), with copies of its weights where they lie on another device than x."""
    weight = next(module.parameters(), None)
    if weight is None or weight.device == x.device or weight.is_meta:  # offloaded with a hook of its own
        return module(x, *args, **options)
    weights = {name: weight.to(x.device) for name, weight in module.named_parameters()}
    return functional_call(module, weights, (x, *args), options)
