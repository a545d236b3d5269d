"""Models that take the position of every token as an argument: FLUX and its relatives.

B batch, N tokens of the image and its references, C channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..errors import LayoutError
from ..layout import Grid, Layout
from ..seam.original import runs_original
from .family import CACHED_REFERENCES, ForwardLayout


def rectangle(ids: Tensor) -> tuple[Grid, Tensor]:
    """The grid of position ids, and the same ids without rounding.

    Pipelines make ids in bfloat16, which is exact up to 256. Beyond, neighbouring rows and columns share positions: the
    width then follows from the first change of row or the first step back of columns, not from the largest position.

    Args:
        ids: [N, axes], any dtype; column 1 is the row, column 2 the column, the others are constant.
    Returns:
        (height, width), and ids [N, axes] in float32.
    Raises:
        LayoutError: the ids are not exactly one rectangle in row-major order.
    """
    device, ids = ids.device, ids.cpu()  # once: each read of a device tensor would wait for the device
    rows, cols = ids[:, 1], ids[:, 2]
    num_tokens = ids.shape[0]
    widths = (_first(rows != rows[0]), 1 + _first(cols[1:] < cols[:-1]))
    for width in widths:
        height, rest = divmod(num_tokens, width)
        exact = ids[:1].float().repeat(num_tokens, 1)
        if rest == 0:
            exact[:, 1] += torch.arange(height).repeat_interleave(width)
            exact[:, 2] += torch.arange(width).repeat(height)
            if torch.equal(exact.to(ids.dtype), ids):
                return (height, width), exact.to(device)
    raise LayoutError(
        f"the {num_tokens} image positions are not one full rectangle in row-major order, so they have no "
        "window (an image cropped or packed by hand, or references that share the image's first position column): run "
        "this call inside `with dense(model):`, or restore_ the model"
    )


def image_and_references(ids: Tensor) -> tuple[Grid, int, Tensor]:
    """The grid of the generated image, and the number of tokens of reference images after it.

    References (FLUX Kontext, FLUX.2 editing) differ from the image in a position column other than row and column.

    Args:
        ids: [N, axes], as for `rectangle`; the image first.
    Returns:
        (height, width), the number of tokens after the image, and all ids [N, axes] in float32, without rounding.
    Raises:
        LayoutError: one of the images is not a rectangle.
    """
    device, ids = ids.device, ids.cpu()
    other_axes = [axis for axis in range(ids.shape[1]) if axis not in (1, 2)]
    grid, exact, start = None, [], 0
    while start < ids.shape[0]:
        length = _first((ids[start:, other_axes] != ids[start, other_axes]).any(1))
        shape, run = rectangle(ids[start : start + length])
        grid = grid or shape
        exact.append(run)
        start += length
    assert grid is not None, "there is at least one image token"
    return grid, ids.shape[0] - grid[0] * grid[1], torch.cat(exact).to(device)


def _first(mask: Tensor) -> int:
    """Index of the first True in [N]; N if there is none."""
    return int(pad(mask.to(torch.uint8), (0, 1), value=1).argmax())


def read_image_ids(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """hidden_states [B, N, C], img_ids [N, axes] (or, deprecated, [1, N, axes]), encoder_hidden_states [B, text, C]."""
    return _see_ids(arguments, arguments["encoder_hidden_states"].shape[1])


def read_flux_controlnet(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """As `read_image_ids`; a union ControlNet has a token for its mode before the text."""
    mode = arguments.get("controlnet_mode") if model.union else None  # upstream raises if it is missing
    num_modes = 0 if mode is None else mode.shape[1]
    return _see_ids(arguments, num_modes + arguments["encoder_hidden_states"].shape[1])


def _see_ids(arguments: Mapping[str, Any], text_len: int) -> ForwardLayout:
    ids, tokens = arguments["img_ids"], arguments["hidden_states"].shape[1]
    ids = ids[0] if ids.ndim == 3 else ids
    if ids.shape[0] != tokens:
        raise LayoutError(
            f"hidden_states has {tokens} image tokens, but img_ids has {ids.shape[0]}: make both from the same height "
            "and width (a token is a 2x2 patch of latents)"
        )
    layout, exact = _layout_after_text(ids, text_len)
    # as many dimensions as given: context parallelism splits a fixed one
    return replace(layout, replaced={"img_ids": exact.expand_as(arguments["img_ids"])})


def _layout_after_text(ids: Tensor, text_len: int) -> tuple[ForwardLayout, Tensor]:
    """The layout for ids [N, axes] of the image and its references after a text, and the ids without rounding."""
    grid, num_references, exact = image_and_references(ids)
    starts = (text_len,) if num_references else None
    return ForwardLayout(grid=grid, text_lens=(text_len + num_references,), image_starts=starts), exact


def read_flux2(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """FLUX.2: as `read_image_ids`; with a `kv_cache_mode`, references come first or are only keys and values."""
    if arguments.get("kv_cache_mode") is not None:
        raise LayoutError(CACHED_REFERENCES)
    return read_image_ids(model, arguments)


def read_flux3(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """FLUX.3: as `read_image_ids`; references are separate arguments, and their tokens follow the image."""
    layout = read_image_ids(model, arguments)
    references = arguments.get("image_cond_hidden_states")
    if references is None:
        return layout
    text_len = arguments["encoder_hidden_states"].shape[1]
    return replace(layout, text_lens=(text_len + references.shape[1],), image_starts=(text_len,))


_OUTPUT_IMAGE = 2  # OUTPUT_IMAGE_INDICATOR of diffusers' transformer_ideogram4


def read_indicator(model: Any, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Ideogram 4: indicator [B, text + N] gives the kind of each token, position_ids [B, text + N, 3] its position.

    Upstream makes a tokens x tokens mask of segment_ids [B, text + N], which separate the padding before the text. If
    every layer is converted, it gets a single segment instead, and `text_mask` hides the padding.
    """
    names = ("indicator", "segment_ids", "position_ids")
    indicator, segments, positions = (arguments[name].cpu() for name in names)  # once, as in `rectangle`
    is_image = indicator == _OUTPUT_IMAGE
    text_len = _first(is_image[0])
    positions = positions[:, text_len:]
    attend = segments == segments[:, -1:]
    same_layout = (is_image == is_image[:1]).all() and (positions == positions[:1]).all()
    if not same_layout or not is_image[:, text_len:].all() or not attend[:, text_len:].all():
        raise LayoutError(
            "linear attention needs one image per sequence, at the same position after the text and of the same size "
            "in all sequences (indicator, position_ids, segment_ids): left-pad the texts, as Ideogram4Pipeline does"
        )
    grid, _ = rectangle(positions[0])
    layout = ForwardLayout(grid=grid, text_lens=(text_len,))
    if _is_original(model, grid):
        return layout
    all_converted = all(hasattr(layer.attention, "linear_kernel") for layer in model.layers)
    text_mask = attend[:, :text_len].to(arguments["segment_ids"].device)
    replaced = {"segment_ids": arguments["segment_ids"][:, -1:]} if all_converted else {}
    return replace(layout, text_mask=text_mask, replaced=replaced)


def read_joint_position_ids(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """Krea 2: position_ids [text + N, 3] of both; hidden_states [B, N, C], encoder_hidden_states [B, text, ...]."""
    ids, text_len = arguments["position_ids"], arguments["encoder_hidden_states"].shape[1]
    layout, exact = _layout_after_text(ids[text_len:], text_len)
    return replace(layout, replaced={"position_ids": torch.cat([ids[:text_len].float(), exact])})


def read_image_ids_and_mask(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    """As `read_image_ids`, with attention_mask [B, text + N], which blocks would expand to tokens x tokens.

    Chroma's pipelines fill it with 0.0 and 1.0, which full attention adds to its scores, so that it hides nothing
    (diffusers issue 12116). Linear attention hides the masked tokens, as in training; if every converted module makes
    the original call, upstream's mask stays.
    """
    layout = read_image_ids(model, arguments)
    mask = arguments.get("attention_mask")
    if mask is None or (mask.dtype != torch.bool and _is_original(model, layout.grid)):
        return layout
    text_len = arguments["encoder_hidden_states"].shape[1]
    if not (mask[:, text_len:] == 1).all() or not ((mask == 0) | (mask == 1)).all():
        raise LayoutError(
            "attention_mask must be True or 1 (attend) or False or 0 (hide), and hide text tokens only, got "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    if layout.image_starts is not None:
        raise LayoutError(
            "reference images with a text mask are not supported yet: pass one prompt at a time, without padding"
        )
    return replace(layout, text_mask=mask[:, :text_len].bool())


def _is_original(model: nn.Module, grid: Grid) -> bool:
    """Whether every converted module makes the original call on this grid."""
    layout = Layout(grid, 0, text_first=True)
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "linear_kernel")]
    return all(
        runs_original(module.linear_kernel, layout, module._lineardit_level.conversion.dense_tokens)
        for module in modules
    )
