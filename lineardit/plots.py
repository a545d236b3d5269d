"""Plots that commands write next to their figures, as PNG files, each written atomically."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .linearize.folders import write_atomically
from .linearize.measures.attention_profile import Profile
from .linearize.measures.nearness import Nearness
from .linearize.measures.step_times import StepTime

MAX_NAME_LENGTH = 40  # characters of a name
MAP_RADIUS = 8  # of the mass that is drawn, or the nearest profiled radius
ROW_INCHES, COLUMN_INCHES = 0.22, 0.32


def draw_step_times(found: Mapping[str, Sequence[StepTime]], path: Path) -> None:
    """Plot seconds per step over image tokens: a line for each conversion, dashed for its original, timed in turn."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, rows) in enumerate(found.items()):
        for label, style in (("original", "o--"), ("converted", "s-")):
            points = sorted((row.tokens, median(times)) for row in rows if (times := getattr(row, label)))
            legend = _short_label(name) if label == "converted" else f"original, in turn with {_short_label(name)}"
            if points:
                fill = "none" if label == "original" else "full"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", fillstyle=fill, label=legend)
    sizes: dict[int, dict[str, None]] = {}  # distinct sizes by number of tokens
    for row in sorted((row for rows in found.values() for row in rows), key=lambda row: row.tokens):
        sizes.setdefault(row.tokens, {})[f"{row.width}x{row.height}"] = None
    axes.set(xlabel="pixels, image tokens", ylabel="seconds of a step")
    if axes.lines:
        axes.set(xscale="log", yscale="log")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8)
    axes.set_xticks(list(sizes), ["\n".join([*names, f"{tokens:,}"]) for tokens, names in sizes.items()], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3, which="both")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def draw_nearness(found: Mapping[str, Nearness], path: Path) -> None:
    """Plot the error over denoising steps: a line for each model, on a log scale, pure noise on the left."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, one in found.items():
        axes.plot(range(1, len(one.errors) + 1), one.errors, marker="o", label=_short_label(name))
    axes.set(xlabel="call of the denoiser in a picture", ylabel="relative error of a prediction", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


def draw_profile(profile: Profile, path: Path) -> None:
    """Heat maps of mass near the query, mean distance and mass on text: a row per layer, a column per head."""
    radius = min(profile.radii, key=lambda one: abs(one - MAP_RADIUS))
    column = profile.radii.index(radius)
    names = [layer.module for layer in profile.layers]
    panels: dict[str, list[Sequence[float]]] = {
        f"attention nearer than {radius:g} tokens": [[mass[column] for mass in layer.mass] for layer in profile.layers],
        "mean distance in the image, tokens": [layer.distance for layer in profile.layers],
        "attention on text": [layer.text for layer in profile.layers],
    }
    num_heads = max(layer.num_heads for layer in profile.layers)
    width, height = max(2.4, COLUMN_INCHES * num_heads), max(1.6, ROW_INCHES * len(names))
    label = 0.075 * max(map(len, names))
    figure = Figure(figsize=(label + len(panels) * (width + 0.9), height + 1.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        values = np.full((len(names), num_heads), np.nan)  # a UNet's levels differ in number of heads
        for index, row in enumerate(rows):
            values[index, : len(row)] = row
        top = None if title.startswith("mean") else 1
        picture = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head")
        axis.set_xticks(range(0, num_heads, max(1, num_heads // 8)))
        axis.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(picture, ax=axis, fraction=0.08)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def _short_label(name: str) -> str:
    """The end of a name, escaped where matplotlib would read mathematics or hide the label."""
    short = name if len(name) <= MAX_NAME_LENGTH else f"...{name[-MAX_NAME_LENGTH:]}"
    return (f"./{short}" if short.startswith("_") else short).replace("$", r"\$")
