"""The error of several conversions over the steps of denoising."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from .bench_plot import label_of
from .linearize.folders import write_whole
from .linearize.measures.nearness import Nearness


def draw_nearness(found: Mapping[str, Nearness], path: Path) -> None:
    """A line for each model, logarithmic, noise on the left, as PNG; whole or not at all."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, one in found.items():
        axes.plot(range(1, len(one.errors) + 1), one.errors, marker="o", label=label_of(name))
    axes.set(xlabel="call of the denoiser in a picture", ylabel="relative error of a prediction", yscale="log")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
