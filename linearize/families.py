"""The model families: one row each, and the functions that see the token grid in the arguments of a forward.

B batch, N image tokens, C channels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LayoutError, UnsupportedModelError
from .layout import Grid
from .methods import nearest


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the arguments of one forward say.

    Attributes:
        grid: Size of the image in tokens.
        text_len: Tokens that joint attention adds to those of the image.
        replaced: Arguments to hand on in place of those that came, by name.
    """

    grid: Grid
    text_len: int = 0
    replaced: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of model is converted. Pass your own to `linearize_(..., family=...)`.

    Attributes:
        name: For reports.
        attention: Globs of module names; those of them that are not cross-attention are the image's self-attention.
            Such a module calls `scaled_dot_product_attention` once, and has `heads` and `inner_dim`.
        see: (module, arguments by name) -> Sight. A module-level function, so that models can be copied and pickled.
        text_first: In joint attention the text stands before the image.
        seen_at: Class name of the modules whose arguments tell the grid; None: the model itself.
        blocks: Class names of the repeated blocks, for `compile_`.
    """

    name: str
    attention: tuple[str, ...]
    see: Callable[[nn.Module, Mapping[str, Any]], Sight]
    text_first: bool = True
    seen_at: str | None = None
    blocks: tuple[str, ...] = ()


def rectangle(ids: Tensor) -> tuple[Grid, Tensor]:
    """The grid that position ids spell out, and the same ids without rounding.

    Pipelines make ids in bfloat16, exact to 256 only. Beyond, rows and columns collapse in pairs: the first change of
    row, or the first step back of columns, still tells the width, where the greatest position does not.

    Args:
        ids: [N, axes], any dtype; column 1 is the row, column 2 the column, the others are constant.
    Returns:
        (height, width), and ids [N, axes] in float32.
    Raises:
        LayoutError: the ids are not exactly one rectangle in row-major order.
    """
    rows, cols = ids[:, 1], ids[:, 2]
    num_tokens = ids.shape[0]
    widths = (_first(rows != rows[0]), 1 + _first(cols[1:] < cols[:-1]))
    for width in widths:
        height, rest = divmod(num_tokens, width)
        exact = ids[:1].float().repeat(num_tokens, 1)
        if rest == 0:
            exact[:, 1] += torch.arange(height, device=ids.device).repeat_interleave(width)
            exact[:, 2] += torch.arange(width, device=ids.device).repeat(height)
            if torch.equal(exact.to(ids.dtype), ids):
                return (height, width), exact
    raise LayoutError(
        f"the {num_tokens} image positions are not one full rectangle in row-major order; several images in one "
        "sequence (references, in-context editing) or cropped ids have no window here: run this call inside "
        "`with dense(model):`, or restore_ the model"
    )


def _first(mask: Tensor) -> int:
    """Index of the first True in [N], N where there is none."""
    return int(mask.to(torch.uint8).argmax()) if mask.any() else mask.shape[0]


def _see_image_ids(model: nn.Module, arguments: Mapping[str, Any]) -> Sight:
    """FLUX: hidden_states [B, N, C], img_ids [N, 3] (or, deprecated, [1, N, 3])."""
    ids, tokens = arguments["img_ids"], arguments["hidden_states"].shape[1]
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.shape[0] != tokens:
        raise LayoutError(
            f"hidden_states hold {tokens} image tokens, img_ids {ids.shape[0]}: make both from the same height and "
            "width (a token is a 2x2 patch of latents)"
        )
    grid, exact = rectangle(ids)
    return Sight(grid=grid, text_len=arguments["encoder_hidden_states"].shape[1], replaced={"img_ids": exact})


def _see_latents(model: Any, arguments: Mapping[str, Any]) -> Sight:
    """Latents [B, C, height, width], image tokens only."""
    height, width = arguments["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    return Sight(grid=(height // patch, width // patch))


def _see_latents_and_text(model: Any, arguments: Mapping[str, Any]) -> Sight:
    """SD3: latents [B, C, height, width] and text in joint attention; `attn2` of dual blocks sees the image alone."""
    text = arguments.get("encoder_hidden_states")
    return Sight(grid=_see_latents(model, arguments).grid, text_len=0 if text is None else text.shape[1])


def _see_feature_map(module: nn.Module, arguments: Mapping[str, Any]) -> Sight:
    """A level of a UNet: hidden_states [B, C, height, width], one token for each position."""
    return Sight(grid=tuple(arguments["hidden_states"].shape[-2:]))


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": Family(
        name="flux",
        attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        see=_see_image_ids,
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    ),
    "SD3Transformer2DModel": Family(
        name="sd3",
        attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        see=_see_latents_and_text,
        text_first=False,
        blocks=("JointTransformerBlock",),
    ),
    "PixArtTransformer2DModel": Family(
        name="pixart",
        attention=("transformer_blocks.*.attn1",),
        see=_see_latents,
        blocks=("BasicTransformerBlock",),
    ),
    "UNet2DConditionModel": Family(
        name="sd-unet",
        attention=("*.transformer_blocks.*.attn1", "*.transformer_blocks.*.attn2"),
        see=_see_feature_map,
        seen_at="Transformer2DModel",
        blocks=("BasicTransformerBlock",),
    ),
}


def family_of(model: nn.Module) -> Family:
    """The row of a model's class, or of a class it derives from.

    Raises:
        UnsupportedModelError: there is none; lists those there are.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    name = type(model).__name__
    raise UnsupportedModelError(
        f"cannot convert a {name}{nearest(name, FAMILIES)}; supported: {', '.join(FAMILIES)}; "
        "for a model of your own pass linearize_(..., family=Family(...))"
    )
