"""What a scene is, its caption, and which scenes are held out from training.

A caption names the objects and the background. It leaves out four properties that must nevertheless agree across the
whole picture: the corner the light comes from and with it every shadow, the direction and the phase of the background's
wave, and one tint shared by all objects.
"""

import difflib
import json
import random
import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Literal

COLOURS = {
    "red": (220, 40, 40),
    "orange": (240, 135, 15),
    "yellow": (235, 220, 30),
    "green": (45, 170, 60),
    "cyan": (30, 190, 205),
    "blue": (45, 75, 220),
    "purple": (130, 45, 190),
    "magenta": (225, 55, 165),
}  # RGB, 0 to 255
SHAPES = ("circle", "square", "triangle", "cross")
CELLS = tuple(f"{row} {col}" for row in ("top", "middle", "bottom") for col in ("left", "center", "right"))
TONES = {"sand": (225, 208, 182), "sky": (184, 200, 222), "mint": (186, 214, 194), "lilac": (212, 194, 220)}
PATTERNS = {"striped": 4.0, "shaded": 0.6}  # cycles of the background's wave over the picture's shorter side
LIGHTS = ("top left", "top right", "bottom left", "bottom right")
TINTS = ("dark", "plain", "light")
NUM_DIRECTIONS = 4  # of the wave: multiples of 45 degrees
NUM_PHASES = 8  # of the wave: eighths of a cycle

HELD_OUT_FILE = Path(__file__).with_name("held_out.json")
_OBJECT = re.compile(r"an? (\w+) (\w+) at the (\w+ \w+)")


@dataclass(frozen=True, kw_only=True)
class Object:
    """One object: a colour and a shape in one of nine cells."""

    colour: str
    shape: str
    cell: str

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("colour", self.colour, COLOURS),
            ("shape", self.shape, SHAPES),
            ("cell", self.cell, CELLS),
        ):
            _check_word(name, value, allowed)

    @property
    def phrase(self) -> str:
        """For example "an orange circle at the top left"."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape} at the {self.cell}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's content. Objects are kept in reading order of their cells.

    Attributes:
        objects: One or two, in different cells; a scene read from a picture may hold any number.
        tone, pattern: The background, named in the caption.
        light: The corner the light comes from; shadows point away from it.
        direction: Of the background's wave, in steps of 45 degrees.
        phase: Of the background's wave, in eighths of a cycle.
        tint: Shared by the objects.
        coherence: Whether light and shadows, the wave and the tints agree across the picture; always true of a scene
            that was sampled or parsed, measured in one that was read.
    """

    objects: tuple[Object, ...]
    tone: str
    pattern: str
    light: str = LIGHTS[0]
    direction: int = 0
    phase: int = 0
    tint: str = "plain"
    coherence: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("tone", self.tone, TONES),
            ("pattern", self.pattern, PATTERNS),
            ("light", self.light, LIGHTS),
            ("tint", self.tint, TINTS),
        ):
            _check_word(name, value, allowed)
        cells = [item.cell for item in self.objects]
        if len(set(cells)) < len(cells):
            raise ValueError(f"objects must be in different cells, got {cells}")
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda item: CELLS.index(item.cell))))

    @property
    def caption(self) -> str:
        """The picture's caption: the objects in reading order, then the background."""
        return self.say()

    def say(self, *, reverse: bool = False) -> str:
        """The caption, with the objects in reading order or in reverse."""
        objects = reversed(self.objects) if reverse else self.objects
        return f"{' and '.join(item.phrase for item in objects)} on {self.pattern} {self.tone}"


def parse(caption: str) -> Scene:
    """The scene of a caption; properties that the caption does not name take their defaults.

    Raises:
        ValueError: The caption is not of the form "a COLOUR SHAPE at the CELL [and ...] on PATTERN TONE".
    """
    phrases, _, background = caption.strip().lower().rpartition(" on ")
    matches = [_OBJECT.fullmatch(phrase) for phrase in phrases.split(" and ")]
    words = background.split()
    if not all(matches) or len(words) != 2:
        raise ValueError(
            'a caption must read like "a red circle at the top left and a blue cross at the middle right on striped '
            f'sand", got {caption!r}'
        )
    objects = tuple(Object(colour=m[1], shape=m[2], cell=m[3]) for m in matches if m)
    return Scene(objects=objects, pattern=words[0], tone=words[1])


def sample(seed: int, *, split: Literal["train", "held_out"] = "train") -> Scene:
    """One or two random objects on a random background.

    Args:
        seed: The same seed gives the same scene.
        split: "train" never holds a held-out triple (colour, shape, cell) or a held-out pair of objects' (colour,
            shape); "held_out" always holds at least one of them.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {split!r}')
    rng = random.Random(f"{split}-{seed}")
    while True:
        scene = _random_scene(rng)
        if is_held_out(scene) == (split == "held_out"):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether no training picture may show this scene, judged by its content alone."""
    triples, pairs = held_out()
    return any((o.colour, o.shape, o.cell) in triples for o in scene.objects) or any(
        _pair(a, b) in pairs for a, b in combinations(scene.objects, 2)
    )


@cache
def held_out() -> tuple[frozenset[tuple[str, str, str]], frozenset[tuple[str, str]]]:
    """The held-out triples (colour, shape, cell), and the pairs ("colour shape", "colour shape") in sorted order."""
    content = json.loads(HELD_OUT_FILE.read_text())
    return frozenset(map(tuple, content["triples"])), frozenset(map(tuple, content["pairs"]))


def _pair(a: Object, b: Object) -> tuple[str, str]:
    first, second = sorted(f"{item.colour} {item.shape}" for item in (a, b))
    return first, second


def _random_scene(rng: random.Random) -> Scene:
    cells = rng.sample(CELLS, rng.choice((1, 2, 2)))
    scene = Scene(
        objects=tuple(Object(colour=rng.choice(list(COLOURS)), shape=rng.choice(SHAPES), cell=cell) for cell in cells),
        tone=rng.choice(list(TONES)),
        pattern=rng.choice(list(PATTERNS)),
    )
    return replace(
        scene,
        light=rng.choice(LIGHTS),
        direction=rng.randrange(NUM_DIRECTIONS),
        phase=rng.randrange(NUM_PHASES),
        tint=rng.choice(TINTS),
    )


def _check_word(
    name: str, value: str, allowed: tuple[str, ...] | dict[str, tuple[int, int, int]] | dict[str, float]
) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(value, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")
