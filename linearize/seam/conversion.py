"""A conversion: what a model, its hooks and its attention modules share while it is converted."""

import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ...kernels.pieces.kept_tables import release_tables
from ..errors import LayoutError
from ..families import Family, Sight
from ..weights.overlays import Overlay, Overlays
from .input_terms import InputTerms

logger = logging.getLogger(__name__)


class Conversion:
    """What the hooks and attention modules of one converted model share.

    Attributes:
        enabled: False inside `dense`: the attention modules then run as upstream wrote them.
        patterns: Glob of module names -> config, as the conversion is saved.
        dense_below: As in `linearize_`.
        overlays: What was trained on the base.
        input_terms: What methods add to the inputs of layers, for each module whose method does.
        logit_factor: What `scaled_logits` multiplies the logits of attention by.
        kept_sights: Of the running forward, by level, where gradient checkpointing will run parts of it again.
        masks_asked: Of the running forward, whether each mask that came is of text alone; None outside of one.
    """

    def __init__(self, family: Family, patterns: dict[str, Any], dense_below: int = 0) -> None:
        self.family = family
        self.patterns = patterns
        self.dense_below = dense_below
        self.enabled = True
        self.overlays = Overlays()
        self.input_terms: list[InputTerms] = []
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.logit_factor = 1.0
        self.kept_sights: dict[Any, Sight] | None = None
        self.masks_asked: list[Tensor] | None = None
        self._thread: int | None = None
        self._dense_thread: int | None = None
        _keep_tables_for(self)

    @property
    def dense_tokens(self) -> int:
        """`dense_below`, 0 where something was trained for the new attention."""
        return 0 if self.overlays.items else self.dense_below

    def enter(self) -> None:
        """Claim the model for this thread's forward.

        Raises:
            RuntimeError: another thread is inside the model, whose grid this forward would overwrite, or in `dense`.
        """
        self.refuse_other_threads()
        self._thread = threading.get_ident()

    def leave(self) -> None:
        """Give the model back, if it is this thread's."""
        if self._thread == threading.get_ident():
            self._thread = self.kept_sights = self.masks_asked = None

    def disable(self) -> None:
        """The model's own attention, for this thread, until `enable`."""
        self.enabled, self._dense_thread = False, threading.get_ident()

    def enable(self) -> None:
        """Linear attention again."""
        self.enabled, self._dense_thread = True, None

    def refuse_other_threads(self) -> None:
        """Raise a RuntimeError where another thread is inside a forward of the model, or inside `dense` of it."""
        me = threading.get_ident()
        if self._thread not in (None, me) and _is_inside(self._thread, self):
            raise RuntimeError(f"another thread is inside this converted model: one forward at a time, {_APART}")
        if not self.enabled and self._dense_thread not in (None, me):
            raise RuntimeError(
                "another thread is inside `dense` of this model, which holds for that one alone: enter `dense` in the "
                f"thread that calls the model; else {_APART}"
            )

    def refuse_earlier_grids(self) -> None:
        """Raise a LayoutError where a model runs these modules without our hooks: their grid is of an earlier call."""
        if self._thread is not None or self.family.seen_at is not None:
            return
        for running in _modules_at_work(threading.get_ident()):
            if isinstance(running, ModelMixin) or conversion_of(running) is self:
                raise LayoutError(
                    f"{type(running).__name__}.forward reaches converted attention without the model's hooks, which "
                    "tell it the token grid: call the converted model itself, not model.forward; layers that it shares "
                    "with another model must stay dense (linearize_(..., layers=...))"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: no thread is inside. Made inside `dense`, they are the base in every thread."""
        return vars(self) | {"_thread": None, "_dense_thread": None, "masks_asked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _keep_tables_for(self)


def conversion_of(model: nn.Module) -> Conversion | None:
    """What `install` left on a model, None where it is not converted."""
    return vars(model).get("_lineardit_conversion")


def overlays_of(model: nn.Module) -> Overlays:
    """What was trained on the base of a converted model."""
    conversion = conversion_of(model)
    assert conversion is not None, "overlays are put on after linearize_"
    return conversion.overlays


def put_on(model: nn.Module, overlay: Overlay) -> None:
    """One more overlay of a converted model; with the first, small pictures lose their original attention."""
    overlays = overlays_of(model)
    overlays.items.append(overlay)
    if len(overlays.items) == 1:
        tell_unused_dense_below(model)


def tell_unused_dense_below(model: nn.Module) -> None:
    """Log that `dense_below` is of no use to a model on which something was trained."""
    conversion = conversion_of(model)
    if conversion is not None and conversion.dense_below > conversion.dense_tokens:
        logger.warning(
            "dense_below=%d is left unused: what is trained for the new attention would be wrong with the original, so "
            "linear attention runs at every size",
            conversion.dense_below,
        )


_WITH_TABLES: "weakref.WeakSet[Conversion]" = weakref.WeakSet()


def _keep_tables_for(conversion: Conversion) -> None:
    """What windows keep on the device is freed when this and every other conversion is gone."""
    _WITH_TABLES.add(conversion)
    weakref.finalize(conversion, _release_if_last).atexit = False


def _release_if_last() -> None:
    if next(iter(_WITH_TABLES), None) is None:  # len counts the one that has just gone
        release_tables()


_APART = "hold a lock around the call or give each thread its own copy.deepcopy of the model"


def _is_inside(thread: int | None, conversion: Conversion) -> bool:
    """Whether a thread runs a forward of the model, or of a replica; a claim outlives one that Ctrl-C has ended."""
    # a compiled model's own frames are gone, not those of its wrapper
    at_work = ((one, vars(one).get("_modules", {}).get("_orig_mod")) for one in _modules_at_work(thread))
    return any(one is not None and conversion_of(one) is conversion for pair in at_work for one in pair)


def _modules_at_work(thread: int | None) -> Iterator[nn.Module]:
    """The modules in whose methods a thread is, the innermost first."""
    frame = None if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module):
            yield running
        frame = frame.f_back
