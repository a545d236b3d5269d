"""Sliding tile attention (STA, arXiv:2502.04507): softmax over all text and the tiles around the query's own tile.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in text  or  i in text  or  tile(j) in N(tile(i))

The grid is cut into tiles, the last of an axis shorter where it does not divide. N(t) is the rectangle of `window`
tiles around t, which slides inside at the border; where the grid has fewer tiles, all of them are seen. So all queries
of a tile see the same keys, and blocks of keys are read whole, without a mask. Where the paper's tiles are cubes, here
they lie in one frame, and N(t) is the same in all frames, or in those with |frame_i - frame_j| < frame_radius. The
module is `WindowAttention` (windows.py).
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
        for name in ("tile", "window"):  # lists too, as JSON has them
            object.__setattr__(self, name, as_tuples(getattr(self, name)))
        _ = self.shape  # refuses what is no box

    @property
    def shape(self) -> Box:
        """The window as kernels take it."""
        return Box(
            window=both_axes("window", self.window),
            cell=both_axes("tile", self.tile),
            frame_radius=self.frame_radius,
        )
