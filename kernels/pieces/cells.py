"""Cells of an image: a fixed number of them, for any image size.

The C cells form a grid (frames, rows, columns) whose sides multiply to C, chosen so that cells are as close to cubes as
C allows: 64 cells are 8 x 8 on a square image, 4 x 16 on one four times as wide. Cell i of `count` along a side of
`size` tokens spans floor(i size / count) to ceil((i + 1) size / count), as in adaptive pooling, so that every cell has
tokens at any size.
"""

from collections.abc import Iterator

Grid = tuple[int, ...]  # (height, width) or (frames, height, width), in tokens


def sizes_of(grid: Grid) -> tuple[int, int, int]:
    """(frames, height, width), with one frame for an image."""
    frames, height, width = (1, *grid)[-3:]
    return frames, height, width


def cell_grid(frames: int, height: int, width: int, num_cells: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of cells, whose product is num_cells; an image has one frame of cells."""
    grids = [
        (depth, rows, num_cells // (depth * rows))
        for depth in _divisors(num_cells)
        if depth == 1 or frames > 1
        for rows in _divisors(num_cells // depth)
    ]
    skip = 1 if frames == 1 else 0

    def aspect_ratio(counts: tuple[int, int, int]) -> float:
        sides = [size / count for size, count in zip((frames, height, width), counts, strict=True)][skip:]
        return max(sides) / min(sides)

    return min(grids, key=aspect_ratio)


def sides_of_cells(grid: Grid, num_cells: int) -> tuple[float, float]:
    """Mean (height, width) of the cells, in tokens."""
    _, height, width = sizes = sizes_of(grid)
    _, rows, columns = cell_grid(*sizes, num_cells)
    return height / rows, width / columns


def _divisors(number: int) -> Iterator[int]:
    return (divisor for divisor in range(1, number + 1) if number % divisor == 0)


def cells_of_axis(size: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of each cell along a side."""
    starts = [index * size // count for index in range(count)]
    ends = [-(-(index + 1) * size // count) for index in range(count)]
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]
