"""Replaced parameters of a base, whose originals are kept: what CLEAR trains and `load_adapter_` loads."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from ..adapters.manifest import Trained
from ..seam.conversion import add_overlay
from .overlays import NOT_REVERSIBLE, check_unmerged, plain_layer
from .quantized import is_quantized


class FullWeights:
    """Overlay of replaced parameters. `off` and `on` write in place: offloading may hold the parameters' memory.

    Args:
        model: The denoiser.
        originals: {parameter name: its value in the base, on any device; None: not known}.
    """

    def __init__(self, model: nn.Module, originals: Mapping[str, Tensor | None]) -> None:
        check_unmerged(model, originals)
        self.model = model
        self.originals = dict(originals)
        self.reversible = all(original is not None for original in originals.values())
        self.owners = {name: _owner(model, name) for name in originals}
        self.trained: dict[str, Tensor] = {}  # trained values while the overlay is off

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name, wherever offloading or peft has moved it."""
        layer, attribute = self.owners[name]
        return cast(nn.Parameter, getattr(layer, attribute))

    def check_reversible(self) -> None:
        check_unmerged(self.model, self.originals)
        for name, original in self.originals.items():
            if original is None:
                raise ValueError(NOT_REVERSIBLE)
            _check_writable(name, *self.owners[name])

    def off(self) -> None:
        for name, original in self.originals.items():
            if name not in self.trained:  # else an `on` was interrupted, and the parameter may hold the base's value
                self.trained[name] = self.parameter(name).detach().to(cast(Tensor, original).device, copy=True)
            self.parameter(name).data.copy_(cast(Tensor, original))

    def on(self) -> None:
        for name, trained in self.trained.items():
            self.parameter(name).data.copy_(trained)
        self.trained.clear()

    def remove(self) -> None:
        for name, original in self.originals.items():
            self.parameter(name).data.copy_(cast(Tensor, original))
        self.trained.clear()

    def changed(self) -> list[str]:
        return list(self.originals)

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.trained.get(name, self.parameter(name).detach()) for name in self.originals}

    def describe(self) -> Trained:
        return Trained(kind="full")


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, attribute = name.rpartition(".")
    return plain_layer(model, layer), attribute


def check_writable(model: nn.Module, names: Iterable[str]) -> None:
    """Check that these parameters can be overwritten.

    Raises:
        ValueError: one is offloaded or quantized.
    """
    for name in names:
        _check_writable(name, *_owner(model, name))


def _check_writable(name: str, layer: nn.Module, attribute: str) -> None:
    parameter = getattr(layer, attribute)
    if parameter.is_meta and hasattr(layer, "_hf_hook"):  # accelerate's hook; without it, the model was built on meta
        raise ValueError(f"{name} is not in memory (sequential offload?): do this before enabling offload")
    if is_quantized(parameter):
        kind = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
        raise ValueError(
            f"{name} must be floating point of 16 bits or more to be changed, got {kind}: quantized bases support LoRA "
            "adapters only"
        )


def replace_weights_(model: nn.Module, weights: Mapping[str, Tensor], *, keep_original: bool) -> FullWeights:
    """Overwrite parameters of the base, as an overlay; a meta parameter becomes real unless its new value is meta too.

    Args:
        model: The denoiser.
        weights: New values by parameter name; shapes must agree. Cast to each parameter's dtype and device.
        keep_original: Keep the old values on the CPU, so that the base can be restored.
    """
    originals: dict[str, Tensor | None] = {}
    owners = {name: _owner(model, name) for name in weights}
    for name, (layer, attribute) in owners.items():
        old = getattr(layer, attribute)
        keep = keep_original and old.is_meta == weights[name].is_meta
        originals[name] = old.detach().to("meta" if old.is_meta else "cpu", copy=True) if keep else None
    overlay = FullWeights(model, originals)
    add_overlay(model, overlay)  # first, so that an interruption below can be undone
    for name, (layer, attribute) in owners.items():
        old = getattr(layer, attribute)
        if old.is_meta and not weights[name].is_meta:
            setattr(layer, attribute, nn.Parameter(weights[name].clone(), requires_grad=old.requires_grad))
        else:
            old.data.copy_(weights[name])
    return overlay
