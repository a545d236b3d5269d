"""Advice on known weaknesses of a hybrid (hybrid.py) at a picture size, in sentences."""

import logging
import math
from functools import lru_cache
from typing import TYPE_CHECKING

from ...kernels.focus import cells_in_focus, sides_of_cells
from ...kernels.pieces.cells import sizes_of
from ..layout import Grid

if TYPE_CHECKING:
    from .hybrid import Hybrid

logger = logging.getLogger(__name__)

NEAR_CELLS = 2  # cells that a window should reach: with 1, the small model's pictures showed a faint grid of them


def focus_advice(config: "Hybrid", grid: Grid) -> str | None:
    """Says that `focus_tokens` has no effect at this grid; None if it has, or need not."""
    shape, (frames, height, width) = config.local.shape, sizes_of(grid)
    window_covers = shape.covers(height, width) and (shape.frame_radius is None or frames <= shape.frame_radius)
    if config.focus_tokens == 0 or window_covers or cells_in_focus(config.focus_tokens, config.num_cells, grid) > 0:
        return None
    tokens_per_cell = math.ceil(math.prod(grid) / config.num_cells)
    return (
        f"focus_tokens={config.focus_tokens} has no effect at {' x '.join(map(str, grid))} tokens: only whole cells "
        f"are in focus, and one of {config.num_cells} has {tokens_per_cell} tokens; set focus_tokens to "
        f"{tokens_per_cell} or more, or use more proxies"
    )


def proxy_advice(config: "Hybrid", grid: Grid) -> str | None:
    """Says that a grid of proxies may show in the picture; None if they are fine enough."""
    if not config.is_one_softmax:
        return None
    reaches = [config.local.shape.reach(axis, size) for axis, size in enumerate(grid[-2:])]
    sides = sides_of_cells(grid, config.num_cells)
    one_proxy_per_token = max(sides) <= 1
    if one_proxy_per_token or all(NEAR_CELLS * side <= reach for side, reach in zip(sides, reaches, strict=True)):
        return None
    return (
        f"the window reaches {min(reaches):g} tokens, and each proxy covers {sides[0]:g} x {sides[1]:g} tokens: a "
        f"faint grid of these cells may show in smooth areas; use more proxies, or a window that reaches {NEAR_CELLS} "
        "cells"
    )


@lru_cache  # once
def warn_once(warning: str) -> None:
    """Log advice once, since every attention module observes the same grids."""
    logger.warning(warning)
