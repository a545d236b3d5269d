"""Captioned scenes: sampled, drawn at any size, and read back, so that errors of a picture can be counted.

>>> scene = sample(seed=7)
>>> score(scene.caption, draw(scene, 128))
(2, 2)
"""

from .drawing import draw, render
from .reading import read, score
from .world import CELLS, COLOURS, LIGHTS, PATTERNS, SHAPES, TINTS, TONES, Object, Scene, parse, sample

__all__ = [
    "CELLS",
    "COLOURS",
    "LIGHTS",
    "PATTERNS",
    "SHAPES",
    "TINTS",
    "TONES",
    "Object",
    "Scene",
    "draw",
    "parse",
    "read",
    "render",
    "sample",
    "score",
]
