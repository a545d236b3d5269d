"""Which blocks the kernel takes on a device: the largest that fit there, tried once against the plain formula."""

import math
from functools import lru_cache

import torch

from ..pieces.trial import first_that_fits, relative_error
from ..window.inputs import token_major
from ..window.windows import Circle
from .plain import plain_forward
from .triton_focus import Blocks, candidates, fits, triton_forward

# Cells of 5 x 6 and fewer tokens, which overlap; a window reaches some of those that are chosen.
GRID, WINDOW, NUM_CELLS, COUNT = (33, 40), Circle(radius=9.0), 49, 12


@lru_cache
def blocks_for(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> Blocks:
    """For tiles of side * side queries.

    Raises:
        RuntimeError: none fit, or the kernel is wrong there.
    """
    if not fits(side, head_dim):
        raise RuntimeError(f"a tile of {side} x {side} queries of head dimension {head_dim} is too large for a program")
    if device.type == "cpu":  # interpreted, without limits
        return candidates(side)[0]
    return try_blocks(device, dtype, head_dim, side)


def try_blocks(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> Blocks:
    """The trial itself; raises as `blocks_for` does."""
    generator = torch.Generator().manual_seed(0)
    lengths = (math.prod(GRID),) * 3 + (NUM_CELLS,) * 2
    inputs = [torch.randn(1, 1, length, head_dim, generator=generator).to(device, dtype) for length in lengths]
    shape = (GRID, WINDOW, COUNT, side, head_dim**-0.5)
    expected = token_major(inputs[0].float(), math.prod(GRID))

    def error_of(blocks: Blocks) -> float:
        out = token_major(inputs[0], math.prod(GRID))
        computed_lse, _ = triton_forward(inputs, out, *shape, blocks)
        return relative_error([out, computed_lse], [expected, lse])

    with torch.autocast(device.type, enabled=False):  # the first call may come from inside of one
        lse, _ = plain_forward([one.float() for one in inputs], expected, *shape)
        return first_that_fits(candidates(side), error_of)
