"""Local attention (CLEAR, arXiv:2412.16112): softmax over all text and the image tokens nearer than `radius`.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in text  or  i in text  or  |pos_i - pos_j| < radius

In a video, pos is the position in a frame, and |frame_i - frame_j| < frame_radius holds as well. With pooling, image
queries also see one key and value for each cell of the grid, in every frame, for distant content:

    pooled_c = sum_t w_t k_t / sum_t w_t * sum(w),   t in cell c; tokens missing from a cell at the border drop out

`WindowAttention` (windows.py) implements the window; this module adds the pooling.

B batch, H heads, D head dimension, C cells of all frames.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels.window import Circle
from ..layout import Grid, Layout, as_shape
from .field_checks import check_count
from .pooling import cell_side, count_cells, mean_pool, weighted_pool
from .windows import WindowAttention


@dataclass(frozen=True, kw_only=True)
class Clear:
    """Config of local attention.

    Attributes:
        radius: In image tokens, Euclidean, strict: distance < radius (CLEAR's `window_size`).
        pool_size: Side of the pooled cells, with learned weights (CLEAR's `down_factor`); cost N^2 / pool_size^2.
        pool_tokens: Maximum number of cells, pooled by their mean; their side grows with the image, so cost is linear.
        frame_radius: In frames of a video, strict: |frame_i - frame_j| < frame_radius; None: all frames.
    """

    radius: float
    pool_size: int | None = None
    pool_tokens: int | None = None
    frame_radius: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.radius, bool) or not isinstance(self.radius, int | float):
            raise ValueError(f"radius must be a number of tokens, got {self.radius!r}")
        if not (0 < self.radius < math.inf):
            raise ValueError(f"radius must be > 0 and finite, got {self.radius}")
        if self.pool_size is not None and self.pool_tokens is not None:
            raise ValueError(f"give pool_size or pool_tokens, not both, got {self.pool_size} and {self.pool_tokens}")
        check_count("pool_size", self.pool_size, least=2, optional=True)
        check_count("pool_tokens", self.pool_tokens, optional=True)
        check_count("frame_radius", self.frame_radius, optional=True)

    @property
    def shape(self) -> Circle:
        """The window as kernels take it."""
        return Circle(radius=self.radius, frame_radius=self.frame_radius)


class ClearAttention(WindowAttention):
    """Local attention as the kernel of one attention module; `pool_weight` [p, p] when cells have learned weights."""

    def __init__(self, config: Clear, *, num_heads: int, head_dim: int) -> None:
        super().__init__(config, num_heads=num_heads, head_dim=head_dim)
        self._cells: Tensor | None = None
        if config.pool_size is not None:
            self.pool_weight = nn.Parameter(torch.full((config.pool_size,) * 2, 1 / config.pool_size**2))

    def prepare_for(self, grid: Grid) -> None:
        """As `Method.prepare_for`: the cells become a shape, which a trace keeps symbolic.

        Raises:
            LayoutError: frame_radius in a model of single pictures, or more frames than pool_tokens.
        """
        super().prepare_for(grid)
        cells = _cells(self.config, grid)
        if cells is not None:
            self._cells = as_shape(*cells)

    def is_exact(self, layout: Layout) -> bool:
        """Whether this is the model's own softmax attention over everything."""
        return not self._pools() and super().is_exact(layout)

    @staticmethod
    def pairs(config: Clear, grid: Grid, text_len: int, *, num_heads: int, head_dim: int) -> int:
        """The pairs of the window, and of each image token with each cell."""
        _, num_cells = _cells(config, grid) or (0, 0)
        window = WindowAttention.pairs(config, grid, text_len, num_heads=num_heads, head_dim=head_dim)
        return window + math.prod(grid) * num_cells

    def pooled(self, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the cells, each [B, H, C, D]."""
        if not self._pools():
            return None
        assert self._cells is not None, "the seam sets the grid before each call"
        side, num_cells = self._cells.shape
        start = layout.text_len if layout.text_first else 0
        image = slice(start, start + layout.num_image_tokens)
        parts = key[:, :, image], value[:, :, image]
        if self.config.pool_size is not None:
            pooled = weighted_pool(parts, self.pool_weight, layout.grid, num_cells)
        else:
            pooled = mean_pool(parts, side, layout.grid, num_cells)
        return pooled[0], pooled[1]

    def _pools(self) -> bool:
        return self.config.pool_size is not None or self.config.pool_tokens is not None


def _cells(config: Clear, grid: Grid) -> tuple[int, int] | None:
    """Side and number of the pooled cells; None without pooling."""
    if config.pool_tokens is not None:
        side = cell_side(grid, config.pool_tokens)
    elif config.pool_size is not None:
        side = config.pool_size
    else:
        return None
    return side, count_cells(grid, side)
