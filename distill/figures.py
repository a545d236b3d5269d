"""The numbers of a run per step: a CSV, and a PNG of its curves."""

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..linearize.folders import write_atomically

logger = logging.getLogger(__name__)


def require_matplotlib(picture: str) -> None:
    """Raise ValueError if matplotlib is missing: before long work, not when `picture` is drawn."""
    if find_spec("matplotlib") is None:
        raise ValueError(f"{picture} is drawn with matplotlib, which is not installed: pip install matplotlib")


@contextmanager
def write_errors_as_warnings(path: Path) -> Iterator[None]:
    """Inside, a file that cannot be written is a warning, and the run continues without it."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written (%s); the run continues without it", path, error.strerror or error)


class StepLog:
    """A CSV with one row per step, and the curve drawn from it; terms that a step does not have are empty cells.

    A full disk is logged once; rows are kept in memory, and written as soon as there is room.

    Args:
        path: The CSV; its first column is `step`.
        columns: The other columns.
        last_step: Rows after it are dropped: a resumed run writes them again.
    Raises:
        ValueError: the CSV holds something else.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, last_step: int = 0) -> None:
        self.path = path
        self.columns = ["step", *columns]
        self.rows = [row for row in _read(path, self.columns) if row["step"] <= last_step]
        self.complete = False  # whether the file has every row
        self.warned = False
        self._write()

    def append(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))
        self._write()

    def _write(self) -> None:
        """Append the last row; write all rows if the file lacks more."""
        try:
            if self.complete:
                self.complete = False
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(self.rows[-1])
            else:
                write_atomically(self.path, self._rewrite)
            self.complete = True
        except OSError as error:
            self._warn_once(self.path, error)

    def _warn_once(self, path: Path, error: OSError) -> None:
        if not self.warned:
            reason = error.strerror or error
            logger.warning(
                "%s cannot be written (%s): its rows stay in memory until it can, and the run continues", path, reason
            )
        self.warned = True

    def draw(self, path: Path, *, layerwise: int = 0) -> None:
        """Plot each term over the steps: faint as measured, strong as a running mean.

        Args:
            layerwise: Steps of the first phase, which has another loss; a vertical line marks its end.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        before = sum(row["step"] <= layerwise for row in self.rows)
        phases = self.rows[:before], self.rows[before:]
        for number, name in enumerate(name for name in self.columns if name not in ("step", "lr", "seconds")):
            axes.plot([], [], color=f"C{number}", label=name)
            for rows in phases:
                steps = [row["step"] for row in rows if name in row]
                values = [row[name] for row in rows if name in row]
                axes.plot(steps, values, color=f"C{number}", alpha=0.25, linewidth=0.8)
                axes.plot(steps, _running_mean(values, 0.98), color=f"C{number}")
        if layerwise:
            axes.axvline(layerwise + 0.5, color="black", linewidth=0.8, linestyle="--")
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.grid(alpha=0.3)
        try:
            write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
        except OSError as error:
            self._warn_once(path, error)

    def _rewrite(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, float]]:
    """The rows, none if there is no file; raises ValueError for other columns or cells that are not numbers."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            table = csv.DictReader(file)
            rows = [row for row in table if None not in row.values()]  # a killed run may leave half a line
            if table.fieldnames and set(table.fieldnames) != set(columns):
                raise ValueError(f"its columns must be {', '.join(columns)}, got {', '.join(table.fieldnames)}")
        return [
            {name: int(value) if name == "step" else float(value) for name, value in row.items() if value}
            for row in rows
            if row["step"]
        ]
    except (ValueError, TypeError, csv.Error) as error:  # a TypeError: more cells than columns
        raise ValueError(f"{path} is damaged ({error}): repair it, or move it away to start a new one") from error


def _running_mean(values: Sequence[float], decay: float) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        means.append(total / weight)
    return means
