"""What training adds to a base's weights, and how to take it off again.

A student is its base, plus the parameters of its linear kernels, plus overlays: a low-rank term beside some Linear
layers (`LowRank`, LoRA), or changed tensors whose originals are kept (`FullWeights`).

LoRA is not a peft adapter here on purpose. Adapters in peft belong to the user: loading or choosing a style switches
all others off, `unload_lora_weights` removes them. A student without its trained weights is broken, so its term sits on
the plain Linear layer, which keeps class, name and weights; a style's peft layer wraps that Linear, and neither knows
of the other.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .seam import state_of

LORA_NAME = "lineardit_lora"  # the child of a Linear layer that holds its low-rank term

_NO_WAY_BACK = (
    "the originals of this model's trained weights were not kept, so the base cannot be restored: load the base again, "
    "and the adapter on top of it with keep_original=True"
)


class Overlay(Protocol):
    """Trained weights on a base. `off` and `on` alternate, beginning with `off`; after `remove` the object is spent."""

    def check_reversible(self) -> None: ...  # ValueError where `off` and `remove` cannot give the base back
    def off(self) -> None: ...
    def on(self) -> None: ...
    def remove(self) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def describe(self) -> dict[str, Any]: ...


class Overlays:
    """All overlays of one converted model, the first put on first: what `dense` and `restore_` take off."""

    def __init__(self) -> None:
        self.items: list[Overlay] = []

    def suspend(self) -> None:
        """The base's own weights act, bit for bit, until `resume`.

        Raises:
            ValueError: The originals were not kept; nothing has been changed.
        """
        self._check_reversible()
        for overlay in reversed(self.items):
            overlay.off()

    def resume(self) -> None:
        """Undoes `suspend`."""
        for overlay in self.items:
            overlay.on()

    def remove(self) -> None:
        """Puts the base's own weights back for good.

        Raises:
            ValueError: The originals were not kept; nothing has been changed.
        """
        self._check_reversible()
        while self.items:
            self.items.pop().remove()

    def _check_reversible(self) -> None:
        for overlay in self.items:
            overlay.check_reversible()


def overlays_of(model: nn.Module) -> Overlays:
    """The overlays of a converted model."""
    state = state_of(model)
    assert state is not None, "overlays are put on after linearize_"
    for companion in state.companions:
        if isinstance(companion, Overlays):
            return companion
    state.companions.append(Overlays())
    return overlays_of(model)


def plain_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name in the base, also where a style's peft layer has been wrapped around it."""
    layer = model.get_submodule(name)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


class LowRankTerm(nn.Module):
    """scale * up(down(x)), computed in x's dtype on x's device: LoRA's term for one Linear layer."""

    def __init__(self, down: Tensor, up: Tensor, *, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down)  # [rank, in]
        self.up = nn.Parameter(up)  # [out, rank]
        self.scale = scale
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return functional.linear(functional.linear(x, self.down.to(x)), self.up.to(x)) * self.scale


def _add_term(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    term = cast(LowRankTerm, layer.get_submodule(LORA_NAME))
    return out + term(args[0]) if term.enabled else out


class LowRank:
    """LoRA (arXiv:2106.09685) on some Linear layers: a forward hook on each adds `LowRankTerm`.

    Args:
        model: The denoiser.
        factors: Per layer name `(down [rank, in], up [out, rank])`; they become the parameters as they are.
        alpha: The term's factor is alpha / rank.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float) -> None:
        self.alpha = alpha
        self.layers = {name: plain_layer(model, name) for name in factors}
        self.rank = next(iter(factors.values()))[0].shape[0]
        self.handles = []
        for name, layer in self.layers.items():
            layer.add_module(LORA_NAME, LowRankTerm(*factors[name], scale=alpha / self.rank))
            self.handles.append(layer.register_forward_hook(_add_term))

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
        for handle in self.handles:
            handle.remove()
        for layer in self.layers.values():
            delattr(layer, LORA_NAME)

    def tensors(self) -> dict[str, Tensor]:
        """The factors under peft's names."""
        found = {}
        for name, term in self.terms().items():
            found[f"{name}.lora_A.weight"] = term.down.detach()
            found[f"{name}.lora_B.weight"] = term.up.detach()
        return found

    def describe(self) -> dict[str, Any]:
        return {"kind": "lora", "rank": self.rank, "alpha": self.alpha}


class FusedLowRank:
    """LoRA added into the weights of its layers: no cost per step, no way back. The factors stay, for saving.

    Raises:
        ValueError: A layer's weight is not in floating point (a quantized base), or not in memory.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], *, alpha: float) -> None:
        self.alpha = alpha
        self.rank = next(iter(factors.values()))[0].shape[0]
        self.factors = {name: (down.cpu(), up.cpu()) for name, (down, up) in factors.items()}
        weights = {name: _writable(f"{name}.weight", plain_layer(model, name).weight) for name in factors}
        with torch.no_grad():
            for name, (down, up) in factors.items():
                weight = weights[name]
                term = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
                weight.copy_(weight.float() + term * (alpha / self.rank))

    def check_reversible(self) -> None:
        raise ValueError(_NO_WAY_BACK)

    off = on = remove = check_reversible

    def tensors(self) -> dict[str, Tensor]:
        """The factors under peft's names."""
        downs = {f"{name}.lora_A.weight": down for name, (down, _) in self.factors.items()}
        return downs | {f"{name}.lora_B.weight": up for name, (_, up) in self.factors.items()}

    def describe(self) -> dict[str, Any]:
        return {"kind": "lora", "rank": self.rank, "alpha": self.alpha}


class FullWeights:
    """Changed tensors of the base. `off` and `on` exchange the data of the parameters, which stay the same objects.

    Args:
        model: The denoiser.
        originals: Per parameter name its value in the base, on any device, or None where the base's value is not known.
    """

    def __init__(self, model: nn.Module, originals: Mapping[str, Tensor | None]) -> None:
        self.originals = dict(originals)
        self.owners = {name: _owner(model, name) for name in originals}
        self.trained: dict[str, Tensor] = {}  # their values while the overlay is off

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name, wherever offloading or peft has moved it."""
        layer, attribute = self.owners[name]
        return cast(nn.Parameter, getattr(layer, attribute))

    def check_reversible(self) -> None:
        for name, original in self.originals.items():
            if original is None:
                raise ValueError(_NO_WAY_BACK)
            _writable(name, self.parameter(name))

    def off(self) -> None:
        for name, original in self.originals.items():
            parameter = self.parameter(name)
            self.trained[name] = parameter.data
            parameter.data = cast(Tensor, original).to(parameter)

    def on(self) -> None:
        for name, trained in self.trained.items():
            parameter = self.parameter(name)
            parameter.data = trained.to(parameter)
        self.trained.clear()

    def remove(self) -> None:
        for name, original in self.originals.items():
            parameter = self.parameter(name)
            parameter.data = cast(Tensor, original).to(parameter)
        self.trained.clear()

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.trained.get(name, self.parameter(name).detach()) for name in self.originals}

    def describe(self) -> dict[str, Any]:
        return {"kind": "full"}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, attribute = name.rpartition(".")
    return plain_layer(model, layer), attribute


def _writable(name: str, parameter: Tensor) -> Tensor:
    """The parameter, after checking that its numbers can be exchanged."""
    if parameter.is_meta:
        raise ValueError(f"{name} is not in memory (sequential offload?): do this before enabling offload")
    if not parameter.is_floating_point():
        raise ValueError(
            f"{name} must be in floating point to be changed, got {parameter.dtype}: quantized bases take LoRA adapters"
        )
    return parameter


def replace_weights_(model: nn.Module, weights: Mapping[str, Tensor], *, keep_original: bool) -> FullWeights:
    """Overwrites parameters of the base and notes it as an overlay; one on the meta device becomes a real parameter.

    Args:
        model: The denoiser.
        weights: New values by parameter name; shapes must agree. Cast to each parameter's dtype and device.
        keep_original: Keep the old values on the CPU, so that the base can come back.
    Raises:
        ValueError: A parameter is quantized or offloaded.
    """
    originals: dict[str, Tensor | None] = {}
    owners = {name: _owner(model, name) for name in weights}
    is_meta = next(model.parameters()).is_meta
    for name, (layer, attribute) in owners.items():
        old = getattr(layer, attribute)
        if not is_meta:
            _writable(name, old)
        originals[name] = old.detach().to("cpu", copy=True) if keep_original and not old.is_meta else None
    for name, (layer, attribute) in owners.items():
        old = getattr(layer, attribute)
        if old.is_meta:
            setattr(layer, attribute, nn.Parameter(weights[name].clone(), requires_grad=old.requires_grad))
        else:
            old.data.copy_(weights[name])
    overlay = FullWeights(model, originals)
    overlays_of(model).items.append(overlay)
    return overlay


def like_layer(model: nn.Module, name: str, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Copies of LoRA factors on a layer's device, in the dtype it computes in; a quantized layer's dtype says nothing."""
    weight = cast(Tensor, plain_layer(model, name).weight)
    device = torch.device("cpu") if weight.is_meta else weight.device
    dtype = weight.dtype if weight.is_floating_point() and weight.itemsize > 1 else None
    down, up = (factor.to(device, dtype, copy=True) for factor in factors)
    return down, up
