"""The report of `methods.py`: its measurements compared with the marks, as a table and as a plot."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from marks_report import Mark, Row
from matplotlib.figure import Figure

from lineardit.linearize.folders import write_atomically


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """One method.

    Attributes:
        flops: Of attention in a layer of FLUX.1 at 4096 x 4096 pixels, mean over all layers.
        swapped: Number of `layers` with the method; the others keep full attention.
        trained: Number of trained parameters.
        seconds_per_step: Of a warm forward.
        seconds_of_teacher: The teacher's, alternating with it.
        machine: The machine of these times, in a few words.
        untrained: Without training, on the first captions.
        students: One for each seed.
    """

    name: str
    flops: int
    swapped: int
    layers: int
    trained: int
    seconds_per_step: float
    seconds_of_teacher: float
    machine: str
    untrained: Row
    students: tuple[Row, ...]

    def shares(self, score: str) -> list[float]:
        """Share of right answers, for each seed."""
        return [student.share(score) for student in self.students]

    def latent_mses(self) -> list[float]:
        """Latent MSE to the teacher, for each seed."""
        return [_latent_mse(student) for student in self.students]


@dataclass(frozen=True, kw_only=True)
class Table:
    """All rows made so far.

    Attributes:
        plan: Settings of all rows, as JSON values.
        order: Names of all rows, made or not.
        rivals: Hybrid -> local attention of equal FLOPs.
        proposals: Without training: one radius for all layers, and the profile's proposal of equal FLOPs.
    """

    plan: dict[str, Any]
    teacher: Row
    order: tuple[str, ...]
    rivals: dict[str, str]
    rows: dict[str, MethodRow] = field(default_factory=dict)
    proposals: tuple[tuple[Row, Row], ...] | None = None

    def ordered(self) -> list[MethodRow]:
        """The rows made so far, in order."""
        return [self.rows[name] for name in self.order if name in self.rows]

    def marks(self) -> list[Mark]:
        """Marks of the rows; a hybrid's once its rival has as many seeds."""
        made = [(self.rows.get(name), self.rows.get(rival)) for name, rival in self.rivals.items()]
        pairs = [(one, other) for one, other in made if one and other and len(one.students) == len(other.students)]
        return [
            *hybrid_marks(self.teacher, pairs),
            *follow_marks(self.teacher, self.ordered()),
            *([proposal_mark(self.proposals)] if self.proposals else []),
        ]


def hybrid_marks(teacher: Row, pairs: Sequence[tuple[MethodRow, MethodRow]]) -> list[Mark]:
    """Each hybrid against local attention of equal FLOPs, seed by seed, and in coherence against the teacher."""
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
    """Objects of agent attention's and MALA's students against the teacher, a mark for each share of the layers."""
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
    """The profile's proposal against one radius for all layers of equal FLOPs, without training."""
    errors = [(_latent_mse(proposal), _latent_mse(uniform)) for uniform, proposal in pairs]
    names = [uniform.name for uniform, _ in pairs]
    comparisons = [f"{name}: {_versus([pair], '{:.4f}'.format)}" for name, pair in zip(names, errors, strict=True)]
    return Mark(
        name="the profile's proposal against one radius, without training",
        target="less latent MSE at three budgets",
        measured="; ".join(comparisons),
        met=sum(ours < theirs for ours, theirs in errors) >= 3,
    )


def _points_below(teacher: Row, row: MethodRow, score: str) -> float:
    """Points of the mean over seeds below the teacher; rounded, so that a difference equal to the target meets it."""
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


def folder_name(name: str) -> str:
    """A row's name as a file name."""
    return re.sub(r"[^\w.=-]+", "-", name).strip("-")


def strip_name(name: str) -> str:
    """The path of a row's pictures, relative to the table."""
    return f"methods/{folder_name(name)}.jpg"


def as_markdown(table: Table) -> str:
    """The report in Markdown."""
    plan, teacher, rows = table.plan, table.teacher, table.ordered()
    unfinished = [name for name in table.order if name not in table.rows]
    few_seeds = [row.name for row in rows if len(row.students) < len(plan["seeds"])]
    teacher_cells = " | ".join(_percent(teacher.share(score)) for score in ("objects", "coherence"))
    machines = ", ".join(sorted({row.machine for row in rows}))
    lines = [
        "# Methods side by side",
        "",
        f"examples/tiny_flux, {plan['captions']} held-out captions ({plan['few_captions']} untrained) at "
        f"{plan['side']}x{plan['side']}, {plan['steps']} denoising steps. "
        f"Students: {plan['layer_steps']} steps layer by layer and {plan['train_steps']} end to end, of "
        f"{plan['batch_size']} samples, at a learning rate of {plan['learning_rate']:g} with {plan['flow']:g} of the "
        "flow loss; mean and standard deviation over seeds. "
        "FLOPs: attention of one FLUX.1 layer at 4096x4096, mean over layers. A step at "
        f"{plan['step_side']}x{plan['step_side']}, and the teacher's in turn with it, on a CPU ({machines}).",
        "",
        *([f"Not made yet: {', '.join(unfinished)}."] if unfinished else []),
        *([f"With fewer than {len(plan['seeds'])} seeds: {len(few_seeds)} of {len(rows)} rows."] if few_seeds else []),
        "",
        "| mark | target | measured | met |",
        "| --- | --- | --- | --- |",
        *(f"| {m.name} | {m.target} | {m.measured} | {'yes' if m.met else '**no**'} |" for m in table.marks()),
        "",
        "| # | method | layers | GFLOPs a layer | seeds | objects | coherence | latent MSE untrained | trained "
        "| s a step | times as fast | parameters |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| | teacher | | | | {teacher_cells} | | | | | |",
    ]
    for number, row in enumerate(rows, start=1):
        cells = (
            str(number),
            row.name,
            f"{row.swapped}/{row.layers}",
            f"{row.flops / 1e9:,.0f}",
            str(len(row.students)),
            _spread(row.shares("objects"), _percent),
            _spread(row.shares("coherence"), _percent),
            f"{_latent_mse(row.untrained):.4f}",
            _spread(row.latent_mses(), "{:.4f}".format),
            f"{row.seconds_per_step:.2f}",
            f"{row.seconds_of_teacher / row.seconds_per_step:.1f}",
            f"{row.trained:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "![quality against FLOPs](methods.png)",
        "",
        "| # | pictures of the first captions |",
        "| --- | --- |",
    ]
    lines += [f"| {number} | ![{row.name}]({strip_name(row.name)}) |" for number, row in enumerate(rows, start=1)]
    return "\n".join([*lines, ""])


def plot(teacher: Row, rows: Sequence[MethodRow], path: Path) -> None:
    """Plot coherence and latent MSE over FLOPs, with bars from the worst to the best seed."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    series = ((panels[0], "coherence, %", _coherence), (panels[1], "latent MSE to the teacher", MethodRow.latent_mses))
    for axes, label, get_values in series:
        for number, row in enumerate(rows, start=1):
            values = get_values(row)
            error_bars = [[mean(values) - min(values)], [max(values) - mean(values)]]
            style = {"fmt": "os^D"[number // 10 % 4], "color": f"C{number % 10}", "label": f"{number} {row.name}"}
            axes.errorbar(row.flops / 1e12, mean(values), error_bars, **style)
        limits = min(row.flops for row in rows) / 2e12, max(row.flops for row in rows) / 0.5e12
        axes.set(xlabel="TFLOPs of attention a layer, FLUX.1 at 4096 x 4096", ylabel=label, xscale="log", xlim=limits)
        axes.grid(alpha=0.3)
    panels[0].axhline(100 * teacher.share("coherence"), color="black", linewidth=0.8, linestyle="--")
    panels[1].set_yscale("log")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def _coherence(row: MethodRow) -> list[float]:
    return [100 * share for share in row.shares("coherence")]
