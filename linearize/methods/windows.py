"""The module of all methods that are softmax over all text and a window of the image, which the config defines.

B batch, H heads, N tokens (text_len + frames * height * width), n of them of the image, D head dimension.
"""

from typing import Any, Protocol

from torch import Tensor

from ...kernels.pieces.cells import sizes_of
from ...kernels.window import (
    Window,
    choose_impl,
    implementations,
    windowed_attention,
    windowed_attention_and_lse,
)
from ..errors import LayoutError
from ..layout import Grid, Layout
from .method import Method

Pair = int | tuple[int, int]  # one number for both axes, or (along the height, along the width)


class WindowConfig(Protocol):
    """A config of such a method."""

    @property
    def shape(self) -> Window:
        """Which tokens of the image a query sees, a circle or a box."""


class WindowAttention(Method):
    """Attention in a window as the kernel of one attention module."""

    shared_across_heads = True

    def __init__(self, config: WindowConfig, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        self.window = config.shape

    @staticmethod
    def implementations() -> tuple[str, ...]:
        """Names that `impl` may take."""
        return ("auto", *implementations())

    @staticmethod
    def auto_impl(config: WindowConfig, query: Tensor, grid: Grid, text_len: int) -> str:
        """What impl="auto" runs for a query [B, H, N, D]."""
        return choose_impl(query, grid=grid, window=config.shape, text_len=text_len)

    @staticmethod
    def pairs(config: Any, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """Pairs of query and key in one call: window and text for the image, everything for the text."""
        frame_radius = config.shape.frame_radius
        frames, height, width = _with_frames(frame_radius, grid)
        image_len = frames * height * width
        window = config.shape.num_pairs(height, width) * _num_frame_pairs(frame_radius, frames)
        return window + image_len * text_len + text_len * (text_len + image_len)

    def prepare_for(self, grid: Grid) -> None:
        """As `Method.prepare_for`.

        Raises:
            LayoutError: frame_radius in a model of single pictures.
        """
        _with_frames(self.window.frame_radius, grid)

    def is_exact(self, layout: Layout) -> bool:
        """Whether this is the model's own softmax attention over everything."""
        frames, height, width = _with_frames(self.window.frame_radius, layout.grid)
        sees_frames = self.window.frame_radius is None or frames <= self.window.frame_radius
        return self.window.covers(height, width) and sees_frames

    def pooled(self, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor] | None:
        """More keys and values that the image sees, [B, H, P, D] each."""
        return None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float | None = None
    ) -> Tensor:
        """[B, H, N, D] -> [B, H, N, D]."""
        return windowed_attention(
            query,
            key,
            value,
            grid=layout.grid,
            window=self.window,
            text_len=layout.text_len,
            text_first=layout.text_first,
            text_mask=layout.text_mask,
            pooled=self.pooled(key, value, layout),
            scale=scale,
            impl=self.impl,
        )

    def attend_and_lse(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`forward` without pooled tokens, and the log-sum-exp of the logits of each image query, [B, H, n]."""
        return windowed_attention_and_lse(
            query,
            key,
            value,
            grid=layout.grid,
            window=self.window,
            text_len=layout.text_len,
            text_first=layout.text_first,
            text_mask=layout.text_mask,
            scale=scale,
            impl=self.impl,
        )


def _with_frames(frame_radius: int | None, grid: Grid) -> Grid:
    """A grid as (frames, height, width), one frame for a picture, for which a frame_radius is a LayoutError."""
    if frame_radius is not None and len(grid) == 2:
        raise LayoutError(
            f"frame_radius={frame_radius} is for models with several frames, got a grid of {tuple(grid)}: "
            "leave frame_radius out"
        )
    return sizes_of(grid)


def _num_frame_pairs(frame_radius: int | None, frames: int) -> int:
    """Pairs of a frame and one that it sees: |frame_i - frame_j| < frame_radius."""
    reach = min(frame_radius or frames, frames) - 1
    return frames * (2 * reach + 1) - reach * (reach + 1)


def both_axes(name: str, value: Pair) -> tuple[int, int]:
    """A setting for both axes as two numbers, (along the height, along the width).

    Raises:
        ValueError: neither an integer >= 1 nor two of them.
    """
    pair = value if isinstance(value, tuple) else (value, value)
    if len(pair) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(
            f"{name} must be an integer >= 1, or two of them (along the height, along the width), got {value!r}"
        )
    return pair
