"""One converted attention module: the class that replaces its own, and the attention call that is intercepted.

B batch, H heads, N tokens, D head dimension.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ...kernels.pieces.autocast import as_autocast
from ...kernels.pieces.text import key_mask
from ..errors import KernelNotReachedError, LayoutError, UnsupportedModelError
from ..layout import Layout, num_tokens, reorder, text_mask_of
from ..matching import head_shape
from .hooks import Level, rewind_before_backward
from .input_device import call_on_input_device
from .original import runs_original
from .parallel import join_shares, refuse_gradients, share_sizes, split_shares, ulysses_degree
from .perturbed import refuse_perturbed, skips_scores


class LinearAttention:
    """Mixin before an attention module's own class: runs upstream's forward, with self-attention by `linear_kernel`."""

    _dense_class: type[nn.Module]
    _lineardit_level: Level
    _lineardit_name: str
    linear_kernel: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        conversion = self._lineardit_level.conversion
        if not conversion.enabled:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            conversion.refuse_earlier_grids()
        processor = getattr(self, "processor", None)
        refuse_perturbed(self._lineardit_name, processor)
        degree = ulysses_degree(processor)
        intercept = _Intercept(self)
        with intercept:
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if intercept.hits != 1:
            raise KernelNotReachedError(_not_reached_message(self, intercept.hits))
        refuse_gradients(degree, output)
        if not torch.compiler.is_compiling():
            rewind_before_backward(conversion, output)
        return output

    def fuse_projections(self, *args: Any, **kwargs: Any) -> None:
        """Fuse the projections as upstream does, unless that would lose trained weights or input terms."""
        conversion = self._lineardit_level.conversion
        conversion.overlays.check_fusable()
        for terms in conversion.input_terms:
            terms.check_fusable()
        super().fuse_projections(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by upstream's class: this one is created on demand and cannot be imported."""
        return _blank, (self._dense_class,), self.__dict__.copy()


@cache
def linear_class(dense_class: Any) -> type[nn.Module]:
    """The class of a converted module whose own class is `dense_class`."""
    name = f"Linear{dense_class.__name__}"
    return type(name, (LinearAttention, dense_class), {"__module__": __name__, "_dense_class": dense_class})


def _blank(dense_class: Any) -> nn.Module:
    cls = linear_class(dense_class)
    return cls.__new__(cls)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change a module's class, and the bound forward that hooks have stored (offloading, caches) with it."""
    stored = list(_stored_forwards(module))
    module.__class__ = cls
    for holder, attribute in stored:
        setattr(holder, attribute, MethodType(cls.forward, module))


def check_forward(name: str, module: nn.Module) -> None:
    """Raise an UnsupportedModelError if the instance has a forward of its own that would bypass a new class."""
    if "forward" in vars(module) and not list(_stored_forwards(module)):
        owner = getattr(vars(module)["forward"], "__qualname__", repr(vars(module)["forward"]))
        raise UnsupportedModelError(
            f"{name}.forward was replaced on the instance by {owner}, which would bypass linear attention: "
            "remove that hook, linearize_ first, then add it again"
        )


def _stored_forwards(module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Where accelerate's and diffusers' hooks keep the module's own forward: (holder, attribute)."""
    registry = vars(module).get("_diffusers_hook")
    references = registry._fn_refs if registry is not None else []
    candidates = [(module, "forward"), (module, "_old_forward")]
    candidates += [(reference, attribute) for reference in references for attribute in ("forward", "original_forward")]
    for holder, attribute in candidates:
        method = vars(holder).get(attribute)
        if isinstance(method, MethodType) and method.__self__ is module and method.__func__ is type(module).forward:
            yield holder, attribute


class _Intercept(TorchFunctionMode):
    """Redirects the image's self-attention to the module's `linear_kernel` and counts the calls."""

    def __init__(self, attention: LinearAttention) -> None:
        super().__init__()
        self.attention = attention
        self.hits = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            # Dynamo cannot trace the super() call inside Tensor.unflatten under a function mode
            func = torch.unflatten
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key = _query_and_key(*args, **kwargs)
        if not _is_image_self_attention(self.attention, query, key):
            # cross-attention, or attention to an image prompt
            _refuse_dense(self.attention, query, key)
            return func(*args, **kwargs)
        self.hits += 1
        if skips_scores():
            return func(*args, **kwargs)
        _check_heads(self.attention, query)
        return _attend(self.attention, *args, **kwargs)


def _query_and_key(query: Tensor, key: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return query, key


def _is_image_self_attention(attention: LinearAttention, query: Tensor, key: Tensor) -> bool:
    """Whether a call is the image's self-attention: all tokens are queries, or only the image's if text has none."""
    level = attention._lineardit_level
    if level.conversion.family.text_queries:
        return query.shape[2] == key.shape[2]
    num_image = num_tokens(level.grid)
    if query.shape[2] != num_image:
        return False
    if torch.compiler.is_compiling():  # text_lens are integers, and each would need its own trace
        return key.shape[2] >= num_image
    return key.shape[2] - num_image in (level.text_lens or (0,))  # a reference as large sees fewer


def _check_heads(attention: LinearAttention, query: Tensor) -> None:
    """Raise a LayoutError if this process has only some of the heads and the method has tensors for each head."""
    kernel, num_heads = attention.linear_kernel, head_shape(attention)[0]
    shared = kernel.shared_across_heads or not [*kernel.parameters(), *kernel.buffers()]
    if query.shape[1] != num_heads and not shared:
        method = type(kernel.config).__name__
        raise LayoutError(
            f"{attention._lineardit_name}: {method} has weights for each of {num_heads} heads, but only "
            f"{query.shape[1]} are on this device (context or tensor parallelism): disable parallelism, or use a "
            "method whose heads share weights"
        )


def _refuse_dense(attention: LinearAttention, query: Tensor, key: Tensor) -> None:
    """Raise a LayoutError for another call that costs as much as the self-attention that was replaced."""
    level, kernel = attention._lineardit_level, attention.linear_kernel
    if query.shape[2] != num_tokens(level.grid) or key.shape[2] <= query.shape[2]:
        return
    if not level.conversion.family.text_queries:
        return  # a reference image of the same size
    image = Layout(level.grid, 0, level.conversion.family.text_first)
    if not runs_original(kernel, image, level.conversion.dense_tokens):
        processor = type(getattr(attention, "processor", None)).__name__
        raise LayoutError(
            f"{attention._lineardit_name}: {processor} makes every image token attend to the whole image a second "
            "time, as image prompts do in SD3: call unload_ip_adapter, or run this call inside `with dense(model):`"
        )


def _attend(
    attention: LinearAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replaces `scaled_dot_product_attention` in the image's self-attention; [B, H, N, D] -> [B, H, N, D]."""
    level, kernel = attention._lineardit_level, attention.linear_kernel
    layout = _layout_of(attention, key)
    if level.conversion.logit_factor != 1:
        scale = level.conversion.logit_factor * (query.shape[-1] ** -0.5 if scale is None else scale)
    if runs_original(kernel, layout, level.conversion.dense_tokens):
        if attn_mask is None and layout.text_mask is not None:
            attn_mask = key_mask(layout.text_mask, layout.num_image_tokens, layout.text_first)
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal or dropout_p > 0:
        raise LayoutError(
            f"{attention._lineardit_name}: linear attention supports neither is_causal nor dropout_p, got {is_causal=} "
            f"and {dropout_p=}"
        )
    # norms under autocast return float32 queries and keys, values are half: cast all three, as autocast does for SDPA
    query, key, value = as_autocast(query, key, value)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    num_missing_queries = key.shape[2] - query.shape[2]  # text without queries: pad with zeros, drop their outputs
    if num_missing_queries > 0:
        padding = (0, 0, num_missing_queries, 0) if layout.text_first else (0, 0, 0, num_missing_queries)
        query = pad(query, padding)
    sizes = _share_sizes(attention, layout)
    if sizes:
        query, key, value = (join_shares(x, sizes, dim=2) for x in (query, key, value))
        if attn_mask is not None and attn_mask.shape[-1] == query.shape[2]:
            attn_mask = join_shares(attn_mask, sizes, dim=-1)
    order = _order_of(level, query)
    if order is not None:
        query, key, value = (reorder(x, order, dim=2) for x in (query, key, value))
        attn_mask = None if attn_mask is None else reorder(attn_mask, order, dim=-1)
        layout = replace(layout, text_first=False)
    if attn_mask is not None:
        # a growing list would be traced again each time
        pending = None if torch.compiler.is_compiling() else level.conversion.pending_mask_checks
        text_mask = text_mask_of(attn_mask, query, layout, pending=pending)
        layout = replace(layout, text_mask=text_mask)
    out = call_on_input_device(kernel, query, key, value, layout, scale=scale)
    if order is not None:
        out = reorder(out, order.argsort(-1), dim=2)
    if num_missing_queries > 0:
        out = out[:, :, num_missing_queries:] if layout.text_first else out[:, :, :-num_missing_queries]
    return split_shares(out, sizes, dim=2) if sizes else out


def _order_of(level: Level, query: Tensor) -> Tensor | None:
    """[B or 1, N] token order that puts the image first; None if the image is where the family has it."""
    if level.order is None or level.order.shape[1] != query.shape[2]:  # a call of the image alone
        return None
    if level.order.device != query.device and not torch.compiler.is_compiling():
        level.order = level.order.to(query.device)  # for the layers after this one
    return level.order.to(query.device)


def _layout_of(attention: LinearAttention, key: Tensor) -> Layout:
    """The layout of a call's keys [B, H, N, D] in the family's token order."""
    level = attention._lineardit_level
    text_first = level.conversion.family.text_first
    text_len = key.shape[2] - num_tokens(level.grid)
    if not torch.compiler.is_compiling() and text_len not in (0, *level.text_lens):
        raise LayoutError(
            f"{attention._lineardit_name} got {key.shape[2]} tokens, but the model was called with "
            f"{' or '.join(map(str, level.text_lens or (0,)))} text tokens and a grid of {level.grid}: call the model "
            "itself, run each backward with gradient checkpointing before the next forward at another size, and "
            "remove whatever merges or crops tokens (ToMe)"
        )
    mask = None
    if level.text_mask is not None and text_len > 0:
        mask = level.text_mask.to(key.device).expand(key.shape[0], -1)  # layers may be on different devices
    return Layout(level.grid, text_len, text_first, mask)


def _share_sizes(attention: LinearAttention, layout: Layout) -> list[int]:
    """Sizes of context parallelism's token shares (`parallel.share_sizes`); empty where the tokens are in order."""
    degree = ulysses_degree(getattr(attention, "processor", None))
    if degree == 1 or layout.text_len == 0:
        return []
    if attention._lineardit_level.order is not None:
        raise LayoutError(
            "context parallelism cannot split reference images or prompts of different lengths with linear "
            "attention: disable it, or run this call inside `with dense(model):`"
        )
    parts = (layout.text_len, layout.num_image_tokens)
    return share_sizes(*(parts if layout.text_first else parts[::-1]), degree)


def _not_reached_message(attention: LinearAttention, hits: int) -> str:
    processor = getattr(attention, "processor", None)
    backend = getattr(processor, "_attention_backend", None)
    return (
        f"{attention._lineardit_name} is converted, but its forward reached linear attention {hits} times instead of "
        f"once (processor {type(processor).__name__}, attention backend {getattr(backend, 'value', 'default')}). "
        "Likely causes: set_attention_backend on any model (it applies to the whole process) or "
        "DIFFUSERS_ATTN_BACKEND with its own kernel, xformers, attention slicing, another "
        "scaled_dot_product_attention (SageAttention) or a processor that does not call torch's once. Set the backend "
        "'native' and a processor that does (for a UNet, AttnProcessor2_0(); the one from set_default_attn_processor "
        "does not), or restore_ the model."
    )
