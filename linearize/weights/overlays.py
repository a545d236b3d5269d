"""What training adds to a base's weights, and how to take it off again.

A student is its base, plus the parameters of its linear kernels, plus overlays: a low-rank term beside some Linear
layers (low_rank.py, LoRA), or changed tensors whose originals are kept (full_weights.py).
"""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from ..adapters.manifest import Trained
from ..errors import UnsupportedModelError

NO_WAY_BACK = (
    "the originals of this model's trained weights were not kept, so the base cannot be restored: load the base again, "
    "and the adapter on top of it with keep_original=True"
)


class Overlay(Protocol):
    """Trained weights on a base. After `remove` the object is spent.

    `off` and `on` alternate, beginning with `off`; either may be interrupted, and `on` then makes the student whole.
    """

    @property
    def reversible(self) -> bool: ...  # the base can come back: its weights were kept

    def check_reversible(self) -> None: ...  # ValueError where `off` and `remove` cannot give the base back
    def off(self) -> None: ...  # the base's own weights act
    def on(self) -> None: ...  # the trained ones again
    def remove(self) -> None: ...  # the base's own weights for good
    def changed(self) -> list[str]: ...  # the base's parameters that hold other numbers while it is on
    def tensors(self) -> dict[str, Tensor]: ...  # what an adapter's file holds of it, by name
    def describe(self) -> Trained: ...


class Overlays:
    """All overlays of one converted model, the first put on first: what `dense` and `restore_` take off."""

    def __init__(self) -> None:
        self.items: list[Overlay] = []

    def suspend(self) -> None:
        """Let the base's own weights act, bit for bit, until `resume`.

        Raises:
            ValueError: The originals were not kept; nothing has been changed.
        """
        self.check_reversible()
        for overlay in reversed(self.items):
            overlay.off()

    def resume(self) -> None:
        """Undo `suspend`, also one that was interrupted."""
        try:
            for overlay in self.items:
                overlay.on()
        except BaseException:  # Ctrl-C is late here: a student with some of the base's weights would compute nonsense
            for overlay in self.items:
                overlay.on()
            raise

    def remove(self) -> None:
        """Put the base's own weights back for good.

        Raises:
            ValueError: The originals were not kept; nothing has been changed.
        """
        self.check_reversible()
        while self.items:
            self.items[-1].remove()
            self.items.pop()  # afterwards: what was interrupted can be called again

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
