"""What `methods.py` measured, held against the marks; as a table, as JSON and as a plot."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from marks_report import Mark, Row
from matplotlib.figure import Figure

from lineardit.distill.files import write_json
from lineardit.distill.sheet import write_sheet
from lineardit.linearize.folders import write_whole


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method.

    Attributes:
        flops: Of the attention in a layer of FLUX.1 at 4096 x 4096 pixels, the mean over all layers.
        swapped: Of `layers`, how many have the method; the others keep full attention.
        trained: Parameters.
        seconds_per_step: One warm forward.
        untrained: The swap alone, over the first captions.
        students: One for each seed.
    """

    name: str
    flops: int
    swapped: int
    layers: int
    trained: int
    seconds_per_step: float
    untrained: Row
    students: tuple[Row, ...]

    def shares(self, score: str) -> list[float]:
        """Of right answers, for each seed."""
        return [student.share(score) for student in self.students]

    def latent_mses(self) -> list[float]:
        """To the teacher, for each seed."""
        return [_latent_mse(student) for student in self.students]


def hybrid_marks(teacher: Row, pairs: Sequence[tuple[MethodRow, MethodRow]]) -> list[Mark]:
    """Each hybrid against local attention of the same FLOPs, seed by seed, and in coherence against the teacher."""
    return [_hybrid_mark(teacher, hybrid, local) for hybrid, local in pairs]


def _hybrid_mark(teacher: Row, hybrid: MethodRow, local: MethodRow) -> Mark:
    coherence = list(zip(hybrid.shares("coherence"), local.shares("coherence"), strict=True))
    error = list(zip(hybrid.latent_mses(), local.latent_mses(), strict=True))
    behind = _points_below(teacher, hybrid, "coherence")
    return Mark(
        name=f"{hybrid.name} against {local.name}",
        target="more coherence and less latent MSE on every seed; coherence at most 2 points below the teacher",
        measured=f"coherence {_versus(coherence, _percent)}; latent MSE {_versus(error, '{:.4f}'.format)}; "
        f"{behind:.1f} points below the teacher",
        met=all(ours > theirs for ours, theirs in coherence)
        and all(ours < theirs for ours, theirs in error)
        and behind <= 2,
    )


def follow_marks(teacher: Row, rows: Sequence[MethodRow]) -> list[Mark]:
    """Objects of agent attention's and MALA's students against the teacher, each share of the layers by itself."""
    marks = []
    for row in rows:
        if row.name.startswith(("Agent(", "Mala(")):
            behind = _points_below(teacher, row, "objects")
            marks.append(
                Mark(
                    name=f"{row.name}: objects ({row.swapped} of {row.layers} layers)",
                    target="at most 5 points below the teacher",
                    measured=f"{behind:.1f} points below",
                    met=behind <= 5,
                )
            )
    return marks


def proposal_mark(pairs: Sequence[tuple[Row, Row]]) -> Mark:
    """Untrained: one radius for all layers, and the profile's proposal of the same FLOPs."""
    errors = [(_latent_mse(proposal), _latent_mse(uniform)) for uniform, proposal in pairs]
    names = [uniform.name for uniform, _ in pairs]
    told = [f"{name}: {_versus([pair], '{:.4f}'.format)}" for name, pair in zip(names, errors, strict=True)]
    return Mark(
        name="the profile's proposal against one radius, without training",
        target="less latent MSE at every budget",
        measured="; ".join(told),
        met=all(ours < theirs for ours, theirs in errors),
    )


def _points_below(teacher: Row, row: MethodRow, score: str) -> float:
    """Of the mean over seeds; rounded, so that a difference of just as much as a target meets it."""
    return round(100 * (teacher.share(score) - mean(row.shares(score))), 6)


def _latent_mse(row: Row) -> float:
    assert row.comparison is not None
    return row.comparison.latent_mse


def _versus(pairs: Sequence[tuple[float, float]], form: Callable[[float], str]) -> str:
    return ", ".join(f"{form(ours)} : {form(theirs)}" for ours, theirs in pairs)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean and standard deviation."""
    return form(mean(values)) + (f" ± {form(stdev(values))}" if len(values) > 1 else "")


def as_markdown(heading: str, teacher: Row, rows: Sequence[MethodRow], marks: Sequence[Mark]) -> str:
    """The report that people read."""
    lines = [
        "# Methods side by side",
        "",
        heading,
        "",
        "| mark | target | measured | met |",
        "| --- | --- | --- | --- |",
        *(f"| {m.name} | {m.target} | {m.measured} | {'yes' if m.met else '**no**'} |" for m in marks),
        "",
        "| # | method | layers | GFLOPs a layer | objects | coherence | latent MSE untrained | trained | s a step "
        "| parameters |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| | teacher | | | {_percent(teacher.share('objects'))} | {_percent(teacher.share('coherence'))} | | | | |",
    ]
    for number, row in enumerate(rows, start=1):
        cells = (
            str(number),
            row.name,
            f"{row.swapped}/{row.layers}",
            f"{row.flops / 1e9:,.0f}",
            _spread(row.shares("objects"), _percent),
            _spread(row.shares("coherence"), _percent),
            f"{_latent_mse(row.untrained):.4f}",
            _spread(row.latent_mses(), "{:.4f}".format),
            f"{row.seconds_per_step:.2f}",
            f"{row.trained:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "![quality against FLOPs](methods.png)", "", "![pictures](methods_pictures.png)", ""]
    return "\n".join(lines)


def plot(teacher: Row, rows: Sequence[MethodRow], path: Path) -> None:
    """Coherence and latent MSE over FLOPs; bars from the worst to the best seed."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    series = ((panels[0], "coherence, %", _coherence), (panels[1], "latent MSE to the teacher", MethodRow.latent_mses))
    for axes, label, values_of in series:
        for number, row in enumerate(rows, start=1):
            values = values_of(row)
            around = [[mean(values) - min(values)], [max(values) - mean(values)]]
            look = {"fmt": "os^D"[number // 10 % 4], "color": f"C{number % 10}", "label": f"{number} {row.name}"}
            axes.errorbar(row.flops / 1e12, mean(values), around, **look)
        axes.set(xlabel="TFLOPs of attention a layer, FLUX.1 at 4096 x 4096", ylabel=label, xscale="log")
        axes.grid(alpha=0.3)
    panels[0].axhline(100 * teacher.share("coherence"), color="black", linewidth=0.8, linestyle="--")
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _coherence(row: MethodRow) -> list[float]:
    return [100 * share for share in row.shares("coherence")]


def write_results(results: Path, run: Any, rows: Sequence[MethodRow], marks: Sequence[Mark], *, machine: str) -> str:
    """methods.json, methods.md, methods.png and methods_pictures.png; returns the report.

    Args:
        run: The `MethodTable`.
        machine: What it ran on, in a few words.
    """
    results.mkdir(parents=True, exist_ok=True)
    plan, taken = run.plan, run.stages.total()
    teacher = run.row("teacher")
    heading = (
        f"examples/tiny_flux, {plan.captions} held-out captions ({plan.few_captions} untrained) at "
        f"{plan.side}x{plan.side}, {plan.steps} denoising steps. Students: {plan.layer_steps} steps layer by layer and "
        f"{plan.train_steps} end to end, of {plan.batch_size} samples; mean and standard deviation over "
        f"{len(rows[0].students)} of {len(plan.seeds)} seeds. "
        f"FLOPs: attention of one FLUX.1 layer at 4096x4096, mean over layers. Seconds a step at "
        f"{plan.step_side}x{plan.step_side} on this CPU ({machine}). Took {taken['seconds'] / 3600:.1f} hours, "
        f"{taken['cpu_seconds'] / 3600:.1f} CPU-hours."
    )
    content = {
        "plan": asdict(plan),
        "machine": machine,
        "teacher": asdict(teacher),
        "marks": [asdict(mark) for mark in marks],
        "rows": [asdict(row) for row in rows],
        "stages": run.stages.record,
    }
    write_json(results / "methods.json", content)
    plot(teacher, rows, results / "methods.png")
    names = ["teacher", *(row.students[0].name for row in rows)]
    shown = [run.made[name].pictures.images[: plan.shown] for name in names]
    columns = ["teacher", *(f"# {number}" for number in range(1, len(names)))]
    write_sheet(columns, list(zip(*shown, strict=True)), results / "methods_pictures.png")
    report = as_markdown(heading, teacher, rows, marks)
    write_whole(results / "methods.md", lambda temporary: temporary.write_text(report))
    return report
