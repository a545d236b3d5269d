"""A picture of one result file: `python -m benchmarks.gpu.plot FILE.json [PICTURE.png]`. Needs matplotlib."""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from .names import (
    CLEAR_FLEX,
    CLEAR_STEP,
    DENSE,
    DENSE_STEP,
    FOCUS_STEP,
    HYBRID_STEP,
    OUR_STEPS,
    SIZE_NAMES,
    case_name,
    size_name,
)
from .records import Results, load

RADII = (8, 16, 32)
Series = dict[int, float]  # side in tokens -> figure


def operator_series(results: Results, radius: int) -> dict[str, Series]:
    """Milliseconds of one forward call, by implementation; "dense" is the faster of two."""
    series = {}
    for impl in (results.head.impl, CLEAR_FLEX, "flex tiles", "natten"):
        series[impl] = _measured(results, "operator", impl, "milliseconds", radius)
    dense = [_measured(results, "operator", name, "milliseconds", None) for name in DENSE]
    sides = sorted({side for one in dense for side in one})
    series["dense"] = {side: min(one[side] for one in dense if side in one) for side in sides}
    return {name: one for name, one in series.items() if one}


def step_series(results: Results) -> dict[str, Series]:
    """Seconds of one step, by attention."""
    impls = (DENSE_STEP, CLEAR_STEP, *OUR_STEPS.values(), HYBRID_STEP, FOCUS_STEP)
    series: dict[str, Series] = {impl: {} for impl in impls}
    for impl in impls:
        for side in SIZE_NAMES:
            seconds = results.figure("model", size_name(side), impl, "seconds")
            if seconds is not None:
                series[impl][side] = seconds
    return {name: one for name, one in series.items() if one}


def _measured(results: Results, part: str, impl: str, figure: str, radius: int | None) -> Series:
    found = {
        side: results.figure(part, case_name(side, radius, backward=False), impl, figure) for side in sorted(SIZE_NAMES)
    }
    return {side: value for side, value in found.items() if value is not None}


def draw(results: Results, picture: Path) -> None:
    """One panel for each radius of the operator, one for the step; both axes logarithmic."""
    figure, panels = plt.subplots(1, len(RADII) + 1, figsize=(4 * (len(RADII) + 1), 3.6), layout="constrained")
    for panel, radius in zip(panels, RADII, strict=False):
        _panel(panel, f"operator, radius {radius}, forward (ms)", operator_series(results, radius))
    _panel(panels[-1], "one step of FLUX.1-dev (s)", step_series(results))
    figure.suptitle(f"{results.head.gpu}, {results.head.date}, torch {results.head.versions['torch']}", fontsize=9)
    figure.savefig(picture, dpi=150)
    plt.close(figure)


def _panel(panel: Any, title: str, series: dict[str, Series]) -> None:
    for name, values in series.items():
        panel.plot(list(values), list(values.values()), marker="o", label=name)
    panel.set_title(title, fontsize=9)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(list(SIZE_NAMES), list(SIZE_NAMES.values()))
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if series:
        panel.legend(fontsize=7)


def main() -> None:
    path, *others = (Path(argument) for argument in sys.argv[1:])
    draw(load(path), *(others or [path.with_suffix(".png")]))


if __name__ == "__main__":
    main()
