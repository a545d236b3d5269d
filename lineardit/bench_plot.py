"""Seconds of a step over the number of image tokens, the original beside its conversions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .linearize.folders import write_whole
from .linearize.measures.step_times import StepTime

LONGEST = 40  # characters of a name


def draw_step_times(found: Mapping[str, Sequence[StepTime]], path: Path) -> None:
    """A line for each conversion, dashed for the original that ran in turn with it, as PNG; whole or not at all."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(found.items()):
        for label, style in (("original", "o--"), ("converted", "s-")):
            points = sorted((row.tokens, median(taken)) for row in rows if (taken := getattr(row, label)))
            told = label_of(name) if label == "converted" else f"original, in turn with {label_of(name)}"
            if points:
                fill = "none" if label == "original" else "full"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", fillstyle=fill, label=told)
    sizes: dict[int, dict[str, None]] = {}  # of one number of tokens, each once
    for row in sorted((row for rows in found.values() for row in rows), key=lambda row: row.tokens):
        sizes.setdefault(row.tokens, {})[f"{row.width}x{row.height}"] = None
    axes.set(xlabel="pixels, image tokens", ylabel="seconds of a step")
    if axes.lines:
        axes.set(xscale="log", yscale="log")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
    axes.set_xticks(list(sizes), ["\n".join([*names, f"{tokens:,}"]) for tokens, names in sizes.items()], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def label_of(name: str) -> str:
    """The end of a name, without what matplotlib reads as mathematics or hides."""
    short = name if len(name) <= LONGEST else f"...{name[-LONGEST:]}"
    return (f"./{short}" if short.startswith("_") else short).replace("$", r"\$")
