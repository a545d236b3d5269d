"""Reads a picture back into a scene, and judges whether it is coherent.

A picture of any size is averaged down (or scaled up) to a shorter side of 96 pixels. Objects are the colourful regions
of a cell, named by the template that overlaps them best. Light, shadows, wave and tints are each found by comparing the
picture with what the drawing code would have drawn.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .drawing import (
    SUN_COLOUR,
    SUN_RADIUS,
    WAVE_DEPTH,
    Array,
    coverage,
    light_corner,
    pixel_centres,
    shadow_offset,
    tinted,
    wave,
)
from .world import (
    CELLS,
    COLOURS,
    LIGHTS,
    NUM_DIRECTIONS,
    NUM_PHASES,
    PATTERNS,
    SHAPES,
    TINTS,
    TONES,
    Object,
    Scene,
    parse,
)

Mask = NDArray[np.bool_]

SIDE = 96  # pixels, of the shorter side while reading
BLUR = 0.8  # pixels, against noise
# max - min of a pixel's colour: backgrounds stay below 0.18, objects above 0.29. Saturation, which divides by max,
# would find objects in shadows that a model paints with a slight hue.
COLOURFUL = 0.2
MIN_OVERLAP = 0.6  # intersection over union with a shape's template, below which a region is no object
MAX_WAVE_ERROR = 0.5  # of a cell's brightness, root mean square, as a share of the wave's own


@dataclass(frozen=True)
class _FoundObject:
    item: Object
    tint: str
    light: str | None  # the corner that this object's shadow points away from


def read(image: Image.Image) -> Scene:
    """The objects, background, light, wave and tint of a picture, and whether they agree across it.

    Args:
        image: RGB, at least 16 pixels a side, any aspect ratio.
    """
    pixels = _canonical(image)
    found = [item for cell in CELLS if (item := _find_object(pixels, cell))]
    objects = tuple(item.item for item in found)
    free = _background_mask(pixels)
    background, wave_agrees = _read_background(pixels, free, objects)
    light, one_sun = _read_sun(pixels)
    shadows_agree = all(item.light == light for item in found)
    tints = [item.tint for item in found]
    return replace(
        background,
        light=light,
        tint=tints[0] if tints else "plain",
        coherence=wave_agrees and one_sun and shadows_agree and len(set(tints)) <= 1,
    )


def score(caption: str, image: Image.Image) -> tuple[int, int]:
    """Number of the caption's objects that the picture shows with the right colour, shape and cell, and their total."""
    expected = set(parse(caption).objects)
    return len(expected & set(read(image).objects)), len(expected)


def _canonical(image: Image.Image) -> Array:
    scale = SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    resized = image.convert("RGB").resize(size, resampling).filter(ImageFilter.GaussianBlur(BLUR))
    return np.asarray(resized, np.float32) / 255


def _chroma(pixels: Array) -> Array:
    return pixels.max(-1) - pixels.min(-1)


def _find_object(pixels: Array, cell: str) -> _FoundObject | None:
    height, width = pixels.shape[:2]
    window = _window(cell, width, height)
    chroma = _chroma(pixels[window])
    if (chroma > COLOURFUL).sum() < 40:  # the smallest template covers about 150 pixels
        return None
    peak = float(np.median(chroma[chroma > COLOURFUL]))
    region = (chroma > max(COLOURFUL, 0.65 * peak)).astype(np.float32)
    overlap, shape, move = max(
        (_overlap(_template(shape, cell, width, height, *move), region), shape, move)
        for shape in SHAPES
        for move in product((-0.02, 0.0, 0.02), (-0.02, 0.0, 0.02))
    )
    if overlap < MIN_OVERLAP:
        return None
    inside = _template(shape, cell, width, height, *move) > 0.99
    rgb = np.median(pixels[window][inside], axis=0) * 255
    colour, tint = min(product(COLOURS, TINTS), key=lambda pair: float(np.abs(rgb - tinted(*pair)).sum()))
    item = Object(colour=colour, shape=shape, cell=cell)
    return _FoundObject(item, tint, _read_shadow(pixels, item, move))


def _window(cell: str, width: int, height: int) -> tuple[slice, slice]:
    row, col = divmod(CELLS.index(cell), 3)
    return slice(row * height // 3, (row + 1) * height // 3), slice(col * width // 3, (col + 1) * width // 3)


@lru_cache(maxsize=1024)
def _template(shape: str, cell: str, width: int, height: int, move_row: float, move_col: float) -> Array:
    """How much the object covers of each pixel of its cell; the same for all pictures of a size."""
    return coverage(shape, cell, width, height, move_row, move_col)[_window(cell, width, height)].copy()


def _overlap(template: Array, region: Array) -> float:
    return float(np.minimum(template, region).sum() / np.maximum(template, region).sum())


def _read_shadow(pixels: Array, item: Object, move: tuple[float, float]) -> str | None:
    """The corner the light comes from, judged by the dark side next to the object; None if no side is dark."""
    height, width = pixels.shape[:2]
    brightness = pixels.max(-1)
    body = coverage(item.shape, item.cell, width, height, *move)
    darkness = {}
    for light in LIGHTS:
        away_row, away_col = shadow_offset(light)
        shadow = coverage(item.shape, item.cell, width, height, move[0] + away_row, move[1] + away_col)
        visible_shadow = (shadow > 0.9) & (body < 0.1)
        darkness[light] = float(brightness[visible_shadow].mean())
    best, second = sorted(darkness, key=lambda light: darkness[light])[:2]
    return best if darkness[best] < 0.8 * darkness[second] else None


def _background_mask(pixels: Array) -> Mask:
    """Where the plain background shows: no object, no shadow, no sun, with a margin."""
    height, width = pixels.shape[:2]
    busy = (_chroma(pixels) > 0.2) | (pixels.max(-1) < 0.5)
    padded = np.pad(busy, 2)
    for down, right in product(range(5), repeat=2):
        busy = busy | padded[down : down + height, right : right + width]
    rows, cols = pixel_centres(width, height)
    for light in LIGHTS:
        row, col = light_corner(light, width, height)
        busy = busy | (np.hypot(rows - row, cols - col) < SUN_RADIUS + 0.03)
    return ~busy


def _read_background(pixels: Array, free: Mask, objects: tuple[Object, ...]) -> tuple[Scene, bool]:
    """The scene with the nearest tone and wave, and whether that wave fits in every cell."""
    height, width = pixels.shape[:2]
    rows, cols = pixel_centres(width, height)
    if free.sum() < 0.2 * free.size:
        return Scene(objects=objects, tone="sand", pattern="striped"), False
    tone = min(TONES, key=lambda name: _tone_error(pixels[free], TONES[name]))
    brightness = (pixels / (np.asarray(TONES[tone], np.float32) / 255)).mean(-1)
    candidates = [
        Scene(objects=objects, tone=tone, pattern=pattern, direction=direction, phase=phase)
        for pattern, direction, phase in product(PATTERNS, range(NUM_DIRECTIONS), range(NUM_PHASES))
    ]
    errors = [np.square(brightness - wave(scene, rows, cols)) for scene in candidates]
    best = int(np.argmin([error[free].mean() for error in errors]))
    amplitude = WAVE_DEPTH / np.sqrt(8)  # root mean square of the wave about its mean
    worst = 0.0
    for row, col in product(range(3), repeat=2):
        window = (slice(row * height // 3, (row + 1) * height // 3), slice(col * width // 3, (col + 1) * width // 3))
        if free[window].mean() > 0.1:
            worst = max(worst, float(np.sqrt(errors[best][window][free[window]].mean())))
    return candidates[best], worst < MAX_WAVE_ERROR * 2 * amplitude


def _tone_error(colours: Array, tone: tuple[int, int, int]) -> float:
    mean = colours.mean(0)
    expected = np.asarray(tone, np.float32)
    return float(np.abs(mean / mean.sum() - expected / expected.sum()).sum())


def _read_sun(pixels: Array) -> tuple[str, bool]:
    """The corner most like the sun, and whether it is the only one that is."""
    height, width = pixels.shape[:2]
    rows, cols = pixel_centres(width, height)
    distance = {}
    for light in LIGHTS:
        row, col = light_corner(light, width, height)
        inside = np.hypot(rows - row, cols - col) < 0.8 * SUN_RADIUS
        distance[light] = float(np.abs(pixels[inside] - np.asarray(SUN_COLOUR, np.float32) / 255).mean())
    best, second = sorted(distance, key=lambda light: distance[light])[:2]
    return best, distance[best] < 0.06 and distance[second] > 1.3 * distance[best] + 0.02
