"""CLEAR's implementation as a method of linearize: one FlexAttention call over row-major tokens, text included."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lineardit.linearize.layout import Grid, Layout
from lineardit.linearize.methods import METHODS, Clear, ClearAttention, Method

from .flex_window import analytic_block_mask, row_major, row_major_mask_mod


@dataclass(frozen=True, kw_only=True)
class RowMajorFlex:
    """Settings: the radius, and the length of the text, which CLEAR fixes too."""

    radius: int
    text_len: int


class RowMajorFlexAttention(Method):
    """A converted module's `linear_kernel`."""

    def __init__(self, config: RowMajorFlex, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        self.block_mask: BlockMask | None = None
        self.register_buffer("place", torch.empty(0), persistent=False)  # holds the device

    @staticmethod
    def implementations() -> tuple[str, ...]:
        return ("auto",)

    @staticmethod
    def auto_impl(config: RowMajorFlex, query: Tensor, grid: Grid, text_len: int) -> str:
        return "auto"

    @staticmethod
    def pairs(config: RowMajorFlex, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        clear = Clear(radius=config.radius)
        return ClearAttention.pairs(clear, grid, text_len, num_heads=num_heads, head_dim=head_dim)

    def prepare_for(self, grid: Grid) -> None:
        """Build the mask of a new grid, outside traced code."""
        place = self.get_buffer("place")
        self.block_mask = _block_mask(grid[-2:], self.config, place.device)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] -> [B, H, N, D]."""
        out = flex_attention(query, key, value, block_mask=self.block_mask, scale=scale)
        assert isinstance(out, Tensor)
        return out


@lru_cache(maxsize=2)
def _block_mask(grid: tuple[int, int], config: RowMajorFlex, device: torch.device) -> BlockMask:
    """The block mask, shared by all layers."""
    mask_mod = row_major_mask_mod(grid[1], config.radius, config.text_len)
    return analytic_block_mask(row_major(grid), config.radius, config.text_len, mask_mod, device, text_queries=True)


def register() -> None:
    """Make `linearize_(model, RowMajorFlex(...))` work."""
    METHODS[RowMajorFlex] = RowMajorFlexAttention
