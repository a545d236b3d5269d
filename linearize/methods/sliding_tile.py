"""Sliding tile attention (STA, arXiv:2502.04507): softmax over all text and the tiles around the query's own tile.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in text  or  i in text  or  tile(j) in N(tile(i))

The grid is cut into tiles, the last one of an axis shorter if the side is not a multiple. N(t) is the rectangle of
`window` tiles around t, shifted inward at the border; if the grid has fewer tiles, it is all of them. So all queries of
a tile see the same keys, and blocks of keys are read whole, without a mask. The paper's tiles are cubes; here a tile is
within one frame, and N(t) is the same in all frames, or in those with |frame_i - frame_j| < frame_radius. The module is
`WindowAttention` (windows.py).
"""

from dataclasses import dataclass

from ...kernels.window import Box
from .field_checks import as_tuples
from .windows import Pair, both_axes


@dataclass(frozen=True, kw_only=True)
class SlidingTile:
    """Config of sliding tile attention. A pair is (height, width); a single number applies to both.

    Attributes:
        tile: Side lengths in tokens.
        window: Full side lengths in tiles, odd.
        frame_radius: In frames of a video, strict: |frame_i - frame_j| < frame_radius; None: all frames.
    """

    tile: Pair
    window: Pair
    frame_radius: int | None = None

    def __post_init__(self) -> None:
        for name in ("tile", "window"):  # JSON gives lists
            object.__setattr__(self, name, as_tuples(getattr(self, name)))
        _ = self.shape  # raises if it is not a valid box

    @property
    def shape(self) -> Box:
        """The window as kernels take it."""
        return Box(
            window=both_axes("window", self.window),
            cell=both_axes("tile", self.tile),
            frame_radius=self.frame_radius,
        )
