"""What each setting of the cascade does, on the small model: `python benchmarks/cascade_settings.py`, tens of minutes.

One picture of 128 pixels by the dense teacher is enlarged to 512 repeatedly, with one setting changed at a time; the
noise is the same in all. For rope_factor, which matters most where positions are furthest, one of these is enlarged to
1024. Writes docs/images/settings_*.png; docs/high_resolution.md shows them.

The student is that of `make high-resolution`; --adapter names another.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from high_resolution import open_student
from PIL import Image

from lineardit import HighResolutionPipeline, dense
from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path, scenes
from lineardit.pipelines.plan import Settings

logger = logging.getLogger(__name__)

IMAGES = Path(__file__).parents[1] / "docs/images"
NATIVE, SIDE = 128, 512  # pixels
CALL = {"max_sequence_length": 64}
SHEET_SIDE = 256  # pixels of a picture on a sheet
CROPS = {"sharpen": (256, 128, 512, 384)}  # a part of the picture, pixel by pixel: left, top, right, bottom
ROPE_STEPS = 4


class Drawing:
    """One caption's picture by the teacher, and its enlargements by settings."""

    def __init__(self, adapter: Path | None, scene: int, seed: int) -> None:
        self.caption = scenes.sample(scene, split="held_out").caption
        self.seed = seed
        student = open_student(path(), adapter)
        self.high = HighResolutionPipeline.from_pipe(student, native_size=NATIVE)
        self.high.set_progress_bar_config(disable=True)
        student.set_progress_bar_config(disable=True)
        with dense(student):
            self.native = student(
                self.caption, height=NATIVE, width=NATIVE, num_inference_steps=28, generator=self._noise(), **CALL
            ).images[0]
        self.enlargements: dict[Settings, Image.Image] = {}

    def enlarged(self, settings: Settings) -> Image.Image:
        if settings not in self.enlargements:
            plan = self.high.plan(SIDE, SIDE, enlarge=True, settings=settings)
            logger.info("%s", plan)
            call = {**CALL, "plan": plan, "image": self.native, "generator": self._noise()}
            self.enlargements[settings] = self.high(self.caption, **call).images[0]
        return self.enlargements[settings]

    def enlarged_again(self, rope_factor: float) -> Image.Image:
        """The picture of `SIDE` pixels, enlarged to twice as much."""
        plan = self.high.plan(2 * SIDE, 2 * SIDE, enlarge=True, settings=Settings(steps=ROPE_STEPS))
        stage = replace(plan.stages[-1], rope_factor=rope_factor)
        logger.info("%s", stage)
        before = self.enlarged(Settings())
        call = {**CALL, "plan": replace(plan, stages=(stage,)), "image": before, "generator": self._noise()}
        return self.high(self.caption, **call).images[0]

    def _noise(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.seed)


def enlarge_with(**settings: Any) -> Callable[[Drawing], Image.Image]:
    return lambda drawing: drawing.enlarged(Settings(**settings))


def enlarge_with_rope(rope_factor: float) -> Callable[[Drawing], Image.Image]:
    return lambda drawing: drawing.enlarged_again(rope_factor)


ROWS: dict[str, dict[str, Callable[[Drawing], Image.Image]]] = {
    "strength": {f"strength {value:g}": enlarge_with(strength=value) for value in (0.1, 0.3, 0.6, 0.88)},
    "sharpen": {f"strength 0.3, sharpen {value:g}": enlarge_with(sharpen=value) for value in (0, 1, 3)},
    # By default, follow is 1, steps are 8 and the shift is 3.16.
    "follow": {
        f"strength 0.3, follow {value:g}": enlarge_with(strength=0.3, follow=value) for value in (0.0, 0.5, 1.0)
    },
    "steps": {f"strength 0.6, {value} steps": enlarge_with(strength=0.6, steps=value) for value in (2, 8, 16)},
    "shift": {
        "strength 0.6, shift 1": enlarge_with(strength=0.6, shift=1),
        "strength 0.6, shift 3.16": enlarge_with(strength=0.6),
        "strength 0.6, shift 10": enlarge_with(strength=0.6, shift=10),
    },
    # NTK's factors for 1, 4 and 8 times the native side
    "rope": {f"1024 px, rope x{value:g}": enlarge_with_rope(value) for value in (1, 5.28, 12.1)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", type=Path, help="of another student")
    parser.add_argument("--scene", type=int, default=5, help="number of the held-out caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=Path, default=IMAGES)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="only these")
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    drawing = Drawing(options.adapter, options.scene, options.seed)
    print(drawing.caption)
    lanczos = drawing.native.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    for name, columns in ROWS.items():
        if name in options.rows:
            made = [lanczos, *(draw(drawing) for draw in columns.values())]
            crop = CROPS.get(name)
            shown = [picture.resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS, box=crop) for picture in made]
            write_sheet(["128 px, by Lanczos", *columns], [shown], options.images / f"settings_{name}.png")


if __name__ == "__main__":
    main()
