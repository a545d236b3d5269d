"""Tiny models with random weights, a line for each class, with the arguments of a forward.

A new family is a line in a table: `config` has the values that `SMALL` in tiny.py lacks or sets differently, and
`inputs` makes the arguments that `inputs_by_name` does not know or makes differently.
"""

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from .controlnets import CONTROLNETS
from .joint_latents import JOINT_LATENTS
from .latents import LATENTS
from .positions import POSITIONS
from .positions import position_ids as position_ids
from .sequences import SEQUENCES
from .tiny import Arguments, Grid, Tiny

diffusers.utils.logging.set_verbosity_error()

MODELS: dict[str, Tiny] = {**POSITIONS, **LATENTS, **JOINT_LATENTS, **SEQUENCES, **CONTROLNETS}
FIRST = ("flux", "sd3", "pixart", "unet")  # they stand for all in tests that take long
FAMILIES = tuple(name for name, tiny in MODELS.items() if hasattr(diffusers, tiny.needs))


def build(family: str, *, num_layers: int | None = None, **config: Any) -> nn.Module:
    """A model in eval mode, the same weights for the same global seed; `config` overrides the values of its line."""
    return MODELS[family].make(num_layers, **config).eval()


def inputs_of(family: str, *, grid: Grid = (5, 7), text_len: int = 3, batch: int = 2) -> Arguments:
    """Arguments of one forward."""
    return MODELS[family].arguments(grid, text_len, batch)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same arguments, floating tensors in `dtype`; position ids stay as they are."""
    return {name: value if name.endswith("_ids") else _cast(value, dtype) for name, value in arguments.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def output(model: nn.Module, arguments: Arguments) -> Tensor:
    """The model's output; several tensors (a ControlNet's residuals, Z-Image's pictures) as one row of numbers."""
    out = model(**arguments, return_dict=False)
    tensors = list(_tensors(out))
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif out is not None:
        for part in out:
            yield from _tensors(part)


def run(model: nn.Module, arguments: Arguments) -> Tensor:
    """The model's output, without gradients."""
    with torch.no_grad():
        return output(model, arguments)
