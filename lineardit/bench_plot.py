"""Seconds of a step over the number of image tokens, the original beside its conversions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from .linearize.folders import write_whole
from .linearize.step_times import StepTime


def draw_step_times(found: Mapping[str, Sequence[StepTime]], path: Path) -> None:
    """A line for each conversion, dashed for the original that ran in turn with it, as PNG; whole or not at all."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(found.items()):
        color = f"C{number}"
        for label, style in (("original", "--"), ("converted", "-")):
            points = sorted((row.tokens, median(taken)) for row in rows if (taken := getattr(row, label)))
            told = name if label == "converted" else f"original, in turn with {name}"
            axes.plot(*zip(*points, strict=True) if points else ([], []), style, marker="o", color=color, label=told)
    ticks = {row.tokens: f"{row.width}x{row.height}\n{row.tokens:,}" for rows in found.values() for row in rows}
    axes.set(xlabel="pixels, image tokens", ylabel="seconds of a step", xscale="log", yscale="log")
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
