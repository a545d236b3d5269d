"""Which implementation of window attention runs."""

import logging
import math
import os
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..pieces.cells import Grid, sizes_of
from .tiled import query_tile
from .windows import Window, mean_reach

if TYPE_CHECKING:
    from .triton_window import Tiles

logger = logging.getLogger(__name__)

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_DIM = 256


def implementations() -> tuple[str, ...]:
    """Values of `impl` other than "auto"."""
    return ("reference", "masked", "tiled", "triton")


def choose_impl(query: Tensor, *, grid: Grid, window: Window, text_len: int) -> str:
    """The implementation that impl="auto" runs, for a query [..., head_dim] on its device.

    1. On CUDA: "triton" if its kernels run and agree with the reference; otherwise "tiled", with a warning.
    2. On devices other than the CPU, and when traced by `torch.compile` (one graph for all grids): "tiled".
    3. "masked" where tiles save less than their overhead: up to 576 image tokens, and up to 4096 if a tile reads more
       than 45% of all keys. Measured on a CPU, 4 to 32 heads, radius 4 to 32.
    4. Otherwise "tiled".
    """
    if query.device.type == "cuda":
        return "tiled" if why_not_triton(query.device, query.dtype, query.shape[-1]) else "triton"
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return "tiled"
    return _choose_on_cpu(tuple(grid), window, text_len)


@lru_cache
def _choose_on_cpu(grid: Grid, window: Window, text_len: int) -> str:
    image_len = math.prod(grid)
    if image_len > 4096:
        return "tiled"
    frames, height, width = sizes_of(grid)
    rows, columns = query_tile(window, height, width)
    frames_read = mean_reach(frames, 1, (window.frame_radius or frames) - 1)
    read = frames_read * window.keys_read(0, height, rows) * window.keys_read(1, width, columns)
    return "masked" if image_len <= 576 or read + text_len > 0.45 * (image_len + text_len) else "tiled"


def require_triton(query: Tensor) -> None:
    """Raise a ValueError if impl="triton" cannot run."""
    reason = why_not_triton(query.device, query.dtype, query.shape[-1])
    if reason:
        others = ", ".join(name for name in implementations() if name != "triton")
        raise ValueError(f"impl='triton' cannot run here: {reason}; use one that runs anywhere: {others}")


@torch.compiler.assume_constant_result  # devices do not change under a compiled graph
def why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot run, None if they can. The first call on a device tries them."""
    return _why_not_triton(device, dtype, head_dim)


@lru_cache  # one trial, and one warning, for each device, dtype and head dimension
def _why_not_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"it needs a CUDA device, got {device.type}"
    if dtype not in TRITON_DTYPES:
        return f"it takes {', '.join(map(str, TRITON_DTYPES))}, got {dtype}"
    if head_dim > MAX_TRITON_HEAD_DIM:
        return f"it takes head dimensions up to {MAX_TRITON_HEAD_DIM}, got {head_dim}"
    if find_spec("triton") is None:
        reason = "triton is not installed"
    else:
        from ..pieces.trial import NO_KERNEL
        from .triton_probe import forward_tiles_for

        try:
            forward_tiles_for(device, dtype, head_dim)
        except torch.OutOfMemoryError:
            raise  # temporary: the next call tries again
        except NO_KERNEL as exception:
            reason = f"{device_text(device)}: {exception}"
        else:
            return None
    logger.warning("Window attention falls back to plain PyTorch, which is slower: %s", reason)
    return reason


@lru_cache
def backward_tiles(device: torch.device, dtype: torch.dtype, head_dim: int) -> "Tiles | None":
    """The tiles of the backward's kernels on a device, found when the first gradient is needed there.

    None, with a warning, if none can run: plain PyTorch computes the gradients.
    """
    from ..pieces.trial import find_or_warn
    from .triton_probe import backward_tiles_for

    find = partial(backward_tiles_for, device, dtype, head_dim)
    return find_or_warn(find, "Gradients of window attention", device_text(device))


def device_text(device: torch.device) -> str:
    """Where kernels would run, as warnings say it."""
    return "in Triton's interpreter" if device.type == "cpu" else f"on {torch.cuda.get_device_name(device)}"
