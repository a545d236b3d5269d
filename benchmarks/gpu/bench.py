"""Shared by the parts: the sizes of a run, a task, and the time that is left."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .names import SIZE_NAMES
from .records import Results


class UnavailableError(Exception):
    """This case cannot be measured here; the message says why."""


class OutOfTimeError(Exception):
    """This case did not finish in the time of its part; the next run tries it again."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a run is."""

    device: str
    dtype: torch.dtype
    sides: tuple[int, ...]  # of the square grid, in tokens
    radii: tuple[int, ...]
    text_len: int
    num_heads: int
    head_dim: int
    backend: str  # of torch.compile
    model: dict[str, Any]  # entries of FLUX.1-dev's config that are replaced
    long_side: int  # of the long run
    matmul_side: int
    copy_bytes: int
    repeats: int  # of a timing, at most
    few_cases: bool  # of correctness and of tiles
    focus_tokens: int  # of a hybrid, which has as many proxies


FULL = Scale(
    device="cuda:0",
    dtype=torch.bfloat16,
    sides=tuple(SIZE_NAMES),
    radii=(8, 16, 32),
    text_len=512,
    num_heads=24,
    head_dim=128,
    backend="inductor",
    model={},
    long_side=512,
    matmul_side=8192,
    copy_bytes=2**31,
    repeats=50,
    few_cases=False,
    focus_tokens=1024,
)
SMOKE = Scale(
    device="cpu",
    dtype=torch.float32,
    sides=(16,),
    radii=(3,),
    text_len=128,
    num_heads=1,
    head_dim=16,
    backend="eager",
    model={
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 4, 8],
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
    long_side=24,
    matmul_side=64,
    copy_bytes=2**16,
    repeats=1,
    few_cases=True,
    focus_tokens=64,
)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One part of a run."""

    scale: Scale
    results: Results
    deadline: float  # of time.monotonic()

    @property
    def impl(self) -> str:
        """The implementation under test."""
        return self.results.head.impl

    @property
    def device(self) -> torch.device:
        return torch.device(self.scale.device)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Measurement:
    figures: dict[str, float]
    note: str = ""
    passed: bool = True


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row to be measured."""

    part: str
    case: str
    impl: str
    measure: Callable[[], Measurement]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.case, self.impl


Tasks = Iterator[Task]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One attention call on a square picture, text before the image."""

    side: int
    radius: int
    text_len: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def image_len(self) -> int:
        return self.side**2

    @property
    def num_tokens(self) -> int:
        return self.text_len + self.image_len

    def tensors(self, device: torch.device, *, count: int = 3, requires_grad: bool = False) -> list[Tensor]:
        """`count` tensors [1, H, N, D] of new random numbers."""
        size = (1, self.num_heads, self.num_tokens, self.head_dim)
        return [torch.randn(size, dtype=self.dtype, device=device, requires_grad=requires_grad) for _ in range(count)]


def shape_of(scale: Scale, side: int, radius: int) -> Shape:
    return Shape(
        side=side,
        radius=radius,
        text_len=scale.text_len,
        num_heads=scale.num_heads,
        head_dim=scale.head_dim,
        dtype=scale.dtype,
    )
