"""Tiles of the Triton kernels on a device: the largest that fit there, checked once against the plain formula; in half
precision, the fastest of these. The backward is tried when the first gradient is needed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pieces.results import token_major
from ..pieces.trial import device_seconds, fastest_that_fits, first_that_fits, relative_error
from .inputs import Inputs
from .partial import PLAIN, Keys, attention_bias
from .reference import window_mask
from .triton_window import BACKWARD_TILES, FORWARD_TILES, Tiles, candidates, triton_backward, triton_forward
from .windows import Circle

logger = logging.getLogger(__name__)

GRID, WINDOW, NUM_SHARED = (35, 40), Circle(radius=14.0), 77
RACED_DTYPES = (torch.bfloat16, torch.float16)  # where speed matters; each tile shape takes a second to compile
# The race: FLUX.1 at 1024 x 1024 with CLEAR's window, and four times the heads: a call takes longer than its launch.
RACE_GRID, RACE_WINDOW, RACE_SHARED, RACE_HEADS = (64, 64), Circle(radius=16.0), 512, 96


@lru_cache
def forward_tiles_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles of the forward.

    Raises:
        RuntimeError: no tiles fit, or the kernel is wrong there.
    """
    return _tiles_for(device, dtype, head_dim, FORWARD_TILES, _Trial.forward_error, _Race.forward_seconds)


@lru_cache
def backward_tiles_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles that the backward's three kernels share; raises as `forward_tiles_for` does."""
    return _tiles_for(device, dtype, head_dim, BACKWARD_TILES, _Trial.backward_error, _Race.backward_seconds)


def _tiles_for(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tiles: tuple[Tiles, ...],
    error_of: Callable[["_Trial", Tiles], float],
    seconds_of: Callable[["_Race", Sequence[Tiles]], Mapping[Tiles, float]],
) -> Tiles:
    if device.type == "cpu":  # interpreted, without limits
        return candidates(tiles, head_dim, 90, torch.float16)[0]
    major, minor = torch.cuda.get_device_capability(device)
    fitting = candidates(tiles, head_dim, 10 * major + minor, dtype)
    with torch.autocast(device.type, enabled=False), torch.cuda.device(device):  # the reference is float32
        error = partial(error_of, _Trial(device, dtype, head_dim))
        if dtype not in RACED_DTYPES:
            return first_that_fits(fitting, error)
        fastest, raced = fastest_that_fits(fitting, error, partial(seconds_of, _Race(device, dtype, head_dim)))
    where = f"{torch.cuda.get_device_name(device)}, {dtype}, head dimension {head_dim}"
    name = "Window attention" if tiles is FORWARD_TILES else "Gradients of window attention"
    logger.info("%s on %s: %s (%s)", name, where, fastest, raced)
    return fastest


class _Trial:
    """A small window with tiles inside and on the border, whole blocks of shared keys and a partial one."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int):
        generator = torch.Generator("cpu").manual_seed(0)
        self.num_tokens, self.scale = GRID[0] * GRID[1], head_dim**-0.5

        def random(length: int) -> Tensor:
            return torch.randn(1, 1, length, head_dim, generator=generator, device="cpu").to(device, dtype)

        lengths = (self.num_tokens, self.num_tokens, self.num_tokens, NUM_SHARED, NUM_SHARED)
        query, key, value, shared_key, shared_value = map(random, lengths)
        self.inputs = Inputs(query, key, value, shared_key, shared_value, shared_mask=None)
        self.grad_out = random(self.num_tokens)
        mask = F.pad(window_mask(GRID, WINDOW, 0, True, device), (0, NUM_SHARED), value=True)
        self.query = query.float()
        self.keys = Keys(
            torch.cat([key, shared_key], 2).float(),
            torch.cat([value, shared_value], 2).float(),
            attention_bias(mask, torch.float32),
        )
        self.out, self.lse = PLAIN.forward(self.query, self.keys, self.scale)

    def forward_error(self, tiles: Tiles) -> float:
        out = token_major(self.inputs.query, self.num_tokens)
        lse = triton_forward(self.inputs, out, GRID, WINDOW, self.scale, tiles)
        return relative_error([out, lse], [self.out, self.lse])

    def backward_error(self, tiles: Tiles) -> float:
        out = self.out.to(self.grad_out.dtype)
        grads = triton_backward(self.grad_out, self.inputs, out, self.lse, None, GRID, WINDOW, self.scale, tiles)
        expected = PLAIN.backward(self.grad_out.float(), self.query, self.keys, self.out, self.lse, self.scale, None)
        grad_query, *grad_keys = expected
        image, shared = zip(*(grad.split([self.num_tokens, NUM_SHARED], 2) for grad in grad_keys), strict=True)
        return relative_error(grads, [grad_query, *image, *shared])


class _Race:
    """Inputs of a common size, only for timing; made when first needed."""

    def __init__(self, device: torch.device, dtype: torch.dtype, head_dim: int):
        self.device, self.dtype, self.head_dim = device, dtype, head_dim

    @cached_property
    def inputs(self) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(0)  # leaves the user's generator alone
        num_tokens = RACE_GRID[0] * RACE_GRID[1]
        lengths = (num_tokens, num_tokens, num_tokens, RACE_SHARED, RACE_SHARED)
        like: dict[str, Any] = {"generator": generator, "device": self.device, "dtype": self.dtype}
        query, key, value, shared_key, shared_value = (
            torch.randn(1, RACE_HEADS, length, self.head_dim, **like) for length in lengths
        )
        return Inputs(query, key, value, shared_key, shared_value, shared_mask=None)

    def forward_seconds(self, candidates: Sequence[Tiles]) -> Mapping[Tiles, float]:
        out = token_major(self.inputs.query, self.inputs.query.shape[2])
        shape = (RACE_GRID, RACE_WINDOW, self.head_dim**-0.5)
        return device_seconds({tiles: partial(triton_forward, self.inputs, out, *shape, tiles) for tiles in candidates})

    def backward_seconds(self, candidates: Sequence[Tiles]) -> Mapping[Tiles, float]:
        query = self.inputs.query
        lse = query.new_zeros(query.shape[:3], dtype=torch.float32)  # not the true one: it does not affect the time
        arguments = (query, self.inputs, query, lse, None, RACE_GRID, RACE_WINDOW, self.head_dim**-0.5)
        return device_seconds({tiles: partial(triton_backward, *arguments, tiles) for tiles in candidates})
