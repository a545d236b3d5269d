"""Pictures larger than the small model's own: `make high-resolution`, hours on two idle cores, resumable.

The cascade with a student against direct generation, against the 128 px picture enlarged by Lanczos, and against an
oracle: the drawing itself, through the VAE. Does each picture still follow its caption and hang together, and how sharp
are its objects? And what memory does the cascade take? Writes benchmarks/results/high_resolution.json, .md and .png.

The student is the hybrid of `make marks`; --adapter names another. Direct generation is for a few captions only.
"""

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from high_resolution_memory import SIDES, Memory, measure_fresh
from high_resolution_report import Row, report
from PIL import Image
from tqdm import tqdm

from lineardit import HighResolutionPipeline
from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.cost import paired_step_seconds
from lineardit.distill.files import write_json
from lineardit.distill.metrics import paired_bootstrap, psnr, ssim
from lineardit.distill.pictures import PictureSettings
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.folders import sha256, write_whole
from lineardit.linearize.opening import open_pipeline
from lineardit.pipelines.plan import Plan, Settings
from lineardit.pipelines.vae import decode, encode
from lineardit.scene_judge import judge_scene
from lineardit.stages import Stages

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).with_name("results")
COLOURFUL = 0.2  # max - min of a pixel: objects are above, backgrounds below 0.18
Draw = Callable[[int], Image.Image]  # the picture of one caption


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is done."""

    native: int = 128  # pixels
    side: int = 512
    captions: int = 64
    largest: int = 1024
    few_captions: int = 8
    steps: int = 28
    text_tokens: int = 64
    settings: Settings = field(default_factory=Settings)


def sharpness(picture: Image.Image) -> float | None:
    """Mean gradient, of 255 a pixel, where objects border on the background; None without objects."""
    pixels = numpy.asarray(picture.convert("RGB"), numpy.float32)
    mask = pixels.max(-1) - pixels.min(-1) > 255 * COLOURFUL
    down, right = numpy.gradient(pixels, axis=(0, 1))
    slope = numpy.sqrt(down**2 + right**2).max(-1)
    border = numpy.zeros_like(mask)
    border[:-1] |= mask[:-1] != mask[1:]
    border[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    return float(slope[border].mean()) if border.any() else None


class HighResolution:
    """One run, in a folder of its own: every picture is a file, and what is there is not made again."""

    def __init__(self, base: Path, adapter: Path, directory: Path, amount: Amount) -> None:
        weights = [sha256(file)[:8] for place in (base, adapter) for file in sorted(place.rglob("*.safetensors"))]
        content = json.loads(json.dumps(asdict(amount)))
        self.stages = Stages(directory, content | {"weights": weights})
        self.directory, self.amount = directory, amount
        self.scenes = [scenes.sample(index, split="held_out") for index in range(amount.captions)]
        self.teacher = open_pipeline(base)
        self.student = open_pipeline(adapter)
        self.cascade = HighResolutionPipeline.from_pipe(self.student, native_size=amount.native)
        for pipe in (self.teacher, self.cascade, self.student):
            pipe.set_progress_bar_config(disable=True)

    def pictures(self, name: str, side: int, count: int, draw: Draw) -> list[Image.Image]:
        """Of the first `count` captions, drawn or read."""
        folder = self.directory / f"{name} {side}".replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        with self.stages.stage(f"{name}, {side} px"):
            for index in tqdm(range(count), desc=f"{name}, {side} px", unit="picture"):
                file = folder / f"{index:03d}.png"
                if not file.exists():
                    image = draw(index)
                    write_whole(file, lambda temporary, image=image: image.save(temporary, format="PNG"))
                with Image.open(file) as image:
                    made.append(image.convert("RGB"))
        return made

    def native(self, index: int) -> Image.Image:
        return self.direct(self.teacher, self.amount.native, index)

    def direct(self, pipe: Any, side: int, index: int) -> Image.Image:
        amount = self.amount
        return pipe(
            self.scenes[index].caption,
            height=side,
            width=side,
            num_inference_steps=amount.steps,
            max_sequence_length=amount.text_tokens,
            generator=torch.Generator("cpu").manual_seed(index),
        ).images[0]

    def plan(self, side: int) -> Plan:
        amount = self.amount
        return self.cascade.plan(side, side, num_inference_steps=amount.steps, settings=amount.settings)

    def in_stages(self, side: int, index: int) -> Image.Image:
        """The cascade; every stage's picture is kept beside."""
        folder = self.directory / "stages"
        folder.mkdir(exist_ok=True)

        def keep(_pipe: Any, _stage: int, made: dict[str, Any]) -> None:
            for image in made.get("images", ()):
                image.save(folder / f"{index:03d}-{image.width}.png")

        return self.cascade(
            self.scenes[index].caption,
            plan=self.plan(side),
            max_sequence_length=self.amount.text_tokens,
            generator=torch.Generator("cpu").manual_seed(index),
            callback_on_stage_end=keep,
        ).images[0]

    def oracle(self, side: int, index: int) -> Image.Image:
        """The drawing of the caption, encoded and decoded."""
        processor, vae = self.teacher.image_processor, self.teacher.vae
        pixels = processor.preprocess(scenes.draw(self.scenes[index], (side, side)))
        return processor.postprocess(decode(vae, encode(vae, pixels, tile=None), tile=None))[0]

    def last_stage(self, index: int) -> tuple[Image.Image, Image.Image]:
        """The last stage at `side` by the student and by the dense teacher, from the same smaller picture."""
        plan = self.plan(self.amount.side)
        with Image.open(self.directory / "stages" / f"{index:03d}-{plan.stages[-2].width}.png") as opened:
            before = opened.convert("RGB")
        made = []
        for attention in ("converted", "original"):
            stage = replace(plan.stages[-1], attention=attention)
            made.append(
                self.cascade(
                    self.scenes[index].caption,
                    image=before,
                    plan=replace(plan, stages=(stage,)),
                    max_sequence_length=self.amount.text_tokens,
                    generator=torch.Generator("cpu").manual_seed(index),
                ).images[0]
            )
        return made[0], made[1]

    def row(self, name: str, side: int, made: Sequence[Image.Image]) -> Row:
        scores = [judge_scene(scene.caption, image) for scene, image in zip(self.scenes, made, strict=False)]
        edges = [edge for image in made if (edge := sharpness(image)) is not None]
        objects = [score["objects"] for score in scores]
        return Row(
            name=name,
            side=side,
            pictures=len(made),
            objects=sum(right for right, _ in objects) / sum(of for _, of in objects),
            coherence=sum(score["coherence"][0] for score in scores) / len(scores),
            sharpness=sum(edges) / len(edges) if edges else 0.0,
        )

    def run(self) -> tuple[list[Row], dict[str, Any]]:
        """The rows, and what was measured beside them."""
        amount = self.amount
        native = self.pictures("teacher", amount.native, amount.captions, self.native)
        rows, sheets = [self.row("teacher", amount.native, native)], {}
        for side, count in ((amount.side, amount.captions), (amount.largest, amount.few_captions)):

            def lanczos(index: int, side: int = side) -> Image.Image:
                return native[index].resize((side, side), Image.Resampling.LANCZOS)

            kinds: dict[str, Draw] = {
                "cascade, student": lambda index, side=side: self.in_stages(side, index),
                "direct, student": lambda index, side=side: self.direct(self.student, side, index),
                "Lanczos": lanczos,
                "oracle": lambda index, side=side: self.oracle(side, index),
            }
            if side == amount.side:
                kinds["direct, teacher"] = lambda index, side=side: self.direct(self.teacher, side, index)
            counts = {name: amount.few_captions if name.startswith("direct") else count for name in kinds}
            made = {name: self.pictures(name, side, counts[name], draw) for name, draw in kinds.items()}
            rows += [self.row(name, side, pictures) for name, pictures in made.items()]
            sheets[side] = made
        pairs = [self.last_stage(index) for index in range(amount.few_captions)]
        seconds = paired_step_seconds(
            self.student,
            self.teacher,
            PictureSettings(height=amount.largest, width=amount.largest, max_sequence_length=amount.text_tokens),
            pairs=1,
        )
        beside = {
            "differences": self.differences(native, sheets[amount.side]["cascade, student"]),
            "last stage": {
                "psnr": sum(psnr(*pair) for pair in pairs) / len(pairs),
                "ssim": sum(ssim(*pair) for pair in pairs) / len(pairs),
            },
            "step seconds": {"student": median(s for s, _ in seconds), "teacher": median(t for _, t in seconds)},
        }
        beside["memory"] = [asdict(one) for one in self.memory()]
        self.sheet = [native, *sheets[amount.side].values()]
        self.sheet_names = ["teacher, 128 px", *sheets[amount.side]]
        return rows, beside

    def memory(self) -> list[Memory]:
        """In fresh processes, once."""
        file = self.directory / "memory.json"
        if not file.exists():
            with self.stages.stage("memory"):
                write_json(file, [asdict(one) for one in measure_fresh(SIDES)])
        return [Memory(**one) for one in json.loads(file.read_text())]

    def differences(self, native: Sequence[Image.Image], made: Sequence[Image.Image]) -> dict[str, Any]:
        """The cascade's scores against the native picture's, with 95% intervals."""
        captions = [scene.caption for scene in self.scenes]
        ours, theirs = (
            [judge_scene(*pair) for pair in zip(captions, pictures, strict=False)] for pictures in (made, native)
        )
        return {
            name: asdict(paired_bootstrap([score[name] for score in ours], [score[name] for score in theirs]))
            for name in ("objects", "coherence")
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", type=Path, default=Path("runs/marks/runs/hybrid/adapter"))
    parser.add_argument("--directory", type=Path, default=Path("runs/high_resolution"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--captions", type=int, default=Amount.captions, help="at 512 px")
    parser.add_argument(
        "--few-captions", type=int, default=Amount.few_captions, help="at 1024 px, and generated directly"
    )
    options = parser.parse_args()
    if not options.adapter.exists():
        raise SystemExit(f"{options.adapter} is not there: run `make marks` first, or name an --adapter")
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    amount = Amount(captions=options.captions, few_captions=options.few_captions)
    run = HighResolution(path(), options.adapter, options.directory, amount)
    rows, beside = run.run()
    text = report(amount.side, amount.largest, rows, beside, run.plan(amount.side))
    write_json(
        options.results / "high_resolution.json",
        {"amount": asdict(amount), "rows": [asdict(row) for row in rows], **beside},
    )
    shown = list(zip(*(made[: min(8, amount.few_captions)] for made in run.sheet), strict=True))
    write_sheet(run.sheet_names, shown, options.results / "high_resolution.png")
    write_whole(options.results / "high_resolution.md", lambda temporary: temporary.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
