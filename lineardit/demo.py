"""The whole workflow on the small model that comes with the repository: convert, distill, judge, generate.

It can be interrupted; when called again, it resumes where it stopped.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .distill.config_tables import as_toml
from .distill.cost import paired_step_seconds
from .distill.evaluate import Comparison, Scores, compare, score_totals
from .distill.files import write_json
from .distill.launch import launch
from .distill.pictures import Pictures, PictureSettings, make_pictures
from .distill.prepare import prepare
from .distill.sheet import write_sheet
from .examples.tiny_flux import path, scenes
from .linearize.adapters.conversion import convert_base
from .linearize.adapters.opening import open_pipeline
from .linearize.folders import sha256
from .linearize.methods import Clear, Hybrid, ProxyTokens, config_to_dict
from .pipelines.generate import generate
from .scene_judge import judge_scene
from .work_log import WorkLog, matmul_gflops

TEXT_TOKENS = 64
REPORT, SHEET, LARGE, SPEED = "report.json", "teacher-converted-distilled.png", "512x512.png", "speed.json"
CONVERTED, RUN, HYBRID = "converted", "run", "hybrid"  # folders of the students

CONFIG = """\
# Settings of the distillation; every table and key: lineardit/distill/config.py
[base]
model = {base}

[data]
directory = {samples}

[method]
{method}

[trained]
kind = "attention"
projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

[loss]
flow = 0.1
prediction = 1.0
attention = 1.0

[run]
directory = {run}
steps = {steps}
batch_size = 4

[optimizer]
lr = {lr}

[schedule]
warmup = 10

[save]
every = 50
log_every = 25

[validate]
samples = 0
"""


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """How much a demonstration does; the defaults take about ten minutes on two idle cores."""

    radius: float = 4
    proxies: int = 256  # of the hybrid, for tokens outside the radius
    focus_tokens: int = 256
    samples: int = 32  # made by the teacher for its student
    sample_steps: int = 16  # denoising steps of each
    train_steps: int = 80  # of local attention; the hybrid needs none here
    learning_rate: float = 1e-3
    captions: int = 16  # held out, to judge teacher and student
    side: int = 128  # pixels, of samples and judged pictures
    steps: int = 16
    large_side: int = 512  # pixels
    pairs: int = 3  # of steps timed at the large side


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in the table: its scores, and how far its pictures are from the teacher's (None: the teacher)."""

    name: str
    scores: dict[str, tuple[int, int]]
    seconds_per_picture: float
    comparison: Comparison | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Warm transformer steps at the large side, and a figure to compare machines by.

    Attributes:
        pairs: (teacher, student) in seconds, measured alternately.
        gflops: Speed of a float32 product of 1024 x 1024 matrices.
        threads: Number that torch uses.
    """

    pairs: tuple[tuple[float, float], ...]
    gflops: float
    threads: int

    @property
    def ratio(self) -> float:
        """How many times faster the student's step is: the median over pairs."""
        return median(teacher / student for teacher, student in self.pairs)


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Results of a demonstration, and the seconds that it took over all calls."""

    directory: Path
    rows: tuple[Row, ...]
    speed: Speed
    seconds: float
    cpu_seconds: float


def demo(
    directory: str | Path = "demo",
    *,
    base: str | Path | None = None,
    settings: DemoSettings | None = None,
) -> DemoReport:
    """Convert the small pipeline to local attention and to a hybrid, distill the first, judge both, generate.

    Args:
        directory: Folder for all output; an interrupted demonstration is resumed.
        base: The pipeline; None: the trained one of the repository.
        settings: None: the defaults.
    Raises:
        ValueError: the pipeline does not exist, or the folder holds something else.
    """
    base, directory, settings = Path(base or path()), Path(directory), settings or DemoSettings()
    if not (base / "model_index.json").is_file():
        raise ValueError(f"no pipeline in {base}: the demonstration needs the pipeline in a clone of the repository")
    work = WorkLog(directory, asdict(settings) | {"base": _digest(base)})
    local, proxies = Clear(radius=settings.radius), ProxyTokens(num_proxies=settings.proxies)
    hybrid = Hybrid(local=local, global_=proxies, gate=1.0, focus_tokens=settings.focus_tokens)
    sources = {"teacher": base}
    with work.timed("convert"):
        sources["converted"] = _convert(base, directory / CONVERTED, local)
        untrained = _convert(base, directory / HYBRID, hybrid)
    with work.timed("prepare: the teacher makes samples"):
        _prepare(base, directory, settings)
    with work.timed("distill"):
        sources["distilled"] = _distill(base, directory, local, settings)
        sources["hybrid"] = untrained
    with work.timed("judge"):
        rows = _judge(sources, directory, settings)
    with work.timed("generate"):
        _large_picture(untrained, directory, settings)
    with work.timed("time the steps"):
        speed = _speed(base, sources["distilled"], directory, settings)
    report = DemoReport(directory=directory, rows=rows, speed=speed, **work.total())
    write_json(directory / REPORT, asdict(report) | {"directory": str(directory), "ratio": speed.ratio})
    return report


def _digest(base: Path) -> str:
    return " ".join(sha256(file)[:8] for file in sorted(base.rglob("*.safetensors")))


def _convert(base: Path, folder: Path, method: Any) -> Path:
    if not folder.exists():
        convert_base(base, method, output=folder)
    return folder


def _prepare(base: Path, directory: Path, settings: DemoSettings) -> None:
    prepare(
        open_pipeline(base),
        [scenes.sample(index).caption for index in range(settings.samples)],
        directory / "samples",
        sizes=[(settings.side, settings.side)],
        steps=settings.sample_steps,
        max_sequence_length=TEXT_TOKENS,
        shard_size=16,
    )


def _distill(base: Path, directory: Path, method: Any, settings: DemoSettings) -> Path:
    adapter = directory / RUN / "adapter"
    if adapter.exists():
        return adapter
    config = directory / "distill.toml"
    quoted = {"base": base, "samples": directory / "samples", "run": directory / RUN}
    config.write_text(
        CONFIG.format(
            method="\n".join(f"{key} = {as_toml(value)}" for key, value in config_to_dict(method).items()),
            steps=settings.train_steps,
            lr=settings.learning_rate,
            **{name: json.dumps(str(one)) for name, one in quoted.items()},
        )
    )
    if launch(config, ("--resume", "latest")):
        raise RuntimeError("the distillation failed; its error is above")
    return adapter


def _judge(sources: dict[str, Path], directory: Path, settings: DemoSettings) -> tuple[Row, ...]:
    captions = [scenes.sample(index, split="held_out").caption for index in range(settings.captions)]
    picture_settings = PictureSettings(
        height=settings.side, width=settings.side, steps=settings.steps, max_sequence_length=TEXT_TOKENS
    )
    pictures: dict[str, Pictures] = {}
    scores: dict[str, list[Scores]] = {}
    for name, source in sources.items():
        pictures[name] = make_pictures(
            open_pipeline(source), captions, directory / "pictures", picture_settings, name=name
        )
        scores[name] = [judge_scene(*pair) for pair in zip(captions, pictures[name].images, strict=True)]
    write_sheet(list(pictures), list(zip(*(one.images for one in pictures.values()), strict=True)), directory / SHEET)
    return tuple(
        Row(
            name=name,
            scores=score_totals(scores[name]),
            seconds_per_picture=pictures[name].seconds,
            comparison=None
            if name == "teacher"
            else compare(pictures[name], pictures["teacher"], scores[name], scores["teacher"]),
        )
        for name in sources
    )


def _large_picture(adapter: Path, directory: Path, settings: DemoSettings) -> None:
    picture = directory / LARGE
    if not picture.exists():
        size = settings.large_side, settings.large_side
        caption = scenes.sample(0, split="held_out").caption
        generate(
            open_pipeline(adapter), [caption], picture, size=size, steps=settings.steps, max_sequence_length=TEXT_TOKENS
        )


def _speed(base: Path, adapter: Path, directory: Path, settings: DemoSettings) -> Speed:
    file = directory / SPEED
    if not file.exists():
        side = settings.large_side
        picture_settings = PictureSettings(height=side, width=side, max_sequence_length=TEXT_TOKENS)
        pairs = paired_step_seconds(open_pipeline(base), open_pipeline(adapter), picture_settings, pairs=settings.pairs)
        write_json(file, {"pairs": pairs, "gflops": matmul_gflops(), "threads": torch.get_num_threads()})
    stored = json.loads(file.read_text())
    return Speed(pairs=tuple(map(tuple, stored["pairs"])), gflops=stored["gflops"], threads=stored["threads"])
