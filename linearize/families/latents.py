"""Models that take latents as an image, [B, C, height, width] or [B, C, frames, height, width].

B batch, C channels; `patch_size` latents make one token along a side.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor, nn

from ..errors import LayoutError
from ..layout import Grid
from .family import CACHED_REFERENCES, ForwardLayout

_SMALLER = "choose a smaller image, or run this call inside `with dense(model):` if you know that its output is correct"


def _grid(model: Any, latents: Tensor) -> Grid:
    """(height, width) or (frames, height, width) in tokens."""
    patch = model.config.patch_size
    sides = latents.shape[2:]
    patches = (patch,) * len(sides) if isinstance(patch, int) else tuple(patch)[-len(sides) :]
    return tuple(side // size for side, size in zip(sides, patches, strict=True))


def read_latents(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Attention over image tokens only."""
    return ForwardLayout(grid=_grid(model, arguments["hidden_states"]))


def read_square_latents(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """DiT, whose output upstream folds into a square whatever the input was."""
    grid = _grid(model, arguments["hidden_states"])
    if grid[0] != grid[1]:
        raise LayoutError(f"{type(model).__name__} generates square images only, got {grid} tokens: {_SMALLER}")
    return ForwardLayout(grid=grid)


def read_latents_and_text(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Joint attention with encoder_hidden_states [B, text, C], if given."""
    text = arguments.get("encoder_hidden_states")
    return ForwardLayout(
        grid=_grid(model, arguments["hidden_states"]), text_lens=() if text is None else (text.shape[1],)
    )


def read_glm_image(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """GLM-Image; references are run first, and their keys and values kept in `kv_caches` for the image."""
    caches = arguments.get("kv_caches")
    if caches is not None and any(layer.mode in ("write", "read") for layer in caches.caches):
        raise LayoutError(CACHED_REFERENCES)
    return read_latents_and_text(model, arguments)


def read_sd3(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """SD3 crops a table of positions; `attn2` of its dual blocks sees the image alone.

    A ControlNet may have no table of its own: its hidden_states are tokens then, and controlnet_cond has the size.
    """
    if arguments["hidden_states"].ndim == 3:
        arguments = {**arguments, "hidden_states": arguments["controlnet_cond"]}
    layout = read_latents_and_text(model, arguments)
    limit = getattr(model.pos_embed, "pos_embed_max_size", None)
    if limit is not None and max(layout.grid) > limit:
        raise LayoutError(
            f"this {type(model).__name__} has positions for up to {limit} tokens per side (pos_embed_max_size), got "
            f"{layout.grid}: {_SMALLER}"
        )
    return layout


def read_auraflow(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """AuraFlow puts register tokens before the text; beyond its table, positions would wrap silently."""
    layout = read_latents_and_text(model, arguments)
    limit = isqrt(model.pos_embed.pos_embed_max_size)
    if max(layout.grid) > limit:
        raise LayoutError(
            f"this {type(model).__name__} has positions for up to {limit} tokens per side, and silently uses wrong "
            f"ones beyond that, got {layout.grid}: {_SMALLER}"
        )
    return ForwardLayout(grid=layout.grid, text_lens=(layout.text_lens[0] + model.register_tokens.shape[1],))


def read_ernie_image(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """ERNIE-Image: text_bth [B, text, C] after the image."""
    return ForwardLayout(grid=_grid(model, arguments["hidden_states"]), text_lens=(arguments["text_bth"].shape[1],))


def read_hidream(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """HiDream: after the image, padding if the picture is not square, then two texts, one of them twice."""
    latents = arguments["hidden_states"]
    if latents.ndim != 4:
        raise LayoutError(
            "HiDream latents must be [batch, channels, height, width]: the padding of patched latents is unknown"
        )
    grid = _grid(model, latents)
    if grid[0] != grid[1] and grid[0] * grid[1] > model.max_seq:
        raise LayoutError(
            f"this {type(model).__name__} has room for {model.max_seq} tokens of a non-square image "
            f"(max_resolution), got {grid}: choose a smaller or a square image"
        )
    padding = 0 if grid[0] == grid[1] else model.max_seq - grid[0] * grid[1]
    llama = arguments["encoder_hidden_states_llama3"].shape[-2]
    return ForwardLayout(grid=grid, text_lens=(padding + arguments["encoder_hidden_states_t5"].shape[1] + 2 * llama,))


def read_items(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """JoyImage: latents [B, C, frames, height, width], or [B, items, C, frames, height, width]: items are frames."""
    latents = arguments["hidden_states"]
    items = latents.shape[1] if latents.ndim == 6 else 1
    frames, height, width = _grid(model, latents[:, 0] if latents.ndim == 6 else latents)
    return ForwardLayout(grid=(items * frames, height, width), text_lens=(arguments["encoder_hidden_states"].shape[1],))


def read_channels_last(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Kandinsky 5: latents [B, frames, height, width, C]; its sparse attention comes in `sparse_params`."""
    if arguments.get("sparse_params") is not None:
        raise LayoutError(
            "Kandinsky 5's own sparse attention (sparse_params) cannot be replaced: use a checkpoint with "
            'attention_type "regular", or run this call inside `with dense(model):`'
        )
    grid = _grid(model, arguments["hidden_states"].movedim(-1, 1))
    limits = model.visual_rope_embeddings.max_pos
    if any(side > limit for side, limit in zip(grid, limits, strict=True)):
        raise LayoutError(
            f"this {type(model).__name__} has positions for up to {limits} tokens, got {grid}: {_SMALLER}"
        )
    return ForwardLayout(grid=grid)


def read_hunyuan_image(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """HunyuanImage joins two texts, the second optional."""
    grid = _grid(model, arguments["hidden_states"])
    texts = [arguments["encoder_hidden_states"]]
    if model.context_embedder_2 is not None and arguments.get("encoder_hidden_states_2") is not None:
        texts.append(arguments["encoder_hidden_states_2"])
    return ForwardLayout(grid=grid, text_lens=(sum(text.shape[1] for text in texts),))


def read_feature_map(module: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """A level of a UNet: hidden_states [B, C, height, width], one token for each position."""
    return ForwardLayout(grid=tuple(arguments["hidden_states"].shape[-2:]))


def level_tokens(model: Any, name: str) -> int:
    """Tokens of a UNet's attention module at `sample_size`, the size that the model was trained for.

    The name of the module says its level: down_blocks.1.attentions.0..., mid_block..., up_blocks.2.attentions....

    Raises:
        ValueError: the config does not say the size, such as a ControlNet's.
    """
    sample = model.config.get("sample_size")
    if sample is None:
        raise ValueError(
            f"min_tokens needs the size that a model was trained for, but the config of this "
            f'{type(model).__name__} has no sample_size: choose levels by name, such as layers="down_blocks.0.*"'
        )
    part, index = name.split(".")[:2]
    last = len(model.config.block_out_channels) - 1
    level = {"down_blocks": lambda: int(index), "up_blocks": lambda: last - int(index)}.get(part, lambda: last)()
    height, width = (sample, sample) if isinstance(sample, int) else sample
    for _ in range(level):
        height, width = -(-height // 2), -(-width // 2)
    return height * width
