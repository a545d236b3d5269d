"""The state that a converted model, its hooks and its attention modules share."""

import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ...kernels.pieces.table_cache import release_tables
from ..errors import LayoutError
from ..families import Family, ForwardLayout
from ..weights.overlays import Overlay, Overlays
from .input_terms import InputTerms

logger = logging.getLogger(__name__)


class Conversion:
    """State shared by the hooks and attention modules of one converted model.

    Attributes:
        enabled: False inside `dense`, where the attention modules run upstream's forward unchanged.
        patterns: {glob of module names: config}, as saved.
        dense_below: As in `linearize_`.
        overlays: What was trained on the base.
        input_terms: One for each converted module whose method changes the inputs of layers.
        logit_factor: Factor of the attention logits, set by `scaled_logits`.
        saved_layouts: Layouts of the running forward by level, if gradient checkpointing will recompute parts of it.
        pending_mask_checks: Whether each mask of the running forward hides text only; None outside a forward.
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
        self.saved_layouts: dict[Any, ForwardLayout] | None = None
        self.pending_mask_checks: list[Tensor] | None = None
        self._thread: int | None = None
        self._dense_thread: int | None = None
        _release_tables_with(self)

    @property
    def dense_tokens(self) -> int:
        """`dense_below`, or 0 if weights were trained for the new attention."""
        return 0 if self.overlays.items else self.dense_below

    def enter(self) -> None:
        """Claim the model for this thread's forward.

        Raises:
            RuntimeError: another thread is inside the model, whose grid this forward would overwrite, or in `dense`.
        """
        self.refuse_other_threads()
        self._thread = threading.get_ident()

    def leave(self) -> None:
        """Release the model if this thread holds it."""
        if self._thread == threading.get_ident():
            self._thread = self.saved_layouts = self.pending_mask_checks = None

    def disable(self) -> None:
        """Run the model's own attention until `enable`; only this thread may call the model."""
        self.enabled, self._dense_thread = False, threading.get_ident()

    def enable(self) -> None:
        """Run linear attention again."""
        self.enabled, self._dense_thread = True, None

    def refuse_other_threads(self) -> None:
        """Raise a RuntimeError if another thread is inside a forward of the model or inside `dense` of it."""
        this_thread = threading.get_ident()
        if self._thread not in (None, this_thread) and _is_inside(self._thread, self):
            raise RuntimeError(
                "another thread is running this converted model, which takes one forward at a time: "
                f"{_USE_SEPARATE_CALLS}"
            )
        if not self.enabled and self._dense_thread not in (None, this_thread):
            raise RuntimeError(
                "another thread is inside `dense` of this model, which applies to that thread only: enter `dense` in "
                f"the thread that calls the model, or {_USE_SEPARATE_CALLS}"
            )

    def refuse_earlier_grids(self) -> None:
        """Raise a LayoutError if a model runs these modules without our hooks: their grid is from an earlier call."""
        if self._thread is not None or self.family.layout_at is not None:
            return
        for running in _running_modules(threading.get_ident()):
            if isinstance(running, ModelMixin) or conversion_of(running) is self:
                raise LayoutError(
                    f"{type(running).__name__}.forward reaches converted attention without the model's hooks, which "
                    "set its token grid: call the converted model itself, not model.forward; layers that it shares "
                    "with another model must stay dense (linearize_(..., layers=...))"
                )

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles: no thread is inside; made inside `dense`, they run the base in every thread."""
        return vars(self) | {"_thread": None, "_dense_thread": None, "pending_mask_checks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _release_tables_with(self)


def conversion_of(model: nn.Module) -> Conversion | None:
    """The conversion that `install` stored on a model; None if it is not converted."""
    return vars(model).get("_lineardit_conversion")


def overlays_of(model: nn.Module) -> Overlays:
    """What was trained on the base of a converted model."""
    conversion = conversion_of(model)
    assert conversion is not None, "overlays are added after linearize_"
    return conversion.overlays


def add_overlay(model: nn.Module, overlay: Overlay) -> None:
    """Add an overlay to a converted model; from the first one on, `dense_below` has no effect."""
    overlays = overlays_of(model)
    overlays.items.append(overlay)
    if len(overlays.items) == 1:
        warn_unused_dense_below(model)


def warn_unused_dense_below(model: nn.Module) -> None:
    """Warn if `dense_below` has no effect because the model has trained weights."""
    conversion = conversion_of(model)
    if conversion is not None and conversion.dense_below > conversion.dense_tokens:
        logger.warning(
            "dense_below=%d is ignored: weights trained for linear attention would be wrong with the original "
            "attention, so linear attention runs at every size",
            conversion.dense_below,
        )


_LIVE_CONVERSIONS: "weakref.WeakSet[Conversion]" = weakref.WeakSet()


def _release_tables_with(conversion: Conversion) -> None:
    """Free the window tables kept on the device once this and every other conversion is gone."""
    _LIVE_CONVERSIONS.add(conversion)
    weakref.finalize(conversion, _release_if_last).atexit = False


def _release_if_last() -> None:
    if next(iter(_LIVE_CONVERSIONS), None) is None:  # len() still counts the one that has just gone
        release_tables()


_USE_SEPARATE_CALLS = "hold a lock around the call or give each thread its own copy.deepcopy of the model"


def _is_inside(thread: int | None, conversion: Conversion) -> bool:
    """Whether a thread is in a forward of the model or a replica; its claim outlives a forward ended by Ctrl-C."""
    # a compiled model's own frames are not on the stack, those of its wrapper are
    running = ((one, vars(one).get("_modules", {}).get("_orig_mod")) for one in _running_modules(thread))
    return any(one is not None and conversion_of(one) is conversion for pair in running for one in pair)


def _running_modules(thread: int | None) -> Iterator[nn.Module]:
    """The modules whose methods are on a thread's stack, innermost first."""
    frame = None if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module):
            yield running
        frame = frame.f_back
