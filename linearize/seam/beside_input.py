"""A method's weights beside their input: offloading that was enabled before `linearize_` moves none of them.

Offloading in groups moves them as `forward` runs, and so not those of a part that a hybrid calls by another name.
"""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_beside(module: nn.Module, x: Tensor, *args: Any, **options: Any) -> Any:
    """module(x, ...), with copies of those weights that lie on another device than x."""
    away = [weight for weight in module.parameters() if weight.device != x.device]
    if not away or any(weight.is_meta for weight in away):  # offloaded with a hook of its own
        return module(x, *args, **options)
    weights = {name: weight.to(x.device) for name, weight in module.named_parameters()}
    return functional_call(module, weights, (x, *args), options)
