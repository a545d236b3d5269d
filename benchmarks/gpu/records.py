"""The results of a run: one JSON file for a GPU and a day, saved as a whole after every row.

A row is one measurement: its key is (part, case, impl), its `figures` are numbers under names of FIGURES.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

FORMAT = 1
PARTS = ("correctness", "operator", "model", "memory")
STATUSES = (
    "measured",
    "failed",  # an error, or wrong numbers; the next run tries again
    "not available",  # cannot run here; the note says why
    "left out",  # the part's time was spent; the next run goes on with it
)
SETTLED = ("measured", "not available")  # not measured again
FIGURES = {
    "milliseconds": "of one call, median",
    "seconds": "of one step of the model",
    "computed_tflops": "TFLOP/s of what the kernel computes, masked pairs of its tiles included",
    "useful_tflops": "TFLOP/s of the pairs that attend",
    "speedup": "time of the faster dense call (operator) or of the dense step (model) over this time",
    "roofline_share": "least time that this card's copy and matmul rates allow, over this time",
    "peak_gib": "GiB, most memory allocated during the call, inputs and weights included",
    "relative_error": "|actual - exact| / |exact|, of the worst tensor",
    "largest_error": "max|actual - exact|, of the worst tensor",
    "share_of_allowed": "largest error over the allowed one, of the worst tensor: at most 1",
    "copy_tb_per_s": "TB/s of a copy on the card, bytes read and bytes written",
    "matmul_tflops": "TFLOP/s of a bfloat16 matrix product",
    "shared_memory_kib": "KiB of shared memory that a program may take",
    "memory_gib": "GiB of memory of the card that was free",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    part: str
    case: str
    impl: str
    status: str
    took: float  # seconds, setup and compilation included
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""  # why it is missing, how it was measured, or the error

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.case, self.impl

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status must be one of {STATUSES}, got {self.status!r}")
        if unknown := set(self.figures) - set(FIGURES):
            raise ValueError(f"figures must be among {tuple(FIGURES)}, got {sorted(unknown)}")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A target and its figure; `value` is None if it was not measured."""

    what: str
    value: float | None
    target: float
    better: str  # "higher" or "lower"
    published: str  # what others report, for their hardware and versions

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


OPTIONAL = ("diffusers", "natten")  # packages that only some rows need: runs with and without them may share a file


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where and how a file was measured. Rows of another `identity` are not mixed in."""

    gpu: str
    date: str
    command: str
    commit: str
    versions: dict[str, str]
    smoke: bool
    impl: str  # ours

    @property
    def identity(self) -> tuple[Any, ...]:
        needed = {name: found for name, found in self.versions.items() if name not in OPTIONAL}
        return self.gpu, self.commit, needed, self.smoke, self.impl


@dataclass(kw_only=True)
class Results:
    """The file in memory."""

    path: Path
    head: Head
    rows: list[Row] = field(default_factory=list)
    running: tuple[str, str, str] | None = None  # the row being measured, which failed if the process ends
    marks: list[Mark] = field(default_factory=list)

    def find(self, part: str, case: str, impl: str) -> Row | None:
        return next((row for row in self.rows if row.key == (part, case, impl)), None)

    def figure(self, part: str, case: str, impl: str, name: str) -> float | None:
        row = self.find(part, case, impl)
        return None if row is None or row.status != "measured" else row.figures.get(name)

    def rows_of_part(self, part: str) -> list[Row]:
        return [row for row in self.rows if row.part == part]

    def start(self, key: tuple[str, str, str]) -> None:
        self.running = key
        self.save()

    def add(self, row: Row) -> None:
        """Add a row, replacing one with the same key."""
        self.rows = [old for old in self.rows if old.key != row.key] + [row]
        self.running = None
        self.save()

    def forget(self, parts: Iterable[str], *, statuses: Iterable[str] = STATUSES) -> None:
        self.rows = [row for row in self.rows if row.part not in parts or row.status not in statuses]
        self.save()

    def save(self) -> None:
        """Write the file atomically, whenever the process may end."""
        data = {
            "format": FORMAT,
            **asdict(self.head),
            "running": self.running,
            "rows": [asdict(row) for row in self.rows],
            "marks": [asdict(mark) | {"met": mark.met} for mark in self.marks],
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.path)


def load(path: Path) -> Results:
    """Read a file; raises ValueError if it is not of this format."""
    data = json.loads(path.read_text())
    if data.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    running = data.pop("running")
    rows = [_read(Row, row) for row in data.pop("rows")]
    marks = []
    for entry in data.pop("marks"):
        met = entry.pop("met")
        marks.append(_read(Mark, entry))
        if marks[-1].met != met:
            raise ValueError(f"{path}: a mark says met={met}, its figures say otherwise: {entry}")
    running = None if running is None else tuple(running)
    return Results(path=path, head=_read(Head, data), rows=rows, running=running, marks=marks)


def open_results(path: Path, head: Head) -> Results:
    """Existing rows, if measured with this head; a file with another head is kept under a longer name."""
    results = Results(path=path, head=head)
    if path.exists():
        old = load(path)
        if old.head.identity == head.identity:
            results.rows = old.rows
            results.head = replace(head, versions=old.head.versions | head.versions)
        else:
            os.replace(path, _unused_path(path, old.head))
    path.parent.mkdir(parents=True, exist_ok=True)
    results.save()
    return results


def finite(figures: dict[str, float]) -> dict[str, float]:
    """The finite figures: JSON has no infinity and no NaN."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _unused_path(path: Path, head: Head) -> Path:
    stem = f"{path.stem}-{head.commit}-{head.impl}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    return next(free for name in names if not (free := path.with_name(f"{name}.json")).exists())


def _read(cls: type[Any], data: dict[str, Any]) -> Any:
    """A dataclass of plain fields from JSON, each of its declared type, none missing and none unknown."""
    types = get_type_hints(cls)
    if set(data) != {one.name for one in fields(cls)}:
        raise ValueError(f"{cls.__name__} has the fields {sorted(types)}, got {sorted(data)}")
    for name, value in data.items():
        if not _has_type(value, types[name]):
            raise ValueError(f"{cls.__name__}.{name} must be {types[name]}, got {value!r}")
    return cls(**data)


def _has_type(value: Any, declared: Any) -> bool:
    if get_origin(declared) is dict:
        key_type, value_type = get_args(declared)
        return isinstance(value, dict) and all(
            _has_type(k, key_type) and _has_type(v, value_type) for k, v in value.items()
        )
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if args := get_args(declared):
        return any(_has_type(value, one) for one in args)
    return isinstance(value, declared)
