"""The table of `methods.py` in files: one for each row, so that rows made elsewhere can be copied in."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from marks_report import Row
from methods_report import MethodRow, Table, as_markdown, plot, strip_name
from PIL import Image

from lineardit.distill.evaluate import Comparison
from lineardit.distill.files import write_json
from lineardit.distill.metrics import Interval
from lineardit.linearize.folders import write_atomically

PROPOSALS = "methods/proposals.json"


def write_row(results: Path, table: Table, row: MethodRow, images: Sequence[Image.Image]) -> None:
    """Write a row to its own file, and its first student's pictures side by side, if there are any."""
    path = results / strip_name(row.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if images:
        strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
        for place, image in enumerate(images):
            strip.paste(image, (place * image.width, 0))
        write_atomically(path, lambda temporary: strip.save(temporary, format="JPEG", quality=90))
    write_json(path.with_suffix(".json"), {"plan": table.plan, "row": asdict(row)})


def write_proposals(results: Path, table: Table, pairs: Sequence[tuple[Row, Row]]) -> None:
    """Write the proposals to their own file."""
    path = results / PROPOSALS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"plan": table.plan, "proposals": [[asdict(one) for one in pair] for pair in pairs]})


def write_table(results: Path, table: Table) -> None:
    """Write methods.json, methods.md and methods.png."""
    results.mkdir(parents=True, exist_ok=True)
    content = {
        "plan": table.plan,
        "teacher": asdict(table.teacher),
        "marks": [asdict(mark) for mark in table.marks()],
        "rows": [asdict(row) for row in table.ordered()],
    }
    write_json(results / "methods.json", content)
    plot(table.teacher, table.ordered(), results / "methods.png")
    write_atomically(results / "methods.md", lambda temporary: temporary.write_text(as_markdown(table)))


def read_table(results: Path, empty: Table) -> Table:
    """`empty` with the rows and proposals stored in `results`, made here or elsewhere.

    Raises:
        ValueError: a stored file is of another plan.
    """
    rows: dict[str, MethodRow] = {}
    for file in sorted(set(results.glob("methods/*.json")) - {results / PROPOSALS}):
        entry = _read_with_plan(file, empty.plan)["row"]
        students = tuple(map(_row, entry["students"]))
        rows[entry["name"]] = MethodRow(**entry | {"untrained": _row(entry["untrained"]), "students": students})
    file = results / PROPOSALS
    pairs = _read_with_plan(file, empty.plan)["proposals"] if file.is_file() else None
    proposals = None if pairs is None else tuple((_row(one), _row(other)) for one, other in pairs)
    return replace(empty, rows=rows, proposals=proposals)


def _read_with_plan(file: Path, plan: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    if content["plan"] != plan:
        different = sorted(name for name, value in plan.items() if content["plan"].get(name) != value)
        raise ValueError(f"{file} is of another plan ({', '.join(different)}): remove it, or name other --results")
    return content


def _row(entry: dict[str, Any]) -> Row:
    comparison = entry["comparison"]
    if comparison is not None:
        differences = {name: Interval(**one) for name, one in comparison["differences"].items()}
        comparison = Comparison(**comparison | {"differences": differences})
    scores = {name: (right, total) for name, (right, total) in entry["scores"].items()}
    return Row(**entry | {"scores": scores, "comparison": comparison})
