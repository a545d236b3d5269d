"""Floating-point operations of one denoising step before and after conversion, counted from a model's shape.

The model runs on the meta device, without memory, while its products and convolutions are counted. An attention call
costs 4 * pairs * channels: pairs of query and key, times heads * head_dim, for two products of multiply and add (as in
CLEAR's tables, arXiv:2412.16112). Each method gives its exact number of pairs, text and pooled tokens included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import LayoutError
from ..families import family_of
from ..layout import Grid, Layout
from ..matching import attention_modules
from ..methods import METHODS
from ..seam.original import COVERED, dense_below_text
from .live_bytes import LiveBytes
from .step_inputs import can_make_inputs, step_inputs

SIZES = {"1K": 1024, "2K": 2048, "4K": 4096, "8K": 8192}  # side of a square picture in pixels


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one forward of the denoiser on one picture.

    Attributes:
        size: Its name: "1K" for 1024 x 1024 pixels, and so on.
        grid: Size of the picture in tokens; for a UNet, in latent positions.
        attention_before: Operations of the swapped modules' attention itself, with full softmax.
        attention_after: The same with their linear kernels.
        before: Operations of the whole step before conversion.
    """

    size: str
    grid: Grid
    attention_before: int
    attention_after: int
    before: int

    @property
    def after(self) -> int:
        """Operations of the whole step after conversion."""
        return self.before - self.attention_before + self.attention_after


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call: query [batch, heads, queries, head_dim], key [batch, heads, keys, head_dim].

    Attributes:
        live: Bytes that the forward holds at this call, its inputs included.
    """

    module: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    live: int = 0

    def flops(self, pairs: int) -> int:
        return 4 * pairs * self.batch * self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward of an unconverted denoiser does on one picture.

    Attributes:
        size: Its name: "1K" for 1024 x 1024 pixels, and so on.
        grid: Size of the picture in tokens; for a UNet, in latent positions.
        text_queries: As in `Family`.
        layers: Operations of everything but attention.
        calls: Every attention call.
        peak: Peak bytes of a forward, without weights, in the model's dtype; attention counts only its output.
    """

    size: str
    grid: Grid
    text_queries: bool
    layers: int
    calls: tuple[Call, ...]
    peak: int

    def flops(self, configs: Mapping[str, Any], *, dense_below: int = 0) -> StepFlops:
        """Operations before and after conversion.

        Args:
            configs: {name of a converted attention module: config of its method}.
            dense_below: Image tokens of a call below which the original attention runs.
        """
        before = after = 0
        for call in self.calls:
            if call.module in configs and self.is_image_self_attention(call):
                config = configs[call.module]
                grid, text_len = self.layout(call)
                pairs = call.queries * call.keys
                before += call.flops(pairs)
                if prod(grid) >= dense_below:
                    method = METHODS[type(config)]
                    pairs = method.pairs(config, grid, text_len, num_heads=call.heads, head_dim=call.head_dim)
                after += call.flops(pairs)
        total = self.layers + sum(call.flops(call.queries * call.keys) for call in self.calls)
        return StepFlops(
            size=self.size,
            grid=self.grid,
            attention_before=before,
            attention_after=after,
            before=total,
        )

    def is_image_self_attention(self, call: Call) -> bool:
        """Whether a call of a converted module is the one that its linear kernel replaces."""
        return call.queries == (call.keys if self.text_queries else prod(self.grid))

    def auto_impl(self, module: str, config: Any, like: Tensor, *, dense_below: int = 0) -> str:
        """The implementation that "auto" picks for a converted module, on the device and in the dtype of `like`.

        Args:
            dense_below: Image tokens of a call below which the original attention runs.
        """
        call = next(call for call in self.calls if call.module == module and self.is_image_self_attention(call))
        grid, text_len = self.layout(call)
        if prod(grid) < dense_below:
            return dense_below_text(dense_below)
        method = METHODS[type(config)]
        with torch.device("meta"):
            kernel = method(config, num_heads=call.heads, head_dim=call.head_dim)
        if kernel.is_exact(Layout(grid, text_len, text_first=True)):
            return COVERED
        query = like.new_empty(1).expand(1, call.heads, call.keys, call.head_dim)  # takes no memory
        impl: str = method.auto_impl(config, query, grid, text_len)
        return impl

    def layout(self, call: Call) -> tuple[Grid, int]:
        """Grid and text length of a self-attention call; in a UNet, the grid of the call's level."""
        grid = self.grid
        while prod(grid) > call.queries:
            grid = tuple((side + 1) // 2 for side in grid)
        return grid, call.keys - prod(grid)


def count_steps(model: Any, *, vae_scale: int) -> tuple[Step, ...]:
    """Count a step at each of `SIZES` that the model supports; none for a class whose inputs cannot be generated.

    Args:
        model: An unconverted denoiser on the meta device, of a class that can be converted.
        vae_scale: Pixels per latent position, along one side.
    """
    if not can_make_inputs(model):
        return ()
    steps = (count_step(model, (side // vae_scale,) * 2, size) for size, side in SIZES.items())
    return tuple(step for step in steps if step is not None)


def count_step(model: Any, latents: tuple[int, int], size: str, *, text_len: int | None = None) -> Step | None:
    """Count a step on one picture of (height, width) latents; None if the model has too few positions for it.

    Args:
        model: As in `count_steps`, of a class that `can_make_inputs` knows.
        size: Name of the size.
        text_len: As in `step_inputs`.
    """
    family = family_of(model)
    inputs = step_inputs(model, family.name, latents, text_len=text_len)
    try:
        grid = latents if family.layout_at else family.read_layout(model, inputs).grid
    except LayoutError:
        return None  # larger than the model's table of positions
    counter, live = _run(model, inputs, attention_modules(model, family))
    return Step(
        size=size,
        grid=grid,
        text_queries=family.text_queries,
        layers=counter.layers,
        calls=tuple(counter.calls),
        peak=live.peak,
    )


class _Counter(TorchFunctionMode):
    """Counts products and convolutions as they run; records attention calls without running them."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live
        self.layers = 0
        self.calls: list[Call] = []
        self.module = ""

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the attention module `name`."""
        self.module = name

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of attention modules."""
        self.module = ""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self.record_attention(*args, **kwargs)
        if func is Tensor.__setitem__ and args[0].is_meta:
            return None
        if func is Tensor.repeat_interleave and isinstance(args[1], Tensor):
            kwargs = {**kwargs, "output_size": int(args[1].sum())}
        args, kwargs = _to_meta(args, kwargs)
        out = func(*args, **kwargs)
        if func in _WEIGHTED:
            weight = args[1]  # [out, in] or [out, in / groups, *sides]
            self.layers += 2 * out.numel() * weight[0].numel()
        elif func in _PRODUCTS:
            self.layers += 2 * out.numel() * args[0].shape[-1]
        return out

    def record_attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        """Record an attention call and return an empty output, [B, H, N, D]."""
        batch, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        shape = {"batch": batch, "heads": heads, "queries": queries, "keys": keys, "head_dim": head_dim}
        self.calls.append(Call(module=self.module, **shape, live=self.live.now))
        return query.new_empty(*query.shape[:-1], value.shape[-1])


_WEIGHTED = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)
_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


def _to_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move all tensors of a call to meta if one is there; a boolean index becomes integer indices first."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if len({tensor.is_meta for tensor in tensors}) < 2:
        return args, kwargs
    if len(args) > 1 and args[0] is tensors[0] and tensors[0].is_meta:
        args = (args[0], _as_indices(args[1]), *args[2:])
    return cast(Any, tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs)))


def _as_indices(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_as_indices(one) for one in index)
    if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
        indices = index.nonzero(as_tuple=True)
        return indices if len(indices) > 1 else indices[0]
    return index


def _as_model_input(name: str, value: Any, dtype: torch.dtype) -> Any:
    """Move floats (cast to `dtype` if already there) and `segment_ids` to meta; models read the values of the rest."""

    def convert(tensor: Tensor) -> Tensor:
        if tensor.is_meta and tensor.is_floating_point():
            return tensor.to(dtype)
        return tensor.to("meta") if tensor.is_floating_point() or name == "segment_ids" else tensor

    return tree_map_only(Tensor, convert, value)


def _run(
    model: Any, inputs: Mapping[str, Any], modules: tuple[Mapping[str, nn.Module], Mapping[str, str]]
) -> tuple[_Counter, LiveBytes]:
    """Count what a forward does and holds; `modules` are the swappable and the other attention modules."""
    live = LiveBytes(model)
    counter = _Counter(live)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    for name in (*modules[0], *modules[1]):
        module = model.get_submodule(name)
        handles += [module.register_forward_pre_hook(partial(counter.enter, name))]
        handles += [module.register_forward_hook(counter.leave)]
    try:
        with torch.no_grad(), live, counter:
            model(**{name: _as_model_input(name, value, model.dtype) for name, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return counter, live
