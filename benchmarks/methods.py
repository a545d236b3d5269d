"""Methods side by side on the small trained model, equal training for all: `make methods`, many hours, resumable.

Each method of `METHODS` is distilled with the same number of steps on the same samples and the same number of trained
parameters (the rank of its LoRA makes up for the parameters of its kernels), from three seeds. Every hybrid is paired
with local attention of equal FLOPs.

Writes benchmarks/results/methods.json, methods.md, methods.png, and in methods/ each row and a strip of its pictures,
as rows are done: first all with one seed, then with two, then with three. Existing rows and students of the same plan
are not made again: the table can be made in parts (`--only`), also on several machines whose methods/ are then copied
together.
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

from flux_layer import flops, title, window_of_equal_flops
from marks_report import Row
from methods_files import read_table, write_proposals, write_row, write_table
from methods_report import MethodRow, Table, as_markdown, folder_name
from scene_students import ScenePlan, SceneStudents

from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.config import DistillConfig
from lineardit.distill.config_tables import config_from_tables
from lineardit.distill.cost import paired_step_seconds
from lineardit.distill.files import write_json
from lineardit.distill.pictures import PictureSettings
from lineardit.distill.student import KERNEL, build_student_, trained_parameters
from lineardit.distill.train import load_teacher
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.families import family_of
from lineardit.linearize.matching import attention_modules
from lineardit.linearize.measures.attention_profile import Profile, read_profile
from lineardit.linearize.measures.budget import propose
from lineardit.linearize.measures.profiling import profile_attention
from lineardit.linearize.methods import (
    Agent,
    Clear,
    Hybrid,
    Mala,
    Neighborhood,
    ProxyTokens,
    Rala,
    SlidingTile,
    config_to_dict,
)
from lineardit.work_log import describe_machine

RESULTS = Path(__file__).with_name("results")
SINGLE = "single_transformer_blocks.*.attn"  # five of the small model's eight attention modules

# a config, or {pattern: config} where the other layers keep full attention
METHODS: tuple[Any, ...] = (
    Clear(radius=4),
    Hybrid(local=Clear(radius=4), global_=ProxyTokens(num_proxies=256), gate=1.0, focus_tokens=256),
    Hybrid(local=Clear(radius=4), global_=ProxyTokens(num_proxies=256), gate=1.0),
    Hybrid(local=Clear(radius=4), global_=ProxyTokens(num_proxies=64), gate=1.0),
    Hybrid(local=Clear(radius=4), global_=Agent(num_agents=64), gate=1.0),
    Hybrid(local=Clear(radius=4), global_=Mala(), gate=1.0),
    {SINGLE: Agent(num_agents=64, conv_size=5, balance=True)},
    {SINGLE: Mala(conv_size=5, balance=True)},
    Agent(num_agents=64, conv_size=5, balance=True),
    Mala(conv_size=5, balance=True),
    Rala(conv_size=5, balance=True),
    ProxyTokens(num_proxies=64),
    Clear(radius=8),
    Clear(radius=4, pool_tokens=64),
    Neighborhood(window=7),
    SlidingTile(tile=4, window=3),
)
PROPOSALS = "proposals"
PROJECTIONS = ("to_q", "to_k", "to_v")  # every attention module has these
QUICK = (Clear(radius=4), Mala())


@dataclass(frozen=True, kw_only=True)
class Plan(ScenePlan):
    """The amount of work."""

    steps: int = 20
    train_steps: int = 200
    layer_steps: int = 40  # of the first phase, layer by layer
    layer_rate: float = 1e-3
    flow: float = 0.1  # weight of the flow loss
    seeds: tuple[int, ...] = (0, 1, 2)
    trained: int = 220_000  # parameters of each student, to be met within 5%
    step_side: int = 512  # pixels, for seconds a step
    budgets: tuple[float, ...] = (3, 4, 5, 6, 8)  # uniform radii whose FLOPs the profile's proposals get
    profiled: int = 8  # prompts
    shown: int = 8  # captions in the picture of all methods


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A method on the base, with the LoRA rank that gives as many trained parameters as in every other row.

    Attributes:
        trained: Number of these parameters.
        layers: The config of each self-attention module of the image, None for one that keeps full attention.
    """

    rank: int
    trained: int
    layers: tuple[Any, ...]


class MethodTable(SceneStudents):
    """One run of all rows, in its own folder."""

    plan: Plan

    def run(
        self,
        methods: Sequence[Any],
        seeds: tuple[int, ...],
        results: Path,
        only: Callable[[str], bool] = lambda _: True,
    ) -> Table:
        """Make rows whose title passes `only` with students of these seeds; add those in `results`."""
        with self.work.timed("teacher's pictures"):
            self.draw("teacher", self.base, self.plan.captions)
        with self.work.timed("samples"):
            self.prepare()
        rivals = {title(one): window_of_equal_flops(one) for one in methods if type(one) is Hybrid}
        entries = {title(one): one for one in (*methods, *rivals.values())}
        table = Table(
            plan=self.work.record["settings"] | {"seeds": list(self.plan.seeds)},
            teacher=self.row("teacher"),
            order=tuple(entries),
            rivals={name: title(rival) for name, rival in rivals.items()},
        )
        table = read_table(results, table)
        for name, method in entries.items():
            existing = table.rows.get(name)
            if only(name) and (existing is None or len(existing.students) < len(seeds)):
                row = (
                    self.make_row(name, method, seeds) if existing is None else self.add_seeds(existing, method, seeds)
                )
                first = self.judged.get(row.students[0].name)  # None: drawn by the call that made the row
                write_row(results, table, row, first.pictures.images[: self.plan.shown] if first else ())
                table = read_table(results, table)  # another process may have made others
                write_table(results, table)
        if table.proposals is None and only(PROPOSALS):
            write_proposals(results, table, self.proposals())
        table = read_table(results, table)
        write_table(results, table)
        return table

    def make_row(self, name: str, method: Any, seeds: tuple[int, ...]) -> MethodRow:
        """One row: untrained, and a student for each seed."""
        plan = self.plan
        untrained = self.converted(name, method)
        with self.work.timed(f"{name}, untrained"):
            self.draw(f"{name}, untrained", untrained, plan.few_captions)
            seconds, teacher_seconds = self.seconds(name, untrained)
        fit = self.fit(method)
        return MethodRow(
            name=name,
            flops=round(sum(map(flops, fit.layers)) / len(fit.layers)),
            swapped=sum(one is not None for one in fit.layers),
            layers=len(fit.layers),
            trained=fit.trained,
            seconds_per_step=seconds,
            seconds_of_teacher=teacher_seconds,
            machine=describe_machine(),
            untrained=self.row(f"{name}, untrained"),
            students=self.students(name, method, fit, seeds),
        )

    def add_seeds(self, row: MethodRow, method: Any, seeds: tuple[int, ...]) -> MethodRow:
        """A row that has students of the first of these seeds, extended by those of the others."""
        further = self.students(row.name, method, self.fit(method), seeds[len(row.students) :])
        return replace(row, students=(*row.students, *further))

    def students(self, name: str, method: Any, fit: Fit, seeds: tuple[int, ...]) -> tuple[Row, ...]:
        rows = []
        for seed in seeds:
            student = f"{name}, seed {seed}"
            with self.work.timed(student):
                adapter = self.trained_adapter(self.config(method, fit.rank, seed))
                self.draw(student, adapter, self.plan.captions)
            rows.append(self.row(student))
        return tuple(rows)

    def converted(self, name: str, method: Any) -> Path:
        """The folder of the untrained conversion."""
        return self.untrained_adapter(method, Path("converted", folder_name(name)))

    def seconds(self, name: str, source: Path) -> tuple[float, float]:
        """Seconds of a step and of the teacher's, alternating: medians of three, measured once."""
        plan, file = self.plan, self.directory / "seconds of a step" / f"{folder_name(name)}.json"
        if not file.exists():
            length = plan.text_tokens
            settings = PictureSettings(height=plan.step_side, width=plan.step_side, max_sequence_length=length)
            pairs = paired_step_seconds(open_pipeline(source), open_pipeline(self.base), settings, pairs=3)
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"seconds": [median(one) for one in zip(*pairs, strict=True)]})
        ours, teachers = json.loads(file.read_text())["seconds"]
        return float(ours), float(teachers)

    def fit(self, method: Any) -> Fit:
        """The layers' configs with this method, and the rank for the plan's trained parameters.

        Raises:
            ValueError: no rank brings the trained parameters within 5% of the plan's number.
        """
        config, target = self.config(method, 1, 0), self.plan.trained
        pipe = load_teacher(config.base)
        modules, _ = attention_modules(pipe.transformer, family_of(pipe.transformer))
        swapped = build_student_(pipe, config).swapped
        counts = {name: one.numel() for name, one in trained_parameters(pipe.transformer).items()}
        kernels = sum(count for name, count in counts.items() if KERNEL in name)
        per_rank = sum(counts.values()) - kernels
        rank = max(1, round((target - kernels) / per_rank))
        trained = kernels + rank * per_rank
        if abs(trained / target - 1) > 0.05:
            raise ValueError(f"{title(method)}: {trained} trained parameters, not within 5% of {target}")
        return Fit(rank=rank, trained=trained, layers=tuple(swapped.get(name) for name in modules))

    def config(self, method: Any, rank: int, seed: int) -> DistillConfig:
        """The config of one student's training, the same for all but method, rank and seed."""
        plan = self.plan
        patterns = method if isinstance(method, Mapping) else {"*": method}
        settings = {
            "method": {pattern: config_to_dict(one) for pattern, one in patterns.items()},
            "trained": {"kind": "lora", "rank": rank, "projections": PROJECTIONS},
            "loss": {"flow": plan.flow, "prediction": 1.0, "attention": 1.0},
            "layerwise": {"steps": plan.layer_steps, "lr": plan.layer_rate},
        }
        return config_from_tables(self.tables(folder_name(f"{title(method)}-{seed}"), seed) | settings)

    def proposals(self) -> tuple[tuple[Row, Row], ...]:
        """One radius for all layers, and the profile's proposal of equal FLOPs at this size, without training."""
        pairs = []
        with self.work.timed("proposals of the profile"):
            profile = self.profile()
            for radius in self.plan.budgets:
                uniform = Clear(radius=radius)
                proposal = propose(profile, uniform).configs
                rows = []
                for name, method in ((f"radius {radius:g}", uniform), (f"proposal at {radius:g}", proposal)):
                    self.draw(name, self.converted(name, method), self.plan.few_captions)
                    rows.append(self.row(name))
                pairs.append((rows[0], rows[1]))
        return tuple(pairs)

    def profile(self) -> Profile:
        file, plan = self.directory / "profile.json", self.plan
        if not file.exists():
            prompts = [scenes.sample(plan.samples + index).caption for index in range(plan.profiled)]
            radii = sorted({2, 3, 4, 6, 8, 12, 16, *plan.budgets})
            size = (plan.side, plan.side)
            length = plan.text_tokens
            pipe = open_pipeline(self.base)
            profile_attention(pipe, prompts, size=size, radii=radii, max_sequence_length=length).write(file)
        return read_profile(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, help="pictures, samples, students")
    parser.add_argument(
        "--results", type=Path, help="default: benchmarks/results; in the directory with --quick, --calls"
    )
    parser.add_argument("--quick", action="store_true", help="two methods, two steps, two captions: does it run?")
    parser.add_argument("--captions", type=int, default=Plan.captions, help="held out; another number, another table")
    parser.add_argument(
        "--calls", type=int, default=0, help="learn from so many kept calls of each sample, as models without a row do"
    )
    parser.add_argument(
        "--rate", type=float, default=Plan.learning_rate, help="learning rate of both phases; another table"
    )
    parser.add_argument("--flow", type=float, default=Plan.flow, help="weight of the flow loss; another table")
    parser.add_argument("--seeds", type=int, default=len(Plan.seeds), help="stop after so many")
    parser.add_argument(
        "--only", action="append", metavar="GLOB", help=f"rows with this title, or {PROPOSALS!r}; repeatable"
    )
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    few = min(options.captions, Plan.few_captions)
    plan = replace(
        quick_plan() if options.quick else Plan(captions=options.captions, few_captions=few),
        learning_rate=options.rate,
        layer_rate=options.rate,
        flow=0.0 if options.calls else options.flow,  # kept calls have no clean latents
    )
    name = "methods-quick" if options.quick else f"methods-{options.calls}-calls" if options.calls else "methods"
    directory = options.directory or Path("runs", name)
    table = MethodTable(path(), directory, plan, calls=options.calls)
    results = options.results or (directory / "results" if options.quick or options.calls else RESULTS)
    globs = options.only or ["*"]
    methods = QUICK if options.quick else METHODS
    titles = [*map(title, methods), *(title(window_of_equal_flops(one)) for one in methods if type(one) is Hybrid)]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in (*titles, PROPOSALS)):
            parser.error(f"--only {glob!r} is none of: {PROPOSALS}; {'; '.join(titles)}")
    for count in range(1, min(options.seeds, len(plan.seeds)) + 1):
        made = table.run(
            methods,
            plan.seeds[:count],
            results,
            lambda name: any(fnmatchcase(name, glob) for glob in globs),
        )
        print(as_markdown(made))


def quick_plan() -> Plan:
    """A plan of minutes at most, whose figures mean nothing."""
    return Plan(
        side=64, steps=2, captions=2, few_captions=2, samples=4, train_steps=2, layer_steps=2, batch_size=2,
        seeds=(0,), step_side=64, budgets=(3,), profiled=1, shown=2,
    )  # fmt: skip


if __name__ == "__main__":
    main()
