"""Which implementation of focus runs."""

import logging
import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..pieces.cells import Grid, cell_grid, sizes_of
from ..window.choose import device_text, why_not_triton

if TYPE_CHECKING:
    from .triton_focus import Blocks

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("plain", "triton")
# The kernels divide by multiplying with an inverse, which is exact if dividend * divisor is less than this.
EXACT_BELOW = 2**31


def choose_impl(query: Tensor, side: int, impl: str) -> str:
    """The implementation that `impl` runs, for a query [..., head_dim] on its device and tiles of side * side queries.

    "auto" is "triton" on a CUDA device where the kernel runs and agrees with "plain"; else "plain", with a warning.

    Raises:
        ValueError: impl="triton" cannot run.
    """
    if impl == "plain" or (impl == "auto" and query.device.type != "cuda"):
        return "plain"
    reason = why_not(query.device, query.dtype, query.shape[-1], side)
    if reason is None:
        return "triton"
    if impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {reason}; use 'plain', which runs anywhere")
    return "plain"


@torch.compiler.assume_constant_result  # devices do not change under a compiled graph
def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> str | None:
    """Why the kernel cannot run, None if it can. The first call on a device tries it."""
    return why_not_triton(device, dtype, head_dim) or _why_not(device, dtype, head_dim, side)


@lru_cache  # one trial, and one warning, for the same arguments
def _why_not(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> str | None:
    from ..pieces.trial import NO_KERNEL

    try:
        blocks_for(device, dtype, head_dim, side)
    except torch.OutOfMemoryError:
        raise  # temporary: the next call tries again
    except NO_KERNEL as exception:
        reason = f"{device_text(device)}: {exception}"
        logger.warning("Tokens in focus fall back to plain PyTorch, which is slower: %s", reason)
        return reason
    return None


@lru_cache
def backward_blocks(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> "Blocks | None":
    """The blocks of the backward's kernels on a device, found when the first gradient is needed there.

    None, with a warning, if none can run: plain PyTorch computes the gradients.
    """
    from ..pieces.trial import find_or_warn
    from .triton_probe import backward_blocks_for

    find = partial(backward_blocks_for, device, dtype, head_dim, side)
    return find_or_warn(find, "Gradients of tokens in focus", device_text(device))


@lru_cache
def division_is_exact(grid: Grid, num_cells: int, count: int) -> bool:
    """Whether the kernels can divide by multiplying (`EXACT_BELOW`), for this grid and the tokens of `count` cells.

    If not, plain PyTorch computes the call, with a warning.
    """
    _, height, width = sizes = sizes_of(grid)
    cell_len = math.prod(-(-size // num) + 1 for size, num in zip(sizes, cell_grid(*sizes, num_cells), strict=True))
    if max(math.prod(grid) * max(height, width), (count + 1) * cell_len**2) < EXACT_BELOW:
        return True
    logger.warning("Tokens in focus fall back to plain PyTorch, which is slower: a grid of %s is too large", grid)
    return False


def blocks_for(device: torch.device, dtype: torch.dtype, head_dim: int, side: int) -> "Blocks":
    """The blocks of the forward kernel on a device.

    Raises:
        RuntimeError: none fit, or the kernel is wrong there.
    """
    from .triton_probe import blocks_for

    return blocks_for(device, dtype, head_dim, side)
