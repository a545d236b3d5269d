"""Pictures larger than the small model's own: `make high-resolution`, hours on two idle cores, resumable.

The cascade with a student against direct generation, against the 128 px picture enlarged by Lanczos, and against an
oracle: the drawing itself, through the VAE. Does each picture still follow its caption, is it coherent, and how sharp
are its objects? And how much memory does the cascade take? Writes benchmarks/results/high_resolution.json, .md and
.png, again after every row.

The student is a hybrid without training; --adapter names another. Direct generation is for a few captions only.
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
from high_resolution_memory import SIDES, measure_fresh
from high_resolution_report import Row, report
from PIL import Image
from tqdm import tqdm

from lineardit import Clear, HighResolutionPipeline, Hybrid, ProxyTokens, linearize_
from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.cost import step_call, time_call
from lineardit.distill.files import write_json
from lineardit.distill.metrics import paired_bootstrap, psnr, ssim
from lineardit.distill.pictures import PictureSettings
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.describe import describe_attention
from lineardit.linearize.folders import sha256, write_atomically
from lineardit.pipelines.pictures import enlarged
from lineardit.pipelines.plan import Plan, Settings
from lineardit.pipelines.vae import decode, encode
from lineardit.scene_judge import judge_scene
from lineardit.work_log import WorkLog, describe_machine

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).with_name("results")
# At 1024 px, 256 x 256 tokens, a proxy stands for 8 x 8, half the window's radius: wider cells would be visible.
STUDENT = Hybrid(local=Clear(radius=16), global_=ProxyTokens(num_proxies=1024), gate=1.0, focus_tokens=256)
SHOWN = 6  # captions on the sheet
COLOURFUL = 0.2  # max - min of a pixel: objects are above, backgrounds below 0.18
Draw = Callable[[int], Image.Image]  # the picture of one caption


@dataclass(frozen=True, kw_only=True)
class Amount:
    """The amount of work."""

    native: int = 128  # pixels
    side: int = 512
    captions: int = 64
    largest: int = 1024
    few_captions: int = 8
    steps: int = 28
    text_tokens: int = 64
    settings: Settings = field(default_factory=Settings)


def open_student(base: Path, adapter: Path | None) -> Any:
    """The pipeline of this adapter; None: the base with `STUDENT`."""
    pipe = open_pipeline(adapter or base)
    if adapter is None:
        linearize_(pipe, STUDENT)
    return pipe


def sharpness(picture: Image.Image) -> float | None:
    """Mean gradient per pixel, of 255, at the borders of objects; None without objects."""
    pixels = numpy.asarray(picture.convert("RGB"), numpy.float32)
    mask = pixels.max(-1) - pixels.min(-1) > 255 * COLOURFUL
    down, right = numpy.gradient(pixels, axis=(0, 1))
    slope = numpy.sqrt(down**2 + right**2).max(-1)
    border = numpy.zeros_like(mask)
    border[:-1] |= mask[:-1] != mask[1:]
    border[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    return float(slope[border].mean()) if border.any() else None


class HighResolution:
    """One run, in its own folder: every picture is a file, and existing files are not made again.

    `adapter` is the student's; None: `STUDENT`.
    """

    def __init__(self, base: Path, adapter: Path | None, directory: Path, amount: Amount) -> None:
        self.teacher, self.student = open_pipeline(base), open_student(base, adapter)
        self.attention = describe_attention(self.student)
        sources = [base] if adapter is None else [base, adapter]
        weights = [sha256(file)[:8] for source in sources for file in sorted(source.rglob("*.safetensors"))]
        self.directory, self.amount = directory, amount
        self.scenes = [scenes.sample(index, split="held_out") for index in range(amount.captions)]
        self.cascade = HighResolutionPipeline.from_pipe(self.student, native_size=amount.native)
        content = {"steps": amount.steps, "text_tokens": amount.text_tokens, "weights": weights}
        plans = [self.plan(side).recipe() for side in (amount.side, amount.largest)]
        self.work = WorkLog(directory, content | {"attention": self.attention, "plans": plans})
        for pipe in (self.teacher, self.cascade, self.student):
            pipe.set_progress_bar_config(disable=True)
        self.images_by_row: dict[tuple[str, int], list[Image.Image]] = {}  # by row and pixels
        self.rows: list[Row] = []
        self.measurements: dict[str, Any] = {}

    def pictures(self, name: str, side: int, count: int, draw: Draw) -> list[Image.Image]:
        """Pictures of the first `count` captions, drawn or read."""
        folder = self.directory / f"{name} {side}".replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        images = []
        with self.work.timed(f"{name}, {side} px"):
            for index in tqdm(range(count), desc=f"{name}, {side} px", unit="picture"):
                file = folder / f"{index:03d}.png"
                if not file.exists():
                    image = draw(index)
                    write_atomically(file, lambda temporary, image=image: image.save(temporary, format="PNG"))
                with Image.open(file) as image:
                    images.append(image.convert("RGB"))
        return images

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

    def draw_cascade(self, side: int, index: int) -> Image.Image:
        """The cascade's picture; every stage's picture is saved too."""
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

    def last_stage(self, attention: str, index: int) -> Image.Image:
        """The last stage's picture with "converted" or "original" attention, from that of the stage before."""
        plan = self.plan(self.amount.side)
        with Image.open(self.directory / "stages" / f"{index:03d}-{plan.stages[-2].width}.png") as opened:
            before = opened.convert("RGB")
        return self.cascade(
            self.scenes[index].caption,
            image=before,
            plan=replace(plan, stages=(replace(plan.stages[-1], attention=attention),)),
            max_sequence_length=self.amount.text_tokens,
            generator=torch.Generator("cpu").manual_seed(index),
        ).images[0]

    def row(self, name: str, side: int, images: Sequence[Image.Image]) -> Row:
        scores = [judge_scene(scene.caption, image) for scene, image in zip(self.scenes, images, strict=False)]
        edges = [edge for image in images if (edge := sharpness(image)) is not None]
        objects = [score["objects"] for score in scores]
        return Row(
            name=name,
            side=side,
            pictures=len(images),
            objects=sum(right for right, _ in objects) / sum(total for _, total in objects),
            coherence=sum(score["coherence"][0] for score in scores) / len(scores),
            sharpness=sum(edges) / len(edges) if edges else 0.0,
        )

    def run(self, on_update: Callable[[], None]) -> None:
        """All rows and other measurements, those of the marks first; `on_update` is called after each."""
        amount = self.amount
        few_captions = amount.few_captions
        self.add("teacher", amount.native, amount.captions, self.native)
        self.add_cascade(amount.side, amount.captions)
        on_update()
        measures = {"last stage": self.last_stage_similarity, "step seconds": self.step_seconds, "memory": self.memory}
        for name, measure in measures.items():
            self.measurements[name] = measure()
            on_update()
        self.add_cascade(amount.largest, few_captions)
        on_update()
        for side in (amount.side, amount.largest):
            self.add(
                "direct, student", side, few_captions, lambda index, side=side: self.direct(self.student, side, index)
            )
            on_update()
        self.add(
            "direct, teacher", amount.side, few_captions, lambda index: self.direct(self.teacher, amount.side, index)
        )
        on_update()

    def add_cascade(self, side: int, count: int) -> None:
        """The cascade's row, and those that it is compared with."""
        self.add("Lanczos", side, count, lambda index: self.enlarged(index, side))
        self.add("Lanczos, sharpened", side, count, lambda index: self.enlarged_and_sharpened(index, side))
        self.add("oracle", side, count, lambda index: self.oracle(side, index))
        self.add("cascade, student", side, count, lambda index: self.draw_cascade(side, index))

    def add(self, name: str, side: int, count: int, draw: Draw) -> None:
        """Add a row, its pictures drawn or read."""
        self.images_by_row[name, side] = self.pictures(name, side, count, draw)
        self.rows.append(self.row(name, side, self.images_by_row[name, side]))
        if (name, side) == ("cascade, student", self.amount.side):
            self.measurements["differences"] = self.differences()

    def enlarged(self, index: int, side: int) -> Image.Image:
        return self.images_by_row["teacher", self.amount.native][index].resize((side, side), Image.Resampling.LANCZOS)

    def enlarged_and_sharpened(self, index: int, side: int) -> Image.Image:
        """Enlarged as by the cascade's stages, without the model."""
        picture = self.images_by_row["teacher", self.amount.native][index]
        for stage in self.plan(side).stages[1:]:
            picture = enlarged(picture, stage.width, stage.height, stage.sharpen)
        return picture

    def last_stage_similarity(self) -> dict[str, float]:
        """Similarity of the last stage by the student to that by the dense teacher."""
        side, few = self.amount.side, self.amount.few_captions
        images = [
            self.pictures(
                f"last stage, {name}", side, few, lambda index, attention=attention: self.last_stage(attention, index)
            )
            for name, attention in (("student", "converted"), ("teacher", "original"))
        ]
        pairs = list(zip(*images, strict=True))
        scores = {name: sum(one(*pair) for pair in pairs) / few for name, one in (("psnr", psnr), ("ssim", ssim))}
        return scores | {"captions": few}

    def step_seconds(self) -> dict[str, Any]:
        """Medians of two steps of the teacher's and three of the student's, alternating."""
        side = self.amount.largest
        settings = PictureSettings(height=side, width=side, max_sequence_length=self.amount.text_tokens)

        def measure() -> dict[str, Any]:
            student, teacher = step_call(self.student, settings), step_call(self.teacher, settings)
            student()  # builds the tables of this size; the teacher has none
            seconds = [time_call(step) for step in (student, teacher, student, teacher, student)]
            medians = {"student": median(seconds[::2]), "teacher": median(seconds[1::2])}
            return medians | {"seconds": seconds, "machine": describe_machine()}

        return self.measure_once("step seconds", measure)

    def memory(self) -> list[dict[str, Any]]:
        """Peak memory, in fresh processes."""
        return self.measure_once("memory", lambda: [asdict(one) for one in measure_fresh(SIDES)])

    def measure_once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A measurement, made now or by an earlier run in this folder."""
        file = self.directory / f"{name.replace(' ', '_')}.json"
        if not file.exists():
            with self.work.timed(name):
                write_json(file, measure())
        return json.loads(file.read_text())

    def differences(self) -> dict[str, Any]:
        """The cascade's scores against the native picture's, with 95% intervals."""
        amount = self.amount
        captions = [scene.caption for scene in self.scenes]
        ours, theirs = (
            [judge_scene(*pair) for pair in zip(captions, self.images_by_row[key], strict=True)]
            for key in (("cascade, student", amount.side), ("teacher", amount.native))
        )
        return {
            name: asdict(paired_bootstrap([score[name] for score in ours], [score[name] for score in theirs]))
            for name in ("objects", "coherence")
        }


def write_results(results: Path, run: HighResolution) -> str:
    """Write high_resolution.json, .md and .png of the rows made so far; returns the report."""
    amount = run.amount
    results.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in run.rows]
    about = {"amount": asdict(amount), "attention": run.attention}
    write_json(results / "high_resolution.json", {**about, "rows": rows, **run.measurements})
    count = min(SHOWN, amount.captions)
    shown = {
        f"{name}, {side} px": images[:count]
        for (name, side), images in run.images_by_row.items()
        if side != amount.largest and len(images) >= count
    }
    write_sheet(list(shown), list(zip(*shown.values(), strict=True)), results / "high_resolution.png")
    description = f"{run.attention}\n{run.plan(amount.largest)}"
    text = report(amount.side, amount.largest, run.rows, run.measurements, description)
    write_atomically(results / "high_resolution.md", lambda temporary: temporary.write_text(text))
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--adapter", type=Path, help="of another student")
    parser.add_argument("--directory", type=Path, default=Path("runs/high_resolution"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--captions", type=int, default=Amount.captions, help="at 512 px")
    parser.add_argument(
        "--few-captions", type=int, default=Amount.few_captions, help="at 1024 px, and generated directly"
    )
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    amount = Amount(captions=options.captions, few_captions=options.few_captions)
    run = HighResolution(path(), options.adapter, options.directory, amount)
    run.run(lambda: print(write_results(options.results, run)))


if __name__ == "__main__":
    main()
