"""Blocks of the kernels on a device: the largest that fit there, checked once against the plain formula."""

import math
from functools import lru_cache

import torch

from ..pieces.results import token_major
from ..pieces.trial import first_that_fits, relative_error
from ..window.windows import Circle
from .plain import plain_backward, plain_forward
from .triton_focus import Blocks, backward_candidates, candidates, fits, triton_backward, triton_forward

# Overlapping cells of up to 6 x 8 tokens; a window reaches some of those that are chosen.
GRID, WINDOW, NUM_CELLS, COUNT = (33, 48), Circle(radius=9.0), 49, 12
# Disjoint cells of 3 x 3 tokens, for which the backward compiles differently. A multiple of 16, for which Triton
# compiles separately: several numbers are loaded at once, and ahead, which takes more shared memory.
NUM_SMALL_CELLS = 176


@lru_cache
def blocks_for(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> Blocks:
    """The blocks of the forward, for tiles of side * side queries.

    Raises:
        RuntimeError: none fit, or the kernel is wrong there.
    """
    if not fits(side, head_dim):
        raise RuntimeError(f"a tile of {side} x {side} queries of head dimension {head_dim} is too large for a program")
    if device.type == "cpu":  # interpreted, without limits
        return candidates(side, torch.float16)[0]
    return try_blocks(device, dtype, head_dim, side)


def try_blocks(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> Blocks:
    """The largest blocks with which the forward runs and is right; raises as `blocks_for` does."""
    with torch.autocast(device.type, enabled=False):  # the first call may come from within autocast
        trials = [_Trial(device, dtype, head_dim, side, cells) for cells in (NUM_CELLS, NUM_SMALL_CELLS)]
        return first_that_fits(
            candidates(side, dtype), lambda blocks: max(trial.forward_error(blocks) for trial in trials)
        )


@lru_cache
def backward_blocks_for(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> Blocks:
    """The blocks of the backward, if `blocks_for` has found some for the forward; raises as `blocks_for` does."""
    if device.type == "cpu":
        return backward_candidates(head_dim, torch.float16)[0]
    return try_backward_blocks(device, dtype, head_dim, side)


def try_backward_blocks(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> Blocks:
    """`try_blocks` for the backward."""
    with torch.autocast(device.type, enabled=False):
        trials = [_Trial(device, dtype, head_dim, side, cells) for cells in (NUM_CELLS, NUM_SMALL_CELLS)]
        return first_that_fits(
            backward_candidates(head_dim, dtype), lambda blocks: max(trial.backward_error(blocks) for trial in trials)
        )


class _Trial:
    """A small image, and its result from plain PyTorch in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int, side: int, num_cells: int):
        generator = torch.Generator("cpu").manual_seed(0)
        lengths = (math.prod(GRID),) * 3 + (num_cells,) * 2
        *self.inputs, self.grad_out = (
            torch.randn(1, 2, length, head_dim, generator=generator, device="cpu").to(device, dtype)
            for length in (*lengths, math.prod(GRID))
        )
        self.grad_lse = self.grad_out[..., 0].float()
        self.side, self.scale = side, head_dim**-0.5
        self.floats = [one.float() for one in self.inputs]
        self.out = token_major(self.floats[0], math.prod(GRID))
        self.lse, self.chosen = plain_forward(self.floats, self.out, GRID, WINDOW, COUNT, side, self.scale)

    def forward_error(self, blocks: Blocks) -> float:
        out = token_major(self.inputs[0], math.prod(GRID))
        lse, _ = triton_forward(self.inputs, out, GRID, WINDOW, COUNT, self.side, self.scale, blocks)
        return relative_error([out, lse], [self.out, self.lse])

    def backward_error(self, blocks: Blocks) -> float:
        shape = (self.chosen, GRID, WINDOW, self.side, self.scale)
        out = self.out.to(self.grad_out.dtype)
        grads = triton_backward(self.grad_out, self.grad_lse, self.inputs, out, self.lse, *shape, blocks)
        expected = plain_backward(self.grad_out.float(), self.grad_lse, self.floats, self.out, self.lse, *shape)
        return relative_error(grads, list(expected))
