"""Floating-point operations of one denoising step before and after conversion, counted from a model's shape.

The model runs without memory (meta device) while its Linear layers and convolutions are counted. An attention call
costs 4 * pairs * channels: pairs of query and key, times heads * head_dim, two products, multiply and add (as in
CLEAR's tables, arXiv:2412.16112). A linear kernel's method tells its pairs exactly, text and pooled tokens included.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .layout import Grid
from .methods import METHODS

SIZES = {"1K": 1024, "2K": 2048, "4K": 4096, "8K": 8192}  # side of a square picture in pixels


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """One forward of the denoiser on one square picture.

    Attributes:
        size: "1K" for 1024 x 1024 pixels, and so on.
        grid: The picture in tokens; of a UNet, its latent positions.
        attention_before: Operations of the swapped modules' attention itself, as softmax over everything.
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
    """One attention call: query [batch, heads, queries, head_dim], keys many."""

    module: str
    batch: int
    heads: int
    queries: int
    keys: int
    head_dim: int

    def flops(self, pairs: int) -> int:
        return 4 * pairs * self.batch * self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward of an unconverted denoiser does on one square picture.

    Attributes:
        size: "1K" for 1024 x 1024 pixels, and so on.
        side: Side of the picture in tokens; of a UNet, in latent positions.
        layers: Operations of all layers but attention.
        calls: Every attention call.
    """

    size: str
    side: int
    layers: int
    calls: tuple[Call, ...]

    def flops(self, configs: Mapping[str, Any]) -> StepFlops:
        """Operations before and after conversion.

        Args:
            configs: Config of the method by the name of the attention module that it replaces.
        """
        before = after = 0
        for call in self.calls:
            if call.module in configs and call.queries == call.keys:
                config = configs[call.module]
                grid, text_len = self.layout(call)
                before += call.flops(call.queries * call.keys)
                method = METHODS[type(config)]
                pairs = method.pairs(config, grid, text_len, num_heads=call.heads, head_dim=call.head_dim)
                after += call.flops(pairs)
        everything = self.layers + sum(call.flops(call.queries * call.keys) for call in self.calls)
        return StepFlops(
            size=self.size,
            grid=(self.side, self.side),
            attention_before=before,
            attention_after=after,
            before=everything,
        )

    def layout(self, call: Call) -> tuple[Grid, int]:
        """Grid and text length of a self-attention call, at the level of a UNet whose grid fits in."""
        side = self.side
        while side * side > call.queries:
            side = (side + 1) // 2
        return (side, side), call.queries - side * side


def count_steps(model: Any, *, vae_scale: int) -> tuple[Step, ...]:
    """A step at each of `SIZES` that the model can make; none for a class whose inputs are not in the table below.

    Args:
        model: An unconverted denoiser on the meta device.
        vae_scale: Pixels per latent position, along one side.
    """
    if type(model).__name__ not in _INPUTS:
        return ()
    patch = _PACKED.get(type(model).__name__) or getattr(model.config, "patch_size", None) or 1
    limit = getattr(model.config, "pos_embed_max_size", None)
    sides = {size: pixels // vae_scale // patch for size, pixels in SIZES.items()}
    return tuple(
        _count_step(model, size, side, patch) for size, side in sides.items() if limit is None or side <= limit
    )


def _count_step(model: Any, size: str, side: int, patch: int) -> Step:
    with torch.device("meta"):
        inputs = _INPUTS[type(model).__name__](model.config, side * patch)
    layers, calls = _run(model, inputs)
    return Step(size=size, side=side, layers=layers, calls=tuple(calls))


class _Counter(TorchFunctionMode):
    """Counts Linear layers and convolutions as they run; notes attention calls and skips them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = 0
        self.calls: list[Call] = []
        self.module = ""

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the attention module `name`."""
        self.module = name

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self.skip(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func in (functional.linear, functional.conv2d):
            weight = args[1]  # [out, in] or [out, in / groups, height, width]
            self.layers += 2 * out.numel() * weight[0].numel()
        return out

    def skip(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        """Notes an attention call; [B, H, N, D] without numbers."""
        batch, heads, queries, head_dim = query.shape
        keys = key.shape[2]
        self.calls.append(
            Call(module=self.module, batch=batch, heads=heads, queries=queries, keys=keys, head_dim=head_dim)
        )
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[int, list[Call]]:
    """Operations of all layers but attention, and the attention calls."""
    counter = _Counter()
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "get_processor")}
    handles = [module.register_forward_pre_hook(partial(counter.enter, name)) for name, module in modules.items()]
    with torch.no_grad(), counter:
        model(**inputs)
    for handle in handles:
        handle.remove()
    return counter.layers, counter.calls


def _flux_inputs(config: Any, latent: int) -> dict[str, Any]:
    num_tokens, text_len = (latent // 2) ** 2, 512
    return {
        "hidden_states": torch.empty(1, num_tokens, config.in_channels),
        "encoder_hidden_states": torch.empty(1, text_len, config.joint_attention_dim),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        "timestep": torch.empty(1),
        "img_ids": torch.empty(num_tokens, 3),
        "txt_ids": torch.empty(text_len, 3),
        "guidance": torch.empty(1) if config.guidance_embeds else None,
    }


def _sd3_inputs(config: Any, latent: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, config.in_channels, latent, latent),
        "encoder_hidden_states": torch.empty(1, 77 + 256, config.joint_attention_dim),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        "timestep": torch.empty(1),
    }


def _pixart_inputs(config: Any, latent: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, config.in_channels, latent, latent),
        "encoder_hidden_states": torch.empty(1, 300, config.caption_channels),
        "timestep": torch.empty(1),
        "added_cond_kwargs": {"resolution": torch.empty(1, 2), "aspect_ratio": torch.empty(1, 1)},
    }


def _unet_inputs(config: Any, latent: int) -> dict[str, Any]:
    time_ids = 6
    text_embeds = (config.projection_class_embeddings_input_dim or 0) - time_ids * (config.addition_time_embed_dim or 0)
    return {
        "sample": torch.empty(1, config.in_channels, latent, latent),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 77, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": torch.empty(1, text_embeds), "time_ids": torch.empty(1, time_ids)},
    }


_PACKED = {"FluxTransformer2DModel": 2}  # latent positions per token and side that are packed before the model
_INPUTS = {
    "FluxTransformer2DModel": _flux_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
    "UNet2DConditionModel": _unet_inputs,
}
