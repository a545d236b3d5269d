"""What a line of the table of tiny models holds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Grid = tuple[int, int]
Arguments = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A class of models.

    Attributes:
        needs: Its name in diffusers; where the installed diffusers has none, it is left out.
        make: (layers, with a default) -> the model.
        inputs: (token grid, length of the text, batch) -> arguments of a forward.
        num_attention: Self-attention modules of the image at the default number of layers.
    """

    needs: str
    make: Callable[..., nn.Module]
    inputs: Callable[[Grid, int, int], Arguments]
    num_attention: int


def awake(model: nn.Module, std: float = 0.1) -> nn.Module:
    """With numbers in place of the zeros that outputs or modulations start from, which would hide the attention."""
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=std)
    return model
