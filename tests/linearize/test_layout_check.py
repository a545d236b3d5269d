"""`check_layout`: each model's latents reach the tokens where its family's layout has them; wrong layouts are found."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from own_attention import OwnAttention
from torch import Tensor, nn

from lineardit import Clear, LayoutError, linearize_
from lineardit.linearize import Family, ForwardLayout, check_layout
from tiny_models import FAMILIES, build, inputs_of

Position = tuple[int, ...]
GRID = (5, 7)
PACKED_COLUMNS = {"qwen-image-21": 8}  # its grids are even
TEXT_BEFORE = {"ideogram4": 3}  # tokens of its latents that are padding
TRANSFORMERS = [name for name in FAMILIES if not name.startswith("unet")]  # convolutions mix tokens before attention


def change_in(family: str) -> Callable[[Mapping[str, Any], Position], dict[str, Any]]:
    """Change the latents of one image token of a family's tiny model."""

    def change(arguments: Mapping[str, Any], position: Position) -> dict[str, Any]:
        name = "x" if "x" in arguments else "hidden_states"
        latents = copy.deepcopy(arguments[name])
        _latents_at(latents, position, family).add_(1)
        return {**arguments, name: latents}

    return change


def _latents_at(latents: Any, position: Position, family: str) -> Tensor:
    """The view of the latents at a position: of a token if they are packed, or else of a patch in the frame."""
    *frame, row, column = position
    if family == "z-image":  # a list of pictures [channels, frames, height, width]
        return _patch(latents[0][:, 0], row, column)
    if latents.ndim == 3 or family == "joy-image-plus":  # [batch, tokens, ...]
        return latents[:, TEXT_BEFORE.get(family, 0) + row * PACKED_COLUMNS.get(family, GRID[1]) + column]
    if family == "kandinsky5":  # [batch, frames, height, width, channels]
        return _patch(latents[:, frame[0]].movedim(-1, 1), row, column)
    if family == "joy-image":  # [batch, references and picture, channels, frames, height, width], its picture is first
        return _patch(latents[:, frame[0] - 1], row, column)
    return _patch(latents[:, :, frame[0]] if frame else latents, row, column)


def _patch(latents: Tensor, row: int, column: int) -> Tensor:
    size = latents.shape[-2] // GRID[0]
    return latents[..., row * size : (row + 1) * size, column * size : (column + 1) * size]


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_layout_of_every_transformer(family: str) -> None:
    check_layout(build(family), inputs_of(family, grid=GRID, batch=1), change_in(family))


class _Mill(nn.Module):
    """A user's own model of one layer: the text before the image."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = OwnAttention()

    def forward(self, latents: Tensor, text: Tensor) -> Tensor:
        return self.attn(torch.cat([text, latents.flatten(2).mT], 1))


def _read(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    return ForwardLayout(grid=tuple(arguments["latents"].shape[-2:]), text_lens=(arguments["text"].shape[1],))


def _read_width_first(model: nn.Module, arguments: Mapping[str, Any]) -> ForwardLayout:
    return replace(_read(model, arguments), grid=_read(model, arguments).grid[::-1])


def _change(arguments: Mapping[str, Any], position: Position) -> dict[str, Any]:
    latents = arguments["latents"].clone()
    latents[:, :, *position] += 1
    return {**arguments, "latents": latents}


MILL = Family(name="mill", attention=("attn",), read_layout=_read)
INPUTS = {"latents": torch.randn(1, 16, *GRID), "text": torch.randn(1, 3, 16)}


def test_own_family_passes_and_the_model_is_restored() -> None:
    model = _Mill()
    before = model(**INPUTS)
    check_layout(model, INPUTS, _change, family=MILL)
    assert type(model.attn) is OwnAttention
    assert torch.equal(model(**INPUTS), before)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            replace(MILL, text_first=False),
            r"attn: the image token at \(0, 0\) is token 0 of 38 .* changes token 3: check",
        ),
        (
            replace(MILL, read_layout=_read_width_first),
            r"at \(1, 0\) is token 8 of 38 .*grid \(7, 5\).* changes token 10: check",
        ),
    ],
)
def test_wrong_layout_is_found_and_the_model_restored(family: Family, message: str) -> None:
    model = _Mill()
    with pytest.raises(LayoutError, match=message):
        check_layout(model, INPUTS, _change, family=family)
    assert type(model.attn) is OwnAttention


def test_change_that_does_nothing_is_found() -> None:
    with pytest.raises(LayoutError, match="changing its latents changes no token"):
        check_layout(_Mill(), INPUTS, lambda arguments, position: arguments, family=MILL)


def test_converted_model_is_refused() -> None:
    model = _Mill()
    linearize_(model, Clear(radius=1), family=MILL)
    with pytest.raises(ValueError, match="call restore_ first"):
        check_layout(model, INPUTS, _change, family=MILL)
