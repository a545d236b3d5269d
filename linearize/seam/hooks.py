"""The seam: a model's own forward, with one call inside it replaced.

Hooks publish the token grid of each forward; a converted attention module runs upstream's forward while
`torch.nn.functional.scaled_dot_product_attention` goes to its child `linear_kernel`. Projections, norms, rotary
positions, LoRA and output projections stay upstream's code.

B batch, H heads, N tokens, D head dimension.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import LayoutError
from ..families import ForwardLayout
from ..layout import Grid, as_shape, image_first, require_text_masks
from ..methods import Method
from .conversion import Conversion


class Level:
    """Where a grid is published: the model, or one level of a UNet, with the kernels that read it.

    Attributes:
        kernels: Of the attention modules at this level.
        text_lens: As in the `ForwardLayout` of the running forward.
        text_mask: As there, [B, text_len] bool or None.
        order: [B or 1, N] token order that puts the image first; None: the image is where the family has it.
    """

    def __init__(self, conversion: Conversion) -> None:
        self.conversion = conversion
        self.kernels: list[Method] = []
        self.text_lens: tuple[int, ...] = ()
        self.text_mask: Tensor | None = None
        self.order: Tensor | None = None
        self._shape: Tensor | None = None

    @property
    def grid(self) -> Grid:
        if self._shape is None:
            raise LayoutError(
                "no token grid yet: call the converted model itself, not model.forward or one of its blocks"
            )
        return tuple(self._shape.shape)

    def publish(self, layout: ForwardLayout) -> None:
        """Make this the layout that the attention modules of this level read."""
        self.text_lens, self.text_mask = layout.text_lens, layout.text_mask
        self.order = None
        if layout.image_starts is not None:
            text_first = self.conversion.family.text_first
            self.order = image_first(layout.grid, layout.image_starts, max(layout.text_lens), text_first=text_first)
        if self._shape is not None and tuple(self._shape.shape) == layout.grid:
            return
        self._shape = None  # the next call must check a rejected grid again
        for kernel in self.kernels:
            kernel.prepare_for(layout.grid)
        self._shape = as_shape(*layout.grid)


def install(model: nn.Module, conversion: Conversion, levels: dict[nn.Module, Level]) -> None:
    """Register the hooks of one model on it and on its levels."""
    cast(Any, model)._lineardit_conversion = conversion
    conversion.handles.append(model.register_forward_pre_hook(_enter, with_kwargs=True))
    for module, level in levels.items():
        cast(Any, module)._lineardit_level = level
        conversion.handles.append(module.register_forward_pre_hook(_publish, with_kwargs=True))
    for module in model.modules():
        if type(module).__name__ not in conversion.family.masked_at:
            continue
        converted = [part for part in module.modules() if hasattr(part, "linear_kernel")]
        if converted:
            hook = _Unmask(module, cast(Any, converted[0])._lineardit_level)
            conversion.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    conversion.handles.append(model.register_forward_hook(_leave, always_call=True))


class _Unmask:
    """Drops the `attention_mask` that a module would expand to tokens x tokens: `Level.text_mask` replaces it."""

    def __init__(self, module: nn.Module, level: Level) -> None:
        self.level = level
        self.index = list(inspect.signature(type(module).forward).parameters).index("attention_mask") - 1

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.level.conversion.enabled or self.level.text_mask is None:
            return None
        if len(args) > self.index:
            return (*args[: self.index], None, *args[self.index + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": None}


@torch.compiler.disable
def _enter(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    conversion: Conversion = model._lineardit_conversion
    conversion.enter()
    for terms in conversion.input_terms:
        terms.update_hooks()
    recomputes = torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False)
    conversion.saved_layouts = {} if recomputes else None
    conversion.pending_mask_checks = []


@torch.compiler.disable
def _publish(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    level: Level = module._lineardit_level
    if not level.conversion.enabled:
        return None
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    try:
        layout = level.conversion.family.read_layout(module, {**dict(zip(names, args, strict=False)), **kwargs})
    except RuntimeError as error:
        if type(error).__name__ != "GuardOnDataDependentSymNode":
            raise
        raise LayoutError(
            f"torch.export traces without values, but the token grid of a {type(module).__name__} is read from values "
            "(position ids, lengths): use compile_ instead, or export it inside `with dense(model):`"
        ) from error
    level.publish(layout)
    if level.conversion.saved_layouts is not None:
        level.conversion.saved_layouts[level] = replace(layout, replaced={})
    new_args = tuple(layout.replaced.get(name, value) for name, value in zip(names, args, strict=False))
    return new_args, {name: layout.replaced.get(name, value) for name, value in kwargs.items()}


@torch.compiler.disable
def _leave(model: Any, args: tuple[Any, ...], output: Any) -> None:
    conversion: Conversion = model._lineardit_conversion
    rewind_before_backward(conversion, output)
    pending = conversion.pending_mask_checks
    conversion.leave()
    if pending and output is not None:
        require_text_masks(pending)


def rewind_before_backward(conversion: Conversion, output: Any) -> None:
    """Restore this forward's grids at the start of its backward: gradient checkpointing reruns blocks there."""
    if conversion.saved_layouts is None or output is None:
        return
    rewind: Callable[[Tensor], None] = partial(_rewind, conversion, conversion.saved_layouts, conversion.enabled)
    for value in _values(output):
        if isinstance(value, Tensor) and value.requires_grad:
            value.register_hook(rewind)


def _values(output: Any) -> tuple[Any, ...]:
    """The values of a forward's output: a tensor, a tuple, or a diffusers output class."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(output.values() if isinstance(output, Mapping) else output)


def _rewind(conversion: Conversion, layouts: dict[Level, ForwardLayout], enabled: bool, gradient: Tensor) -> None:
    if conversion.enabled != enabled:
        where = "outside" if enabled else "inside"
        raise RuntimeError(
            f"with gradient checkpointing, a forward {where} `dense(model)` needs its backward {where} as well"
        )
    for level, layout in layouts.items():
        level.publish(layout)
