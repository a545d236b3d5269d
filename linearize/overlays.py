"""What training adds to a base's weights, and how to take it off again.

A student is its base, plus the parameters of its linear kernels, plus overlays: a low-rank term beside some Linear
layers (`low_rank`, LoRA), or changed tensors whose originals are kept (`FullWeights`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from .errors import UnsupportedModelError
from .seam import state_of

NO_WAY_BACK = (
    "the originals of this model's trained weights were not kept, so the base cannot be restored: load the base again, "
    "and the adapter on top of it with keep_original=True"
)


class Overlay(Protocol):
    """Trained weights on a base. `off` and `on` alternate, beginning with `off`; after `remove` the object is spent."""

    @property
    def reversible(self) -> bool: ...  # the base can come back: its weights were kept

    def check_reversible(self) -> None: ...  # ValueError where `off` and `remove` cannot give the base back
    def off(self) -> None: ...
    def on(self) -> None: ...
    def remove(self) -> None: ...
    def changed(self) -> list[str]: ...  # the base's parameters that hold other numbers while it is on
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
        self.check_reversible()
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
        self.check_reversible()
        while self.items:
            self.items.pop().remove()

    def check_fusable(self) -> None:
        """Whether upstream may copy the projections into one: changes could not be taken off the copy.

        Raises:
            UnsupportedModelError: there are changes that `dense` takes off.
        """
        if any(overlay.reversible for overlay in self.items):
            raise UnsupportedModelError(
                "fuse_qkv_projections would copy trained projections, which dense and restore_ could not take off the "
                "copy: load the adapter with keep_original=False first"
            )

    def check_reversible(self) -> None:
        """Whether `suspend` and `remove` can give the base back.

        Raises:
            ValueError: They cannot: the originals were not kept, or are offloaded.
        """
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


def refuse_fused(model: nn.Module) -> None:
    """Raise where the model reads fused copies of its projections: changes of the projections would have no effect.

    Raises:
        UnsupportedModelError: `fuse_qkv_projections` is on.
    """
    for name, module in model.named_modules():
        if _reads_fused(module):
            raise UnsupportedModelError(
                f"{name} has fused projections, which trained weights would not reach: unfuse_qkv_projections first"
            )


def _reads_fused(module: Any) -> bool:
    if not getattr(module, "fused_projections", False):
        return False
    # diffusers' older attention class keeps that flag for good; there the processor decides
    return hasattr(module, "unfuse_projections") or type(module.processor).__name__.startswith("Fused")


def check_unmerged(model: nn.Module, names: Iterable[str]) -> None:
    """Whether the layers of these parameters hold no style of peft's in their weights.

    Raises:
        ValueError: `fuse_lora` added one: exchanging the weights would lose it, and `unfuse_lora` take it off in vain.
    """
    for name in names:
        if getattr(model.get_submodule(name.rpartition(".")[0]), "merged", False):
            raise ValueError(
                f"{name} has a style fused into it, which changing the weight would break: unfuse_lora first"
            )


def plain_layer(model: nn.Module, name: str) -> Any:
    """The layer of that name in the base, also where a style's peft layer has been wrapped around it."""
    layer: Any = model.get_submodule(name)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


class FullWeights:
    """Changed tensors of the base. `off` and `on` write into the parameters in place: offloading may hold their memory.

    Args:
        model: The denoiser.
        originals: Per parameter name its value in the base, on any device, or None where the base's value is not known.
    """

    def __init__(self, model: nn.Module, originals: Mapping[str, Tensor | None]) -> None:
        check_unmerged(model, originals)
        self.model = model
        self.originals = dict(originals)
        self.reversible = all(original is not None for original in originals.values())
        self.owners = {name: _owner(model, name) for name in originals}
        self.trained: dict[str, Tensor] = {}  # their values while the overlay is off

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of that name, wherever offloading or peft has moved it."""
        layer, attribute = self.owners[name]
        return cast(nn.Parameter, getattr(layer, attribute))

    def check_reversible(self) -> None:
        check_unmerged(self.model, self.originals)
        for name, original in self.originals.items():
            if original is None:
                raise ValueError(NO_WAY_BACK)
            _check_writable(name, *self.owners[name])

    def off(self) -> None:
        for name, original in self.originals.items():
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

    def describe(self) -> dict[str, Any]:
        return {"kind": "full"}


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    layer, _, attribute = name.rpartition(".")
    return plain_layer(model, layer), attribute


def check_writable(model: nn.Module, names: Iterable[str]) -> None:
    """Whether the numbers of these parameters can be exchanged.

    Raises:
        ValueError: one is offloaded or quantized.
    """
    for name in names:
        _check_writable(name, *_owner(model, name))


def _check_writable(name: str, layer: nn.Module, attribute: str) -> None:
    parameter = getattr(layer, attribute)
    if parameter.is_meta and hasattr(layer, "_hf_hook"):  # accelerate's; without it the model was built without memory
        raise ValueError(f"{name} is not in memory (sequential offload?): do this before enabling offload")
    if not parameter.is_floating_point() or type(parameter.data) is not Tensor:  # torchao's tensors claim a float dtype
        kind = parameter.dtype if type(parameter.data) is Tensor else type(parameter.data).__name__
        raise ValueError(
            f"{name} must be in floating point to be changed, got {kind}: quantized bases take LoRA adapters"
        )


def replace_weights_(model: nn.Module, weights: Mapping[str, Tensor], *, keep_original: bool) -> FullWeights:
    """Overwrites parameters of the base and notes it as an overlay; one on the meta device becomes a real parameter.

    Args:
        model: The denoiser.
        weights: New values by parameter name; shapes must agree. Cast to each parameter's dtype and device.
        keep_original: Keep the old values on the CPU, so that the base can come back.
    """
    originals: dict[str, Tensor | None] = {}
    owners = {name: _owner(model, name) for name in weights}
    for name, (layer, attribute) in owners.items():
        old = getattr(layer, attribute)
        originals[name] = old.detach().to("cpu", copy=True) if keep_original and not old.is_meta else None
    overlay = FullWeights(model, originals)
    for name, (layer, attribute) in owners.items():
        old = getattr(layer, attribute)
        if old.is_meta:
            setattr(layer, attribute, nn.Parameter(weights[name].clone(), requires_grad=old.requires_grad))
        else:
            old.data.copy_(weights[name])
    overlays_of(model).items.append(overlay)
    return overlay
