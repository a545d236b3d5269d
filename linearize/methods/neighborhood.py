"""Neighborhood attention (NAT, arXiv:2204.07143; dilated, DiNA, arXiv:2209.15001): softmax over all text and a
rectangle of image tokens around the query's own.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in text  or  i in text  or  j in N(i)

N(i) is, on each axis separately, the `window` positions nearest to i in steps of `dilation`. At the border it shifts
inward, so that every image token sees window_height * window_width tokens; if the grid has fewer positions, it is all
of them. In a video, N(i) is the same in all frames, or in those with |frame_i - frame_j| < frame_radius. The module is
`WindowAttention` (windows.py).
"""

from dataclasses import dataclass

from ...kernels.window import Box
from .field_checks import as_tuples
from .windows import Pair, both_axes


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """Config of neighborhood attention. A pair is (height, width); a single number applies to both.

    Attributes:
        window: Full side lengths in tokens, odd (NATTEN's `kernel_size`).
        dilation: Step in tokens between the keys of a window; a query sees `window` keys per axis.
        frame_radius: In frames of a video, strict: |frame_i - frame_j| < frame_radius; None: all frames.
    """

    window: Pair
    dilation: Pair = 1
    frame_radius: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "dilation"):  # JSON gives lists
            object.__setattr__(self, name, as_tuples(getattr(self, name)))
        _ = self.shape  # raises if it is not a valid box

    @property
    def shape(self) -> Box:
        """The window as kernels take it."""
        return Box(
            window=both_axes("window", self.window),
            dilation=both_axes("dilation", self.dilation),
            frame_radius=self.frame_radius,
        )
