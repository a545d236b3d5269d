"""Which implementation of window attention runs."""

import math

import torch
from torch import Tensor

from .tiled import tile_shape


def implementations() -> tuple[str, ...]:
    """Names that `impl` takes beside "auto"."""
    return ("reference", "masked", "tiled")


def choose_impl(query: Tensor, *, grid: tuple[int, ...], radius: float, text_len: int) -> str:
    """The implementation that impl="auto" runs, for a query of any shape on its device.

    1. Not on a CPU, or traced by `torch.compile`, so that one graph serves all grids: "tiled".
    2. "masked" where tiles would save too little for the work they make: up to 256 image tokens, and up to 4096 of them
       where a tile reads more than 65% of all keys. Measured on 2 cores, 4 heads of 64, radius 4 to 32.
    3. Else "tiled".
    """
    image_len = math.prod(grid)
    if torch.compiler.is_compiling() or query.device.type != "cpu" or image_len > 4096:
        return "tiled"
    height, width = grid[-2:]
    rows, columns = tile_shape(height, width, radius)
    reach = math.ceil(radius) - 1
    frames = image_len // (height * width)
    read = frames * _mean_reach(height, rows, reach) * _mean_reach(width, columns, reach)
    return "masked" if image_len <= 256 or read + text_len > 0.65 * (image_len + text_len) else "tiled"


def _mean_reach(size: int, side: int, reach: int) -> float:
    """Tokens of one axis that its tiles see, on average."""
    starts = range(0, size, side)
    return sum(min(start + side + reach, size) - max(start - reach, 0) for start in starts) / len(starts)
