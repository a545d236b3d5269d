"""What training changes in a base's weights, and how to undo it.

A student is its base, plus the parameters of its linear kernels, plus overlays: a low-rank term added to some Linear
layers (low_rank.py, LoRA), or replaced tensors whose originals are kept (full_weights.py).
"""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from ..adapters.manifest import Trained
from ..errors import UnsupportedModelError

NOT_REVERSIBLE = (
    "the originals of this model's trained weights were not kept, so the base cannot be restored: load the base again, "
    "and the adapter on top of it with keep_original=True"
)


class Overlay(Protocol):
    """Trained weights on a base; not usable after `remove`.

    `off` and `on` alternate, starting with `off`; if either is interrupted, `on` makes the student complete again.
    """

    @property
    def reversible(self) -> bool: ...  # the base's weights were kept

    def check_reversible(self) -> None: ...  # ValueError if `off` and `remove` cannot restore the base
    def off(self) -> None: ...  # activate the base's own weights
    def on(self) -> None: ...  # activate the trained weights
    def remove(self) -> None: ...  # restore the base's own weights for good
    def changed(self) -> list[str]: ...  # names of the base's parameters that are overwritten while it is on
    def tensors(self) -> dict[str, Tensor]: ...  # its part of an adapter's file, by name
    def describe(self) -> Trained: ...


class Overlays:
    """All overlays of one converted model, in the order in which they were added, for `dense` and `restore_`."""

    def __init__(self) -> None:
        self.items: list[Overlay] = []

    def suspend(self) -> None:
        """Activate the base's own weights, bit for bit, until `resume`.

        Raises:
            ValueError: The originals were not kept; nothing has been changed.
        """
        self.check_reversible()
        for overlay in reversed(self.items):
            overlay.off()

    def resume(self) -> None:
        """Undo `suspend`, even if it was interrupted."""
        try:
            for overlay in self.items:
                overlay.on()
        except BaseException:  # even on Ctrl-C: a student with some of the base's weights would compute nonsense
            for overlay in self.items:
                overlay.on()
            raise

    def remove(self) -> None:
        """Restore the base's own weights for good.

        Raises:
            ValueError: The originals were not kept; nothing has been changed.
        """
        self.check_reversible()
        while self.items:
            self.items[-1].remove()
            self.items.pop()  # last, so that an interrupted call can be repeated

    def check_fusable(self) -> None:
        """Check that upstream may fuse the projections: changes could not be removed from the fused copy.

        Raises:
            UnsupportedModelError: there are changes that `dense` removes.
        """
        if any(overlay.reversible for overlay in self.items):
            raise UnsupportedModelError(
                "fuse_qkv_projections would copy trained projections, which dense and restore_ could not remove from "
                "the copy: load the adapter with keep_original=False first"
            )

    def check_reversible(self) -> None:
        """Check that `suspend` and `remove` can restore the base.

        Raises:
            ValueError: They cannot: the originals were not kept, or are offloaded.
        """
        for overlay in self.items:
            overlay.check_reversible()


def refuse_fused(model: nn.Module) -> None:
    """Raise if the model uses fused copies of its projections: changing the projections would have no effect.

    Raises:
        UnsupportedModelError: `fuse_qkv_projections` is on.
    """
    for name, module in model.named_modules():
        if _uses_fused_projections(module):
            raise UnsupportedModelError(
                f"{name} has fused projections, which trained weights would not reach: unfuse_qkv_projections first"
            )


def _uses_fused_projections(module: Any) -> bool:
    if not getattr(module, "fused_projections", False):
        return False
    # diffusers' older Attention class never resets that flag; there the processor decides
    return hasattr(module, "unfuse_projections") or type(module.processor).__name__.startswith("Fused")


def check_unmerged(model: nn.Module, names: Iterable[str]) -> None:
    """Check that no style of peft's is fused into the layers of these parameters.

    Raises:
        ValueError: one is: replacing the weights would lose it, and `unfuse_lora` would then corrupt them.
    """
    for name in names:
        if getattr(model.get_submodule(name.rpartition(".")[0]), "merged", False):
            raise ValueError(
                f"{name} has a LoRA fused into it, which changing the weight would break: unfuse_lora first"
            )


def plain_layer(model: nn.Module, name: str) -> Any:
    """The base's layer of that name, without the peft layer that a style may have wrapped around it."""
    layer: Any = model.get_submodule(name)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
