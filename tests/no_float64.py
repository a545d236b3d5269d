"""Finds on a CPU what a device without float64 would refuse."""

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class NoFloat64(TorchDispatchMode):
    """Raises if an operation, also inside our operators, takes or makes a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "lineardit":
            with self:  # so that the operator's own calls are checked as well
                out = OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        for one in tree_iter((args, kwargs, out)):
            assert not (isinstance(one, torch.Tensor) and one.dtype == torch.float64), f"{func} meets float64"
        return out
