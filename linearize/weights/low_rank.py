"""LoRA (arXiv:2106.09685) as part of a student: a low-rank term added to some Linear layers.

It is deliberately not a peft adapter. Those belong to the user: loading or choosing a style switches all others off,
and `unload_lora_weights` removes them. A student without its trained weights is broken, so its term is a child of the
Linear layer, which keeps its name and weights; a style's peft layer wraps that Linear, and the two are independent.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

from ..adapters.manifest import Trained
from ..seam.group_offload import regroup_offload_
from ..seam.intercept import change_class, check_forward
from .overlays import NOT_REVERSIBLE, plain_layer

LORA_NAME = "lineardit_lora"  # the child of a Linear layer that holds its low-rank term


class LowRankTerm(nn.Module):
    """scale * up(down(x)), computed in x's dtype on x's device: LoRA's term for one Linear layer."""

    def __init__(self, down: Tensor, up: Tensor, *, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)  # [rank, in]
        self.up = nn.Parameter(up)  # [out, rank]
        self.scale = scale
        self.enabled = True
        self.keeps_dtype = False  # True while the parent layer is stored in 8 bits

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return functional.linear(functional.linear(x, self.down.to(x)), self.up.to(x)) * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # layerwise casting casts the parent layer to the compute dtype and back to 8 bits: both would round the factors
        return super()._apply(lambda tensor: self._moved(tensor, fn(tensor)), recurse)

    def _moved(self, tensor: Tensor, converted: Tensor) -> Tensor:
        return tensor.to(converted.device) if self.keeps_dtype or converted.itemsize == 1 else converted


class LowRankLayer:
    """Mixin before a Linear layer's own class, quantized or not: adds the low-rank term of its child to the output."""

    _plain_class: Any
    lineardit_lora: LowRankTerm

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        out = super().forward(x)  # type: ignore[misc]
        return out + self.lineardit_lora(x) if self.lineardit_lora.enabled else out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.lineardit_lora.keeps_dtype = cast(Any, self).weight.itemsize == 1
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class: this one is created on demand and cannot be imported."""
        return _blank_layer, (self._plain_class,), self.__dict__.copy()


@cache
def low_rank_class(plain_class: type[Any]) -> type[nn.Module]:
    """The class of a layer with a low-rank term whose own class is `plain_class`."""
    name = f"LowRank{plain_class.__name__}"
    return type(name, (LowRankLayer, plain_class), {"__module__": __name__, "_plain_class": plain_class})


def _blank_layer(plain_class: Any) -> nn.Module:
    cls = low_rank_class(plain_class)
    return cls.__new__(cls)


def _reset_compiled_graphs() -> None:
    """Reset compiled graphs: before 2.13, torch does not notice that the class of a compiled Linear has changed."""
    if Version(torch.__version__).release < (2, 13):
        torch.compiler.reset()


class LowRank:
    """LoRA (arXiv:2106.09685) on some Linear layers: each becomes a `LowRankLayer` with a `LowRankTerm`.

    Args:
        model: The denoiser.
        factors: {layer name: (down [rank, in], up [out, rank])}; they become the parameters without a copy.
        alpha: The term's factor is alpha / rank.
    Raises:
        UnsupportedModelError: another tool has replaced a layer's forward.
    """

    reversible = True

    def __init__(self, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float) -> None:
        self.alpha = alpha
        self.layers = {name: plain_layer(model, name) for name in factors}
        self.rank = next(iter(factors.values()))[0].shape[0]
        for name, layer in self.layers.items():
            check_forward(name, layer)
        for name, layer in self.layers.items():
            layer.add_module(LORA_NAME, LowRankTerm(*factors[name], scale=alpha / self.rank))
            plain_class: Any = type(layer)
            change_class(layer, low_rank_class(plain_class))
        regroup_offload_(model)
        _reset_compiled_graphs()

    def terms(self) -> dict[str, LowRankTerm]:
        """The low-rank term of every layer, by the layer's name."""
        return {name: cast(LowRankTerm, layer.get_submodule(LORA_NAME)) for name, layer in self.layers.items()}

    def check_reversible(self) -> None:
        return

    def off(self) -> None:
        for term in self.terms().values():
            term.enabled = False

    def on(self) -> None:
        for term in self.terms().values():
            term.enabled = True

    def remove(self) -> None:
        for layer in self.layers.values():
            change_class(layer, cast(Any, layer)._plain_class)
            delattr(layer, LORA_NAME)
        _reset_compiled_graphs()

    def changed(self) -> list[str]:
        return []

    def merged_weights(self) -> dict[str, Tensor]:
        """The layers' weights with the terms added."""
        with torch.no_grad():
            return {
                f"{name}.weight": merged_weight(self.layers[name].weight, term.down, term.up, scale=term.scale)
                for name, term in self.terms().items()
            }

    def tensors(self) -> dict[str, Tensor]:
        return _with_peft_names({name: (term.down.detach(), term.up.detach()) for name, term in self.terms().items()})

    def describe(self) -> Trained:
        return Trained(kind="lora", rank=self.rank, alpha=self.alpha)


class FusedLowRank:
    """LoRA added into its layers' weights: no cost per step, but not reversible. The factors are kept for saving."""

    reversible = False

    def __init__(self, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float) -> None:
        self.alpha = alpha
        self.rank = next(iter(factors.values()))[0].shape[0]
        self.factors = {name: (down.cpu(), up.cpu()) for name, (down, up) in factors.items()}
        weights = {name: plain_layer(model, name).weight for name in factors}
        with torch.no_grad():
            for name, (down, up) in factors.items():
                weights[name].copy_(merged_weight(weights[name], down, up, scale=alpha / self.rank))

    def check_reversible(self) -> None:
        raise ValueError(NOT_REVERSIBLE)

    off = on = remove = check_reversible

    def changed(self) -> list[str]:
        return [f"{name}.weight" for name in self.factors]

    def tensors(self) -> dict[str, Tensor]:
        return _with_peft_names(self.factors)

    def describe(self) -> Trained:
        return Trained(kind="lora", rank=self.rank, alpha=self.alpha)


def _with_peft_names(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """LoRA factors by peft's names, which adapters use: A is down, B is up."""
    downs = {f"{name}.lora_A.weight": down for name, (down, _) in factors.items()}
    return downs | {f"{name}.lora_B.weight": up for name, (_, up) in factors.items()}


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, *, scale: float) -> Tensor:
    """weight + scale * up @ down, computed in float32, in the dtype of weight."""
    term = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
    return (weight.float() + term * scale).to(weight.dtype)


def match_layer(model: nn.Module, name: str, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Copies of LoRA factors on a layer's device and in its dtype, if that is a float of 16 bits or more."""
    weight = plain_layer(model, name).weight
    device = factors[0].device if weight.is_meta else weight.device
    dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else None
    down, up = (factor.to(device, dtype, copy=True) for factor in factors)
    return down, up
