"""The heat map of a profile: a row for each layer, in the order of the forward, a column for each head."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .linearize.folders import write_whole
from .linearize.measures.attention_profile import Profile

MAP_RADIUS = 8  # of the mass that is drawn, or the profiled radius nearest to it
ROW_INCHES, COLUMN_INCHES = 0.22, 0.32


def draw_profile(profile: Profile, path: Path) -> None:
    """Mass near the query, mean distance, mass on text, side by side, as PNG; whole or not at all."""
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
        values = np.full((len(names), num_heads), np.nan)  # a UNet's levels differ in heads
        for index, row in enumerate(rows):
            values[index, : len(row)] = row
        top = None if title.startswith("mean") else 1
        picture = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("head")
        axis.set_xticks(range(0, num_heads, max(1, num_heads // 8)))
        axis.set_yticks(range(len(names)), names, fontsize=7)
        figure.colorbar(picture, ax=axis, fraction=0.08)
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
