"""The marks of the main job, on the small trained model: `make marks`, resumable.

Hours on two cores. Clear(radius=4), distilled from the model itself: does the student still follow held-out captions,
are its pictures still coherent, how near are its latents? The same for a hybrid, which adds 256 tokens in focus and 256
proxies for everything outside the window, and for a wider window that costs as much at FLUX.1's 4K shape (less here),
each from three seeds. For agent attention and MALA in every layer, and MALA in the layers where a profile proposes it:
do they follow captions? Writes benchmarks/results/marks.json, marks.md and marks.png, again after every row.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flux_layer import window_of_equal_flops
from marks_report import Mark, Row, as_markdown, follow_mark, rival_marks, student_marks, teacher_marks
from scene_students import ScenePlan, SceneStudents

from lineardit.commands.quiet import quiet_libraries
from lineardit.distill.config_tables import as_toml
from lineardit.distill.files import write_json
from lineardit.distill.launch import launch
from lineardit.distill.sheet import write_sheet
from lineardit.examples.tiny_flux import path, scenes
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.folders import write_atomically
from lineardit.linearize.measures.attention_profile import read_profile
from lineardit.linearize.measures.budget import propose
from lineardit.linearize.measures.profiling import profile_attention
from lineardit.linearize.methods import Agent, Clear, Hybrid, Mala, ProxyTokens, config_to_dict
from lineardit.work_log import describe_machine

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).with_name("results")
MALA = Mala(conv_size=5, balance=True)
WIDER = "window of equal cost"
PARTIAL_MALA = "mala in some layers"
FOLLOWERS = ("agent", "mala", PARTIAL_MALA)  # held to their captions, not to coherence
UNTRAINED = {  # rows of untrained conversions
    "default": "0 steps",
    "hybrid": "hybrid, 0 steps",
    "proxies alone": "proxies alone, 0 steps",
    "agent": "agent, 0 steps",
    "mala": "mala, 0 steps",
    PARTIAL_MALA: f"{PARTIAL_MALA}, 0 steps",
    WIDER: f"{WIDER}, 0 steps",
}
# In the picture
SHOWN = ("teacher", "0 steps", "default", WIDER, *FOLLOWERS, "hybrid, 0 steps", "hybrid")
TEACHER_512_TOKENS = "teacher, 512 text tokens"


class Student(NamedTuple):
    """What is trained, for how long, judged on how many captions before and after; changes to marks.toml's settings."""

    method: Any
    steps: int
    untrained_captions: int
    captions: int
    changes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan(ScenePlan):
    """The amount of work."""

    radius: float = 4
    proxies: int = 256  # of the hybrid
    focus_tokens: int = 256
    few_train_steps: int = 200  # of the secondary rows
    learning_rate: float = 3e-3
    hybrid_train_steps: int = 100  # it starts nearest; the same for the window of equal cost
    hybrid_learning_rate: float = 1e-4
    hybrid_captions: int = 128  # of the hybrid without training
    rival_learning_rate: float = 1e-3  # of the window of equal cost; of proxies, agent and mala, with few_train_steps
    layer_steps: int = 100  # of agent and mala, layer by layer, before few_train_steps, at the same rate
    some_budget: Any = 0.35  # of full attention's operations, for mala where it errs least, and the hybrid elsewhere
    profiled: int = 3  # pictures, for some_budget
    seeds: tuple[int, ...] = (0, 1, 2)  # of the hybrid and the window of equal cost
    shown: int = 12  # rows of the sheet


def row_name(name: str, seed: int) -> str:
    """The row's name; seed 0 is the student itself."""
    return name if seed == 0 else f"{name}, seed {seed}"


class Marks(SceneStudents):
    """One run of everything, in its own folder."""

    plan: Plan

    def run(self, report: Callable[[], None]) -> None:
        """All rows, the hybrid's first, the window's late; `report` is called after each."""
        plan = self.plan
        with self.work.timed("teacher's pictures"):
            self.draw("teacher", self.base, plan.captions)
        with self.work.timed("samples"):
            self.prepare()
        for name in ("hybrid", "proxies alone", WIDER, *FOLLOWERS):
            self.student(name, report)
        for seed in plan.seeds[1:]:
            for name in ("hybrid", WIDER):
                self.add_seed(name, seed)
                report()
        self.student("default", report)
        with self.work.timed("teacher with 512 text positions"):
            self.draw(TEACHER_512_TOKENS, self.base, plan.few_captions, text_tokens=512)
        report()

    def student(self, name: str, report: Callable[[], None]) -> None:
        """A row of the untrained conversion, and one of the student."""
        settings = self.students[name]
        with self.work.timed(f"pictures: {name} without training"):
            self.draw(UNTRAINED[name], self.converted(name, settings.method), settings.untrained_captions)
        report()
        with self.work.timed(f"distill: {name}"):
            self.distill(name, settings.method, settings.steps, *settings.changes)
        with self.work.timed(f"pictures: {name}"):
            self.draw(name, self.adapter(name), settings.captions)
        report()

    def add_seed(self, name: str, seed: int) -> None:
        """The same student with other noise and another order of the samples."""
        settings, student_name = self.students[name], row_name(name, seed)
        with self.work.timed(student_name):
            self.distill(student_name, settings.method, settings.steps, *settings.changes, f"run.seed={seed}")
            self.draw(student_name, self.adapter(student_name), self.plan.few_captions)

    @property
    def students(self) -> dict[str, Student]:
        plan = self.plan
        all_captions, few_captions, steps = plan.captions, plan.few_captions, plan.hybrid_train_steps
        fast, medium, slow = (
            f"optimizer.lr={rate}" for rate in (plan.learning_rate, plan.rival_learning_rate, plan.hybrid_learning_rate)
        )
        # The flow loss on the data pulls a student away from a teacher that it already matches.
        from_teacher = "loss.flow=0.0"
        by_layer = f"layerwise.steps={plan.layer_steps}", f"layerwise.lr={plan.rival_learning_rate}"
        follower_settings = plan.few_train_steps, few_captions, few_captions, (medium, from_teacher, *by_layer)
        return {
            "hybrid": Student(self.hybrid, steps, plan.hybrid_captions, all_captions, (slow, from_teacher)),
            "proxies alone": Student(
                self.hybrid_without_focus, plan.few_train_steps, few_captions, few_captions, (medium,)
            ),
            WIDER: Student(self.rival, steps, few_captions, few_captions, (medium,)),
            "agent": Student(Agent(num_agents=64, conv_size=5, balance=True), *follower_settings),
            "mala": Student(MALA, *follower_settings),
            PARTIAL_MALA: Student(self.some_layers, *follower_settings),
            "default": Student(self.local, plan.train_steps, all_captions, all_captions, (fast,)),
        }

    @property
    def local(self) -> Clear:
        return Clear(radius=self.plan.radius)

    @property
    def hybrid(self) -> Hybrid:
        """The window, and proxies or chosen tokens outside it."""
        return replace(self.hybrid_without_focus, focus_tokens=self.plan.focus_tokens)

    @property
    def hybrid_without_focus(self) -> Hybrid:
        return Hybrid(local=self.local, global_=ProxyTokens(num_proxies=self.plan.proxies), gate=1.0)

    @property
    def some_layers(self) -> Mapping[str, Any]:
        """MALA in the layers that a profile proposes under the budget, the hybrid in the others."""
        file, plan = self.directory / "profile.json", self.plan
        if not file.exists():
            captions = [scenes.sample(index).caption for index in range(plan.profiled)]
            drawing = {"size": (plan.side, plan.side), "max_sequence_length": plan.text_tokens}
            choices = (MALA, self.hybrid)
            with self.work.timed("profile"):
                profile_attention(open_pipeline(self.base), captions, methods=choices, steps=8, **drawing).write(file)
        profile = read_profile(file)
        return propose(profile, plan.some_budget, choices=profile.methods).configs

    @property
    def rival(self) -> Clear:
        """A wider window that costs as much as the hybrid, at FLUX.1's 4K shape."""
        return window_of_equal_flops(self.hybrid)

    def converted(self, name: str, method: Any) -> Path:
        """The folder of the untrained conversion."""
        return self.untrained_adapter(method, Path(name))

    def adapter(self, name: str) -> Path:
        return self.directory / "runs" / re.sub(r"[^\w.-]+", "-", name) / "adapter"

    def distill(self, name: str, method: Any, steps: int, *changes: str) -> None:
        """Train one student; `changes` are settings that differ from marks.toml's."""
        plan, adapter = self.plan, self.adapter(name)
        if adapter.exists():
            return
        overrides = [
            f"base.model={json.dumps(str(self.base))}",
            f"data.directory={json.dumps(str(self.directory / 'samples'))}",
            *(f"method.{key}={as_toml(value)}" for key, value in method_table(method).items()),
            f"run.directory={json.dumps(str(adapter.parent))}",
            f"run.steps={steps}",
            f"run.batch_size={plan.batch_size}",
            *changes,
        ]
        options = [word for pair in overrides for word in ("--set", pair)]
        if launch(Path(__file__).with_name("marks.toml"), ["--resume", "latest", *options]):
            raise RuntimeError(f"the distillation {name!r} failed; its error is above")

    def rows(self) -> list[Row]:
        return [self.row(name) for name in self.judged]

    def marks(self) -> list[Mark]:
        """Marks of the rows made so far."""
        marks = teacher_marks(
            self.row("teacher"), self.row(TEACHER_512_TOKENS) if TEACHER_512_TOKENS in self.judged else None
        )
        untrained = self.row(UNTRAINED["default"]) if UNTRAINED["default"] in self.judged else None
        for name in ("default", "hybrid"):
            if name in self.judged:
                marks += student_marks(name, self.row(name), untrained)
        marks += [follow_mark(name, self.row(name)) for name in FOLLOWERS if name in self.judged]
        names = [(row_name("hybrid", seed), row_name(WIDER, seed)) for seed in self.plan.seeds]
        pairs = [pair for pair in names if set(pair) <= self.judged.keys()]
        few_captions = self.plan.few_captions
        return marks + rival_marks(
            [(self.row(one, few_captions), self.row(other, few_captions)) for one, other in pairs]
        )


def method_table(method: Any) -> dict[str, Any]:
    """A config, or {pattern: config}, as distillation settings write it."""
    if isinstance(method, Mapping):
        return {pattern: config_to_dict(one) for pattern, one in method.items()}
    return config_to_dict(method)


def describe_layers(methods: Mapping[str, Any]) -> str:
    """Which layers have which method, in words."""
    names: dict[str, list[str]] = {}
    for pattern, method in methods.items():
        names.setdefault(type(method).__name__, []).append(pattern)
    return "; ".join(f"{name} in {', '.join(patterns)}" for name, patterns in names.items())


def write_results(results: Path, run: Marks) -> str:
    """Write marks.json, marks.md and marks.png of the rows made so far; returns the report."""
    rows, marks = run.rows(), run.marks()
    results.mkdir(parents=True, exist_ok=True)
    columns = [name for name in SHOWN if name in run.judged]
    shown = [run.judged[name].pictures.images[: run.plan.shown] for name in columns]
    write_sheet(columns, list(zip(*shown, strict=True)), results / "marks.png")
    total = run.work.total()
    machine = (
        f"Took {total['seconds'] / 60:.0f} minutes, {total['cpu_seconds'] / 60:.0f} CPU-minutes; {describe_machine()}."
    )
    content: dict[str, Any] = {
        "plan": asdict(run.plan),
        "marks": [asdict(mark) for mark in marks],
        "rows": [asdict(row) for row in rows],
        "stages": run.work.record,
    }
    write_json(results / "marks.json", content)
    plan = run.plan
    title = (
        f"Clear(radius={plan.radius:g}) on examples/tiny_flux, held-out captions at {plan.side}x{plan.side}, "
        f"{plan.steps} steps; students: {plan.train_steps} steps of {plan.batch_size} samples, "
        f"the hybrid and the window of equal cost at FLUX.1's 4K (radius {run.rival.radius:g}; here it looks at fewer "
        f"keys than the hybrid) {plan.hybrid_train_steps}, "
        f"proxies alone {plan.few_train_steps}, agent and mala as many after {plan.layer_steps} layer by layer "
        f"(in some layers: {describe_layers(run.some_layers)}). "
        f"{machine}"
    )
    report = as_markdown(title, rows, marks)
    write_atomically(results / "marks.md", lambda temporary: temporary.write_text(report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("runs/marks"), help="pictures, samples, students")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = Marks(path(), options.directory, Plan())
    run.run(lambda: print(write_results(options.results, run)))


if __name__ == "__main__":
    main()
