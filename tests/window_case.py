"""A problem of window attention: sizes, masks and layout, and random tensors for it."""

import math
from dataclasses import dataclass

import torch
from tolerance import assert_matches_reference
from torch import Tensor

from lineardit.kernels.window import window_attention, window_attention_reference


@dataclass(frozen=True, kw_only=True)
class Case:
    grid: tuple[int, ...]
    radius: float
    text_len: int = 0
    text_first: bool = True
    num_pooled: int = 0
    masked: bool = False
    batch: int = 1
    num_heads: int = 2
    head_dim: int = 8
    contiguous: bool = True

    def __str__(self) -> str:
        grid = "x".join(str(size) for size in self.grid)
        extras = [f"pooled{self.num_pooled}"] * bool(self.num_pooled) + ["masked"] * self.masked
        extras += ["textlast"] * (not self.text_first) + ["strided"] * (not self.contiguous)
        name = f"B{self.batch}-H{self.num_heads}-grid{grid}-r{self.radius}-text{self.text_len}"
        return "-".join([name, *extras])

    @property
    def num_tokens(self) -> int:
        return self.text_len + math.prod(self.grid)

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key, value and, where there are any, pooled key and value."""
        shape = (self.batch, self.num_heads, self.num_tokens, self.head_dim)
        if self.contiguous:
            tensors = list(torch.randn(3, *shape, dtype=dtype))
        else:  # as one projection leaves them
            fused = torch.randn(self.batch, self.num_tokens, 3, self.num_heads, self.head_dim, dtype=dtype)
            tensors = list(fused.permute(2, 0, 3, 1, 4))
        if self.num_pooled:
            tensors += torch.randn(2, self.batch, self.num_heads, self.num_pooled, self.head_dim, dtype=dtype)
        return tensors

    def text_mask(self) -> Tensor | None:
        """The last sample's text is masked whole, the others' in part."""
        if not self.masked:
            return None
        mask = torch.arange(self.text_len).repeat(self.batch, 1) % 3 > 0
        mask[-1] = False
        return mask

    def run(self, attention, *tensors: Tensor, **options) -> Tensor:
        return attention(
            *tensors[:3],
            grid=self.grid,
            radius=self.radius,
            text_len=self.text_len,
            text_first=self.text_first,
            text_mask=self.text_mask(),
            pooled=tensors[3:] or None,
            **options,
        )

    def matches_reference(self, dtype: torch.dtype, **options) -> None:
        assert_matches_reference(
            lambda *tensors: self.run(window_attention, *tensors, **options),
            lambda *tensors: self.run(window_attention_reference, *tensors),
            self.tensors(),
            dtype,
        )
