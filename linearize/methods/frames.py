"""Grids of pictures and of videos alike, for windows that may end in time: |frame_i - frame_j| < frame_radius."""

from ..errors import LayoutError
from ..layout import Grid


def with_frames(frame_radius: int | None, grid: Grid) -> Grid:
    """(frames, height, width).

    Raises:
        LayoutError: a frame_radius in a model of single pictures.
    """
    if frame_radius is not None and len(grid) == 2:
        raise LayoutError(
            f"frame_radius={frame_radius} is for models of several frames, got a grid of {tuple(grid)}: "
            "leave frame_radius out"
        )
    return (1, *grid)[-3:]


def pairs_of_frames(frame_radius: int | None, frames: int) -> int:
    """Pairs of a frame and one that it sees."""
    reach = min(frame_radius or frames, frames) - 1
    return frames * (2 * reach + 1) - reach * (reach + 1)
