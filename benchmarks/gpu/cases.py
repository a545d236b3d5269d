"""Calls of window attention on which implementations are compared."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineardit.kernels.pieces.results import dtype_name


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call.

    Attributes:
        masked: Some text tokens are masked, different ones in each sample.
        num_pooled: Number of pooled tokens that image queries see.
        token_major: Memory in the order [B, N, H, D], as diffusers passes tensors; else [B, H, N, D].
    """

    grid: tuple[int, int]
    radius: float
    text_len: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 2
    batch: int = 1
    text_first: bool = True
    masked: bool = False
    num_pooled: int = 0
    token_major: bool = False

    def __str__(self) -> str:
        parts = [f"{self.grid[0]}x{self.grid[1]}", f"radius {self.radius:g}", f"text {self.text_len}"]
        parts += [f"{self.num_heads} heads of {self.head_dim}", dtype_name(self.dtype)]
        flags = {"masked": self.masked, "text last": not self.text_first, "token-major": self.token_major}
        parts += [f"batch {self.batch}"] * (self.batch > 1) + [f"{self.num_pooled} pooled"] * (self.num_pooled > 0)
        return ", ".join([*parts, *(name for name, given in flags.items() if given)])

    def in_memory_order(self, tensor: Tensor) -> Tensor:
        """The same numbers, in the memory order of this case."""
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if self.token_major else tensor

    def inputs(self, device: torch.device) -> list[Tensor]:
        """query, key, value, and pooled key and value if there are any; new random numbers."""
        lengths = [self.text_len + self.grid[0] * self.grid[1]] * 3 + [self.num_pooled] * (2 * (self.num_pooled > 0))
        sizes = [(self.batch, self.num_heads, length, self.head_dim) for length in lengths]
        return [self.in_memory_order(torch.randn(size, dtype=self.dtype, device=device)) for size in sizes]

    def options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of `window_attention` except pooled and impl."""
        options: dict[str, Any] = {"grid": self.grid, "radius": self.radius, "text_len": self.text_len}
        options |= {"text_first": self.text_first}
        if self.masked:
            mask = torch.rand(self.batch, self.text_len, device=device) < 0.6
            options["text_mask"] = mask
        return options


HALF, FLOAT = torch.float16, torch.float32
# Ordered so that kernels compiled for one case serve the next ones.
GENERAL = (
    Case(grid=(64, 64), radius=8, text_len=512, head_dim=128),
    Case(grid=(64, 64), radius=8, text_len=512, head_dim=128, token_major=True),
    Case(grid=(48, 80), radius=16, text_len=512, head_dim=128, batch=2, token_major=True),
    Case(grid=(72, 96), radius=32, text_len=512, head_dim=128),
    Case(grid=(135, 40), radius=8, text_len=77, head_dim=128, num_heads=1),
    Case(grid=(37, 29), radius=8, text_len=77, head_dim=128, masked=True, batch=2),
    Case(grid=(37, 29), radius=8, text_len=77, head_dim=128, text_first=False, masked=True),
    Case(grid=(40, 24), radius=4, text_len=77, head_dim=128, num_pooled=60),
    Case(grid=(7, 5), radius=16, text_len=77, head_dim=128),
    Case(grid=(3, 200), radius=8, text_len=0, head_dim=128),
    Case(grid=(1, 1), radius=2.5, text_len=1, head_dim=128),
    Case(grid=(64, 64), radius=8, text_len=512, head_dim=128, dtype=HALF),
    Case(grid=(37, 29), radius=16, text_len=77, head_dim=128, dtype=HALF, token_major=True, masked=True, batch=2),
    Case(grid=(64, 64), radius=8, text_len=512, head_dim=128, dtype=FLOAT),
    Case(grid=(37, 29), radius=2.5, text_len=77, head_dim=128, dtype=FLOAT, masked=True, batch=2),
    Case(grid=(40, 56), radius=16, text_len=0, head_dim=128, dtype=FLOAT, num_pooled=35),
    Case(grid=(64, 64), radius=8, text_len=333, head_dim=64, token_major=True),
    Case(grid=(45, 33), radius=8, text_len=77, head_dim=64, dtype=HALF),
    Case(grid=(45, 33), radius=8, text_len=77, head_dim=64, dtype=FLOAT, text_first=False),
    Case(grid=(64, 40), radius=8, text_len=154, head_dim=72, num_heads=3, token_major=True),
    Case(grid=(33, 50), radius=4, text_len=77, head_dim=40, dtype=HALF, num_heads=3, token_major=True),
    Case(grid=(33, 50), radius=4, text_len=20, head_dim=16, dtype=FLOAT),
    Case(grid=(64, 64), radius=8, text_len=77, head_dim=256),
    Case(grid=(33, 50), radius=8, text_len=77, head_dim=256, dtype=FLOAT),
    Case(grid=(33, 50), radius=8, text_len=77, head_dim=80, dtype=HALF, num_heads=1),
)
# For the implementation in plain PyTorch.
PORTABLE = (
    Case(grid=(64, 64), radius=8, text_len=512, head_dim=128, token_major=True),
    Case(grid=(37, 29), radius=16, text_len=77, head_dim=72, dtype=HALF, masked=True, batch=2),
    Case(grid=(45, 33), radius=8, text_len=77, head_dim=64, dtype=FLOAT, num_pooled=35),
)
# For a smoke run.
SMOKE_CASES = (
    Case(grid=(7, 19), radius=4, text_len=5, head_dim=16, dtype=FLOAT, batch=2, masked=True, token_major=True),
    Case(grid=(16, 24), radius=2.5, text_len=0, head_dim=40, dtype=HALF, num_heads=1, num_pooled=3),
    Case(grid=(5, 7), radius=8, text_len=3, head_dim=16, num_heads=1, text_first=False),
)
