"""Peak bytes of a computation, counted tensor by tensor; on the meta device it takes no memory."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Mode that counts the bytes of tensors from their creation until nothing refers to them.

    Args:
        module: Module whose parameters and buffers do not count.
        inputs: Tensors that do not count either.
    Attributes:
        peak: The most bytes held at once.
    """

    def __init__(self, module: nn.Module, inputs: Iterable[Tensor] = ()) -> None:
        super().__init__()
        tensors = (*module.parameters(), *module.buffers(), *inputs)
        self.excluded = {one.untyped_storage()._cdata for one in tensors}
        self.bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.bytes and storage._cdata not in self.excluded:
                self.bytes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return out

    def _forget(self, storage: int) -> None:
        self.now -= self.bytes.pop(storage)
