"""Whether a family's layout is right: does each latent reach the token where the layout has it?"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .convert import linearize_, restore_, swapped
from .errors import LayoutError
from .families import Family
from .layout import Grid, Layout
from .methods import Clear

Position = tuple[int, ...]  # (row, column), or (frame, row, column)
Calls = dict[str, tuple[Tensor, Layout]]  # by module: its values [B, H, N, D] and its layout
_SMALL = 1e-3  # a token that changes by less than this share of the largest change has not changed


def check_layout(
    model: nn.Module,
    arguments: Mapping[str, Any],
    change: Callable[[Mapping[str, Any], Position], Mapping[str, Any]],
    *,
    family: Family | None = None,
) -> None:
    """Check a family of your own: a wrong layout (height and width swapped, text on the wrong side) runs as well.

    The model is converted, run with the latents of one token changed, and restored. All attention gives zeros, so a
    token cannot change another one, and each module must see exactly the token change that its layout says.

    Args:
        model: In eval mode, not converted. Its latents must not be mixed before attention, as a UNet's convolutions do.
        arguments: Those of one forward, by name, for a small picture that is not square (or a swap of height and width
            cannot show), at least 2 tokens a side, with text.
        change: (arguments, position) -> arguments in which only the latents of the image token at this position differ:
            (row, column), or (frame, row, column) if the layout's grid has frames. It must not modify the given ones.
        family: As in `linearize_`.
    Raises:
        LayoutError: another token changed than the layout says; the message names both.
        ValueError: the model is already converted.
    """
    if swapped(model):
        raise ValueError("check_layout converts the model itself: call restore_ first")
    linearize_(model, Clear(radius=1), family=family)
    try:
        with torch.no_grad(), _recorded_calls(model) as calls:
            model(**arguments)
            before = dict(calls)
            for grid in dict.fromkeys(layout.grid for _, layout in before.values()):
                for position in _positions(grid):
                    calls.clear()
                    model(**change(arguments, position))
                    for name, (value, layout) in before.items():
                        if layout.grid == grid:
                            _check_changed(name, value, calls[name][0], layout, position)
    finally:
        restore_(model)


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[Calls]:
    """Context manager in which converted attention gives zeros; its value fills with the calls of each forward."""
    calls: Calls = {}
    handles = []
    for name, module in swapped(model).items():

        def record(_: nn.Module, inputs: tuple[Any, ...], out: Tensor, name: str = name) -> Tensor:
            _, _, value, layout = inputs
            calls[name] = value, layout
            return torch.zeros_like(out)

        handles.append(cast(nn.Module, module.linear_kernel).register_forward_hook(record))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _positions(grid: Grid) -> list[Position]:
    """Tokens of the last frame that tell the axes apart; a grid whose sides are swapped has the first two as well."""
    *frames, height, width = grid
    return [(*(size - 1 for size in frames), *at) for at in ((0, 0), (1, 0), (0, width - 1), (height - 1, 0))]


def _check_changed(name: str, before: Tensor, after: Tensor, layout: Layout, position: Position) -> None:
    """Raise a LayoutError unless exactly the token that the layout has at `position` has changed."""
    start = layout.text_len if layout.text_first else 0
    expected = start + sum(at * math.prod(layout.grid[axis + 1 :]) for axis, at in enumerate(position))
    difference = (after - before).abs().float().amax((0, 1, 3))  # of each token
    changed = (difference > _SMALL * difference.max()).nonzero().flatten().tolist()
    if changed != [expected]:
        side = "before" if layout.text_first else "after"
        raise LayoutError(
            f"{name}: the image token at {position} is token {expected} of {len(difference)} in the layout (grid "
            f"{layout.grid}, {layout.text_len} other tokens {side} it), but changing its latents changes "
            f"{_tokens(changed)}: check read_layout's order of height and width, and the family's text_first"
        )


def _tokens(changed: list[int]) -> str:
    if not changed:
        return "no token"
    if len(changed) == 1:
        return f"token {changed[0]}"
    return f"{len(changed)} tokens ({', '.join(map(str, changed[:3]))}, ...)"
