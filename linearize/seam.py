"""The seam: a model's own forward, with one call inside it replaced.

Hooks publish the token grid of each forward; a converted attention module runs upstream's forward while
`torch.nn.functional.scaled_dot_product_attention` goes to its child `linear_kernel`. Projections, norms, rotary
positions, LoRA and output projections stay upstream's code.

B batch, H heads, N tokens, D head dimension.
"""

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from .errors import LayoutError
from .families import Family, Sight
from .input_terms import InputTerms
from .layout import Grid, as_shape, image_first
from .methods import Method
from .overlays import Overlay, Overlays

logger = logging.getLogger(__name__)


class State:
    """What the hooks and attention modules of one converted model share.

    Attributes:
        enabled: False inside `dense`: the attention modules then run as upstream wrote them.
        patterns: Glob of module names -> config, as the conversion is saved.
        dense_below: As in `linearize_`.
        overlays: What was trained on the base.
        input_terms: What methods add to the inputs of layers, for each module whose method does.
        logit_factor: What `scaled_logits` multiplies the logits of attention by.
        record: The grids of the running forward, where gradient checkpointing will run parts of it again.
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
        self.record: dict[Site, Sight] | None = None
        self._thread: int | None = None
        self._dense_thread: int | None = None

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
            self._thread = self.record = None

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
            if isinstance(running, ModelMixin) or state_of(running) is self:
                raise LayoutError(
                    f"{type(running).__name__}.forward reaches converted attention without the model's hooks, which "
                    "tell it the token grid: call the converted model itself, not model.forward; layers that it shares "
                    "with another model must stay dense (linearize_(..., layers=...))"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: no thread is inside. Made inside `dense`, they are the base in every thread."""
        return vars(self) | {"_thread": None, "_dense_thread": None}


_APART = "hold a lock around the call or give each thread its own copy.deepcopy of the model"


def _is_inside(thread: int | None, state: State) -> bool:
    """Whether a thread runs a forward of the model, or of a replica; a claim outlives one that Ctrl-C has ended."""
    # a compiled model's own frames are gone, not those of its wrapper
    at_work = ((one, vars(one).get("_modules", {}).get("_orig_mod")) for one in _modules_at_work(thread))
    return any(one is not None and state_of(one) is state for pair in at_work for one in pair)


def _modules_at_work(thread: int | None) -> Iterator[nn.Module]:
    """The modules in whose methods a thread is, the innermost first."""
    frame = None if thread is None else sys._current_frames().get(thread)
    while frame is not None:
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module):
            yield running
        frame = frame.f_back


class Site:
    """Where a grid is published: the model, or one level of a UNet, with the kernels that read it.

    Attributes:
        kernels: Of the attention modules at this site.
        text_lens: As in the `Sight` of the running forward.
        text_mask: As there, [B, text_len] bool or None.
        order: [B or 1, N], the order of tokens that brings the image before all others; None: the image stands as the
            family has it.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.kernels: list[Method] = []
        self.text_lens: tuple[int, ...] = ()
        self.text_mask: Tensor | None = None
        self.order: Tensor | None = None
        self._shape: Tensor | None = None

    @property
    def grid(self) -> Grid:
        if self._shape is None:
            raise LayoutError("no token grid yet: call the converted model itself, not model.forward or a block of it")
        return tuple(self._shape.shape)

    def publish(self, sight: Sight) -> None:
        """Make this the sight that the attention modules of this site read."""
        self.text_lens, self.text_mask = sight.text_lens, sight.text_mask
        self.order = None
        if sight.image_starts is not None:
            text_first = self.state.family.text_first
            self.order = image_first(sight.grid, sight.image_starts, max(sight.text_lens), text_first=text_first)
        if self._shape is not None and tuple(self._shape.shape) == sight.grid:
            return
        self._shape = None  # a grid that a kernel refuses is refused again the next time
        for kernel in self.kernels:
            kernel.observe(sight.grid)
        self._shape = as_shape(*sight.grid)


def install(model: nn.Module, state: State, sites: dict[nn.Module, Site]) -> None:
    """Register the hooks of one model on it and on its sites."""
    cast(Any, model)._lineardit_state = state
    state.handles.append(model.register_forward_pre_hook(_enter, with_kwargs=True))
    for module, site in sites.items():
        cast(Any, module)._lineardit_site = site
        state.handles.append(module.register_forward_pre_hook(_publish, with_kwargs=True))
    for module in model.modules():
        if type(module).__name__ not in state.family.masked_at:
            continue
        converted = [part for part in module.modules() if hasattr(part, "linear_kernel")]
        if converted:
            hook = _Unmask(module, cast(Any, converted[0])._lineardit_site)
            state.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    state.handles.append(model.register_forward_hook(_leave, always_call=True))


class _Unmask:
    """Hook of a module that would make a tokens x tokens mask: it gets no `attention_mask`; `Site.text_mask` has it."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.site = site
        self.index = list(inspect.signature(type(module).forward).parameters).index("attention_mask") - 1

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.site.state.enabled or self.site.text_mask is None:
            return None
        if len(args) > self.index:
            return (*args[: self.index], None, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": None}


def state_of(model: nn.Module) -> State | None:
    """What `install` left on a model, None where it is not converted."""
    return vars(model).get("_lineardit_state")


def overlays_of(model: nn.Module) -> Overlays:
    """What was trained on the base of a converted model."""
    state = state_of(model)
    assert state is not None, "overlays are put on after linearize_"
    return state.overlays


def put_on(model: nn.Module, overlay: Overlay) -> None:
    """One more overlay of a converted model; with the first, small pictures lose their original attention."""
    overlays = overlays_of(model)
    overlays.items.append(overlay)
    if len(overlays.items) == 1:
        tell_unused_dense_below(model)


def tell_unused_dense_below(model: nn.Module) -> None:
    """Log that `dense_below` is of no use to a model on which something was trained."""
    state = state_of(model)
    if state is not None and state.dense_below > state.dense_tokens:
        logger.warning(
            "dense_below=%d is left unused: what is trained for the new attention would be wrong with the original, so "
            "linear attention runs at every size",
            state.dense_below,
        )


@torch.compiler.disable
def _enter(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state: State = model._lineardit_state
    state.enter()
    for terms in state.input_terms:
        terms.follow()
    recomputes = torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False)
    state.record = {} if recomputes else None


@torch.compiler.disable
def _publish(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    site: Site = module._lineardit_site
    if not site.state.enabled:
        return None
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    try:
        sight = site.state.family.see(module, {**dict(zip(names, args, strict=False)), **kwargs})
    except RuntimeError as error:
        if type(error).__name__ != "GuardOnDataDependentSymNode":
            raise
        raise LayoutError(
            f"torch.export traces without numbers, and the token grid of a {type(module).__name__} is read from some "
            "(position ids, lengths): compile_ it instead, or export it inside `with dense(model):`"
        ) from error
    site.publish(sight)
    if site.state.record is not None:
        site.state.record[site] = replace(sight, replaced={})
    new_args = tuple(sight.replaced.get(name, value) for name, value in zip(names, args, strict=False))
    return new_args, {name: sight.replaced.get(name, value) for name, value in kwargs.items()}


@torch.compiler.disable
def _leave(model: Any, args: tuple[Any, ...], output: Any) -> None:
    state: State = model._lineardit_state
    rewind_before_backward(state, output)
    state.leave()


def rewind_before_backward(state: State, output: Any) -> None:
    """Gradient checkpointing runs blocks again in the backward pass: by then the grids of their forward are back."""
    if state.record is None or output is None:
        return
    rewind: Callable[[Tensor], None] = partial(_rewind, state, state.record, state.enabled)
    for value in _values(output):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(rewind)


def _values(output: Any) -> tuple[Any, ...]:
    """What a forward returned: a tensor, several, or diffusers' output with names."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(output.values() if isinstance(output, Mapping) else output)


def _rewind(state: State, record: dict[Site, Sight], enabled: bool, gradient: Tensor) -> None:
    if state.enabled != enabled:
        where = "outside" if enabled else "inside"
        raise RuntimeError(f"with gradient checkpointing, a forward {where} `dense(model)` needs its backward there")
    for site, sight in record.items():
        site.publish(sight)
