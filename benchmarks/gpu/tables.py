"""Results as plain text."""

from collections.abc import Iterable

from .marks import PUBLISHED
from .records import FIGURES, Mark, Results, Row

PART_FIGURES = {
    "correctness": ("share_of_allowed", "relative_error", "largest_error"),
    "operator": ("milliseconds", "speedup", "computed_tflops", "useful_tflops", "roofline_share", "peak_gib"),
    "model": ("seconds", "speedup", "peak_gib"),
    "memory": ("peak_gib",),
}


def line(row: Row) -> str:
    """One row as a line of text."""
    figures = "  ".join(f"{name} {_number(value)}" for name, value in row.figures.items())
    status = "" if row.status == "measured" else row.status.upper()
    return "  ".join(part for part in (f"{row.case:60} {row.impl:24}", status, figures, row.note) if part)


def part_tables(results: Results, part: str) -> str:
    """A table of cases and implementations for each figure, and notes, also on why rows are missing."""
    rows = results.rows_of_part(part)
    lines = [f"== {part}: {len(rows)} rows"]
    for name in PART_FIGURES[part]:
        shown = [row for row in rows if name in row.figures]
        if shown:
            lines += ["", f"{name}: {FIGURES[name]}", *_matrix(shown, name)]
    notes = dict.fromkeys(f"  {row.impl}: {row.status}: {row.note}" for row in rows if row.status != "measured")
    notes |= dict.fromkeys(f"  {row.impl}: {row.note}" for row in rows if row.status == "measured" and row.note)
    return "\n".join([*lines, *(["", "Notes:", *notes] if notes and part != "correctness" else [])])


def failures(rows: Iterable[Row]) -> str:
    return "\n".join(f"FAILED  {row.part}: {row.case}: {row.impl}: {row.note}" for row in rows)


def marks_table(marks: list[Mark]) -> str:
    lines = ["== marks, on an H200 (in brackets what others published)"]
    for mark in marks:
        value = "not measured" if mark.value is None else _number(mark.value)
        sign = ">=" if mark.better == "higher" else "<="
        verdict = {True: "met", False: "MISSED", None: ""}[mark.met]
        published = f"[{mark.published}]" if mark.published else ""
        lines.append(f"{mark.what:66} {value:>12} {sign} {mark.target:<5g} {verdict:7} {published}".rstrip())
    return "\n".join([*lines, "", "Published, on other cards and versions:", *(f"  {text}" for text in PUBLISHED)])


def _matrix(rows: list[Row], name: str) -> list[str]:
    impls = list(dict.fromkeys(row.impl for row in rows))
    cases = dict.fromkeys(row.case for row in rows)
    cells = {(row.case, row.impl): _number(row.figures[name]) for row in rows}
    widest = max(len(case) for case in cases)
    widths = [max(10, len(impl)) for impl in impls]

    def text(first: str, others: Iterable[str]) -> str:
        aligned = (f"{other:>{width}}" for other, width in zip(others, widths, strict=True))
        return "  ".join([f"{first:{widest}}", *aligned])

    return [text("", impls), *(text(case, [cells.get((case, impl), "-") for impl in impls]) for case in cases)]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
