"""Draws a scene at any size: anti-aliased coverage from signed distances, so that no size is resized from another.

    background = tone * (1 - DEPTH * (1 - cos(2 pi (cycles * u + phase / 8))) / 2),   u along the wave's direction
    shadow     = the object's shape, moved away from the light, darkens what it covers
    object     = tint(colour) over it,   light = a pale quarter disc in one corner

Lengths are in units of the picture's shorter side.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .world import CELLS, COLOURS, NUM_PHASES, PATTERNS, TONES, Scene

Array = NDArray[np.floating]

RADIUS = 0.095  # of an object
SHADOW_OFFSET = 0.055  # along each axis
SHADOW_DARKNESS = 0.55
SUN_RADIUS = 0.085
SUN_COLOUR = (255, 253, 236)
WAVE_DEPTH = 0.3  # brightness lost in a trough


def draw(scene: Scene, size: int | tuple[int, int]) -> Image.Image:
    """The scene as an RGB picture.

    Args:
        size: Side of a square picture, or (width, height), in pixels.
    """
    width, height = (size, size) if isinstance(size, int) else size
    return Image.fromarray((render(scene, width, height) * 255 + 0.5).astype(np.uint8))


def render(scene: Scene, width: int, height: int) -> Array:
    """The scene as [height, width, 3], float32 in [0, 1]."""
    if min(width, height) < 16:
        raise ValueError(f"a scene needs at least 16 pixels a side, got {width}x{height}")
    rows, cols = pixel_centres(width, height)
    image: Array = np.asarray(TONES[scene.tone], np.float32) / 255 * wave(scene, rows, cols)[..., None]
    sun_row, sun_col = light_corner(scene.light, width, height)
    sun = _disc(rows - sun_row, cols - sun_col, SUN_RADIUS)
    image = over(image, SUN_COLOUR, sun, width, height)
    away_row, away_col = shadow_offset(scene.light)
    for item in scene.objects:
        shadow = coverage(item.shape, item.cell, width, height, away_row, away_col)
        image = image * (1 - SHADOW_DARKNESS * shadow[..., None])
    for item in scene.objects:
        distance = _distance(item.shape, *_offsets(item.cell, width, height))
        image = over(image, tinted(item.colour, scene.tint), distance, width, height)
    return image.astype(np.float32)


def tinted(colour: str, tint: str) -> tuple[float, float, float]:
    """An object's RGB, 0 to 255: towards black, plain, or towards white."""
    red, green, blue = COLOURS[colour]
    if tint == "dark":
        return red * 0.6, green * 0.6, blue * 0.6
    if tint == "light":
        return red + (255 - red) * 0.4, green + (255 - green) * 0.4, blue + (255 - blue) * 0.4
    return float(red), float(green), float(blue)


def wave(scene: Scene, rows: Array, cols: Array) -> Array:
    """The background's brightness, between 1 - WAVE_DEPTH and 1, at `rows, cols`."""
    angle = scene.direction * np.pi / 4
    along = rows * np.float32(np.sin(angle)) + cols * np.float32(np.cos(angle))
    turns = PATTERNS[scene.pattern] * along + scene.phase / NUM_PHASES
    return (1 - WAVE_DEPTH * (0.5 - 0.5 * np.cos(2 * np.pi * turns))).astype(np.float32)


def pixel_centres(width: int, height: int) -> tuple[Array, Array]:
    """Rows [height, 1] and columns [1, width] of the pixels' centres, in units of the shorter side."""
    side = min(width, height)
    rows = (np.arange(height, dtype=np.float32) + 0.5) / side
    cols = (np.arange(width, dtype=np.float32) + 0.5) / side
    return rows[:, None], cols[None, :]


def coverage(shape: str, cell: str, width: int, height: int, move_row: float = 0, move_col: float = 0) -> Array:
    """How much of each pixel [height, width] the object covers, 0 to 1, when moved by (move_row, move_col)."""
    rows, cols = _offsets(cell, width, height)
    return _inside(_distance(shape, rows - move_row, cols - move_col), width, height)


def light_corner(light: str, width: int, height: int) -> tuple[float, float]:
    """The corner (row, col) that the light comes from, in units of the shorter side."""
    side = min(width, height)
    return ("bottom" in light) * height / side, ("right" in light) * width / side


def shadow_offset(light: str) -> tuple[float, float]:
    """Offset (row, col) of a shadow from its object: away from the light."""
    return (
        -SHADOW_OFFSET if "bottom" in light else SHADOW_OFFSET,
        -SHADOW_OFFSET if "right" in light else SHADOW_OFFSET,
    )


def over(image: Array, colour: tuple[float, float, float], distance: Array, width: int, height: int) -> Array:
    """`colour` (RGB, 0 to 255) over `image` where the signed distance is negative."""
    cover = _inside(distance, width, height)[..., None]
    return image * (1 - cover) + np.asarray(colour, np.float32) / 255 * cover


def _inside(distance: Array, width: int, height: int) -> Array:
    return np.clip(0.5 - distance * min(width, height), 0, 1)


def _offsets(cell: str, width: int, height: int) -> tuple[Array, Array]:
    rows, cols = pixel_centres(width, height)
    row, col = divmod(CELLS.index(cell), 3)
    side = min(width, height)
    return rows - (row + 0.5) / 3 * height / side, cols - (col + 0.5) / 3 * width / side


def _disc(rows: Array, cols: Array, radius: float) -> Array:
    return np.hypot(rows, cols) - radius


def _distance(shape: str, rows: Array, cols: Array) -> Array:
    """Signed distance (or a bound on it that is exact near the border) to a shape of RADIUS at the origin."""
    if shape == "circle":
        return _disc(rows, cols, RADIUS)
    if shape == "square":
        return np.maximum(np.abs(rows), np.abs(cols)) - 0.88 * RADIUS
    if shape == "triangle":  # pointing up
        slope = np.float32(np.sqrt(3) / 2)
        return np.maximum(rows - 0.6 * RADIUS, slope * np.abs(cols) - 0.5 * rows - 0.6 * RADIUS)
    bar = 0.36 * RADIUS
    upright = np.maximum(np.abs(rows) - 1.05 * RADIUS, np.abs(cols) - bar)
    lying = np.maximum(np.abs(cols) - 1.05 * RADIUS, np.abs(rows) - bar)
    return np.minimum(upright, lying)
