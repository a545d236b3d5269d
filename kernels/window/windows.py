"""Windows: which image tokens an image query sees within a frame, and in which frames.

    Circle    dy**2 + dx**2 < radius**2                                             CLEAR, arXiv:2412.16112
    Box       on each axis by itself, `window` places around the query's own        NAT, arXiv:2204.07143
              in steps of `dilation`                                                DiNA, arXiv:2209.15001
              of whole cells of tokens                                              STA, arXiv:2502.04507

At the border a box is shifted inward, so that every query sees equally many cells. What q sees (x) on 9 tokens:

    window 3                 window 3, dilation 2          window 3 cells of 2
    q x x . . . . . .        q . x . x . . . .             q x|x x|x x|. .|.
    . . . x q x . . .        . . x . q . x . .             . .|x x|x q|x x|.      the last cell is ragged
    . . . . . . x x q        . . . x . x . q .             . .|. .|x x|x x|q
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")
FARTHEST = 2.0**62  # more than any dy**2 + dx**2; radius * radius may be infinite


@dataclass(frozen=True, kw_only=True)
class Circle:
    """The tokens nearer than a radius.

    Attributes:
        radius: Euclidean, in tokens, strict: dy**2 + dx**2 < radius**2.
        frame_radius: In frames, strict: |df| < frame_radius; None: all frames.
    Raises:
        ValueError: radius is not a finite number > 0, or frame_radius is not an integer >= 1.
    """

    radius: float
    frame_radius: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"radius must be a finite number > 0, got {self.radius}")
        _check_frame_radius(self.frame_radius)

    @property
    def squared_limit(self) -> int:
        """The least integer L for which dy**2 + dx**2 < L is equivalent to dy**2 + dx**2 < radius * radius in float64.

        At least 1: a query sees itself. Only L decides what is inside: integers compare alike on every device, also
        without float64.
        """
        return max(1, math.ceil(min(self.radius * self.radius, FARTHEST)))

    def near(self, height: int, width: int, device: torch.device = CPU) -> Tensor:
        """[tokens of a frame, tokens of a frame] bool: the key lies in the query's window."""
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        row_squares, column_squares = (rows[:, None] - rows) ** 2, (columns[:, None] - columns) ** 2
        near = row_squares[:, None, :, None] + column_squares[:, None] < self.squared_limit
        return near.flatten(2).flatten(0, 1)

    def covers(self, height: int, width: int) -> bool:
        """Whether every token of a frame sees every other."""
        return (height - 1) ** 2 + (width - 1) ** 2 < self.squared_limit

    def num_pairs(self, height: int, width: int) -> int:
        """Pairs of a query and a key in its window, of one frame."""
        pairs, limit = 0, self.squared_limit
        for step in range(1 - height, height):  # rows from a query to its keys
            if (rest := limit - step * step) > 0:
                reach = min(math.isqrt(rest - 1), width - 1)  # columns, at most
                pairs += (height - abs(step)) * (width * (2 * reach + 1) - reach * (reach + 1))
        return pairs

    def reach(self, axis: int, size: int) -> float:
        """Distance in tokens up to which a query sees all others along an axis of this size; inf: the whole axis."""
        return math.inf if self.radius >= size else self.radius

    def keys_read(self, axis: int, size: int, tile: int) -> float:
        """Number of places of an axis of this size that a tile of queries sees, on average over its tiles."""
        return mean_reach(size, tile, math.isqrt(self.squared_limit - 1))


class Span(NamedTuple):
    """What each place of an axis sees of that axis: first, first + step, ... up to last."""

    first: Tensor  # [size]
    last: Tensor  # [size]
    step: int

    def near(self) -> Tensor:
        """[size, size] bool."""
        place = torch.arange(self.first.shape[0], device=self.first.device)
        between = (self.first[:, None] <= place) & (place <= self.last[:, None])
        return between & ((place - self.first[:, None]) % self.step == 0)

    def num_pairs(self) -> int:
        """Pairs of a place and one that it sees."""
        return int(((self.last - self.first) // self.step + 1).sum())


@dataclass(frozen=True, kw_only=True)
class Box:
    """The cells around the query's own, equally many on both sides; at the border the window is shifted inward.

    Each setting is (height, width). On an axis, a query sees only tokens at multiples of `dilation` from its own; these
    are divided into cells of `cell` tokens, the last of which may be shorter.

    Attributes:
        window: In cells, odd; on an axis of fewer cells, all are seen.
        dilation: In tokens.
        cell: In tokens, counted in steps of `dilation`.
        frame_radius: In frames, strict: |df| < frame_radius; None: all frames.
    Raises:
        ValueError: window is not a pair of odd integers >= 1, dilation or cell is not a pair of integers >= 1, or
            frame_radius is not an integer >= 1.
    """

    window: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    cell: tuple[int, int] = (1, 1)
    frame_radius: int | None = None

    def __post_init__(self) -> None:
        _check_pair("window", self.window)
        if self.window[0] % 2 == 0 or self.window[1] % 2 == 0:
            raise ValueError(f"window must be odd along both axes, got {self.window}")
        _check_pair("dilation", self.dilation)
        _check_pair("cell", self.cell)
        _check_frame_radius(self.frame_radius)

    def span(self, axis: int, size: int, device: torch.device = CPU) -> Span:
        """What each place sees along the height (axis 0) or the width (axis 1), of this size."""
        window, dilation, cell = self.window[axis], self.dilation[axis], self.cell[axis]
        place = torch.arange(size, device=device)
        residue, index = place % dilation, place // dilation  # which class, and where in it
        class_size = (size - residue + dilation - 1) // dilation
        num_cells = (class_size + cell - 1) // cell
        start = (index // cell - window // 2).minimum(num_cells - window).clamp(min=0)
        stop = ((start + window) * cell).minimum(class_size)
        return Span(residue + dilation * start * cell, residue + dilation * (stop - 1), dilation)

    def near(self, height: int, width: int, device: torch.device = CPU) -> Tensor:
        """[tokens of a frame, tokens of a frame] bool: the key lies in the query's window."""
        rows, columns = self.span(0, height, device).near(), self.span(1, width, device).near()
        return (rows[:, None, :, None] & columns[:, None]).flatten(2).flatten(0, 1)

    def covers(self, height: int, width: int) -> bool:
        """Whether every token of a frame sees every other."""
        return self._covers_axis(0, height) and self._covers_axis(1, width)

    def num_pairs(self, height: int, width: int) -> int:
        """Pairs of a query and a key in its window, of one frame."""
        return self.span(0, height).num_pairs() * self.span(1, width).num_pairs()

    def _covers_axis(self, axis: int, size: int) -> bool:
        return size <= self.window[axis] * self.cell[axis] and (self.dilation[axis] == 1 or size == 1)

    def reach(self, axis: int, size: int) -> float:
        """Like `Circle.reach`, for queries away from the border; 0 if dilation skips neighbours."""
        if self._covers_axis(axis, size):
            return math.inf
        return self.cell[axis] * (self.window[axis] // 2) if self.dilation[axis] == 1 else 0

    def keys_read(self, axis: int, size: int, tile: int) -> float:
        """Number of places of an axis of this size that a tile of queries of one class sees, away from the border."""
        cells = math.ceil(tile / self.cell[axis]) + self.window[axis] - 1
        return min(math.ceil(size / self.dilation[axis]), cells * self.cell[axis])


Window = Circle | Box


def to_arguments(window: Window) -> tuple[float | None, int | None, list[int] | None]:
    """(radius, frame_radius, box), as operators take a window; either radius or box is None."""
    if isinstance(window, Circle):
        return window.radius, window.frame_radius, None
    return None, window.frame_radius, [*window.window, *window.dilation, *window.cell]


def from_arguments(radius: float | None, frame_radius: int | None, box: Sequence[int] | None) -> Window:
    """The inverse of `to_arguments`."""
    if box is None:
        assert radius is not None
        return Circle(radius=radius, frame_radius=frame_radius)
    window, dilation, cell = ((box[at], box[at + 1]) for at in (0, 2, 4))
    return Box(window=window, dilation=dilation, cell=cell, frame_radius=frame_radius)


def mean_reach(size: int, tile: int, reach: int) -> float:
    """Number of places of an axis at most `reach` away from a tile, on average over the tiles."""
    starts = range(0, size, tile)
    return sum(min(start + tile + reach, size) - max(start - reach, 0) for start in starts) / len(starts)


def _check_pair(name: str, pair: object) -> None:
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(_is_count(side) for side in pair)):
        raise ValueError(f"{name} must be (along the height, along the width), integers >= 1, got {pair!r}")


def _check_frame_radius(frame_radius: object) -> None:
    if frame_radius is not None and not _is_count(frame_radius):
        raise ValueError(f"frame_radius must be an integer >= 1 or None, got {frame_radius!r}")


def _is_count(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool) and bool(value >= 1)
