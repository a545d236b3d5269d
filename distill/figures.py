"""The numbers of a run, step by step: a CSV, and a PNG of its curves."""

import csv
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from ..linearize.folders import write_whole


def require_matplotlib(picture: str) -> None:
    """Raise ValueError where it is missing: before long work, not when `picture` is drawn."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{picture} is drawn with matplotlib, which is not here: pip install matplotlib")


class StepLog:
    """A CSV with one row per step, a cell of a term that the step has not left empty, and the curve drawn from it.

    Args:
        path: The CSV; its first column is `step`.
        columns: The others.
        last_step: Rows after it are dropped: a resumed run writes them again.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, last_step: int = 0) -> None:
        self.path = path
        self.columns = ["step", *columns]
        self.rows = [row for row in _read(path) if row["step"] <= last_step]
        write_whole(path, self._rewrite)

    def append(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def draw(self, path: Path, *, first_stage: int = 0) -> None:
        """A line per term over the steps, faint as measured and strong as running mean.

        Args:
            first_stage: Steps of another loss before; a vertical line ends them.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        before = sum(row["step"] <= first_stage for row in self.rows)
        stages = self.rows[:before], self.rows[before:]
        for number, name in enumerate(name for name in self.columns if name not in ("step", "lr", "seconds")):
            axes.plot([], [], color=f"C{number}", label=name)
            for rows in stages:
                steps = [row["step"] for row in rows if name in row]
                values = [row[name] for row in rows if name in row]
                axes.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
                axes.plot(steps, _running_mean(values, 0.98), color=f"C{number}")
        if first_stage:
            axes.axvline(first_stage + 0.5, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.grid(alpha=0.3)
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))

    def _rewrite(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _read(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]  # a killed run may leave half a line
    return [
        {name: int(value) if name == "step" else float(value) for name, value in row.items() if value} for row in rows
    ]


def _running_mean(values: Sequence[float], decay: float) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means
