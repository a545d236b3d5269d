"""Networks of a method that change the inputs of layers in an attention module: `to_q(x + term(x))`, not `to_q(x)`."""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..layout import Layout
from ..matching import head_shape
from ..methods import METHODS, Method
from .input_device import call_on_input_device
from .original import runs_original


class InputTerms:
    """The terms of one converted module, as forward pre-hooks of its layers.

    Args:
        attention: The attention module.
        kernel: Its linear kernel, whose `input_terms` map layers of the module to children of the kernel.
        level: The `Level` that holds its token grid.
    """

    def __init__(self, attention: nn.Module, kernel: Method, level: Any) -> None:
        self.attention = attention
        terms = kernel.input_terms.items()
        self.hooks = {layer: _AddTerm(kernel.get_submodule(child), kernel, level) for layer, child in terms}
        self.hooked: dict[str, tuple[nn.Module, torch.utils.hooks.RemovableHandle]] = {}
        for layer, hook in self.hooks.items():
            weight: Any = getattr(attention, layer).weight
            if weight.is_floating_point() and weight.itemsize > 1:
                hook.term.to(weight.dtype)
        self.update_hooks()

    def update_hooks(self) -> None:
        """Move the hooks to the current layers: loading a style wraps a layer in peft's, unloading unwraps it."""
        for name, hook in self.hooks.items():
            layer = getattr(self.attention, name)
            old, handle = self.hooked.get(name, (None, None))
            if layer is old:
                continue
            if handle is not None:
                handle.remove()
            self.hooked[name] = layer, layer.register_forward_pre_hook(hook)

    def remove(self) -> None:
        """Remove the hooks."""
        for _, handle in self.hooked.values():
            handle.remove()
        self.hooked.clear()

    def check_fusable(self) -> None:
        """Refuse to fuse the projections.

        Raises:
            UnsupportedModelError: always; the fused layer would get its input without these terms.
        """
        raise UnsupportedModelError(
            "fuse_qkv_projections would replace to_q, to_k and to_v with one layer, but their inputs differ in this "
            "method: do not fuse the projections"
        )


class _AddTerm:
    """Pre-hook that adds a term to one layer's input."""

    def __init__(self, term: nn.Module, kernel: Method, level: Any) -> None:
        self.term = term
        self.kernel = kernel
        self.level = level

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        conversion = self.level.conversion
        image = Layout(self.level.grid, 0, conversion.family.text_first) if conversion.enabled else None
        if image is None or runs_original(self.kernel, image, conversion.dense_tokens):
            return None
        x, *rest = args
        return x + call_on_input_device(self.term, x), *rest


def check_inputs(name: str, attention: Any, config: Any) -> None:
    """Check that a module has the layers whose inputs a method changes.

    Raises:
        UnsupportedModelError: a layer is missing, or takes another number of channels.
    """
    for layer in METHODS[type(config)].input_terms:
        channels = prod(head_shape(attention))
        found = getattr(getattr(attention, layer, None), "in_features", None)
        if found != channels:
            raise UnsupportedModelError(
                f"{type(config).__name__} needs {name}.{layer} with {channels} inputs, as many as heads * head_dim, "
                f"got {found}: choose other layers, or another method for this model"
            )
