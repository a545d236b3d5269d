"""`lineardit nearness`: how close conversions are to their base, in a few forward passes."""

import gc
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .options import (
    Arguments,
    Device,
    Dtype,
    Guidance,
    Impl,
    MaxSequenceLength,
    Offline,
    Offload,
    Quantize,
    Seed,
)
from .prompts import parse_arguments, parse_quantization, parse_size, read_prompts
from .tables import conditions_suffix, print_titled, wide_console

if TYPE_CHECKING:
    from ..linearize.measures.nearness import Nearness


def nearness(
    base: Annotated[str, typer.Argument(metavar="BASE", help="An unconverted pipeline: Hub id or folder.")],
    students: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Conversions of it, trained or not.")],
    prompts: Annotated[Path, typer.Option("--prompts", help="Text file with one prompt per line; a few suffice.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for nearness.json and nearness.png.")] = Path(
        "nearness"
    ),
    size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Size in pixels; default: the model's.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the base; every one is measured.")] = 8,
    seed: Seed = 0,
    guidance: Guidance = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing figures.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    arguments: Arguments = None,
    impl: Impl = "auto",
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    offload: Offload = "none",
    quantize: Quantize = None,
) -> None:
    """Compare single predictions of conversions and their base. Needs no training and draws no picture."""
    texts, extra_arguments = read_prompts(prompts), parse_arguments(arguments)
    height_width = None if size is None else parse_size(size)
    from ..distill.figures import require_matplotlib

    require_matplotlib("nearness.png")
    from ..linearize.folders import check_output_file, write_atomically
    from ..linearize.measures.nearness import nearness as measure
    from ..linearize.measures.nearness import record_predictions
    from ..plots import draw_nearness
    from .devices import find_device, find_dtype
    from .loading import load_at_size, open_on_device
    from .quiet import quiet_libraries

    quiet_libraries()
    figures, picture = output / "nearness.json", output / "nearness.png"
    for file in (figures, picture):
        check_output_file(file, overwrite=overwrite)
    target = find_device(device)
    open_arguments = {student: _open_arguments(student, base, offline=offline) for student in students}
    weights: dict[str, Any] = {"dtype": find_dtype(dtype, target), "offline": offline}
    weights |= {"quantization": (quantization := parse_quantization(quantize))}
    pipe, height_width = load_at_size(base, height_width, device=target, offload=offload, **weights)
    settings: dict[str, Any] = {"size": height_width, "steps": steps, "seed": seed}
    settings |= {"guidance": guidance, "max_sequence_length": max_sequence_length, "arguments": extra_arguments}
    predictions = record_predictions(pipe, texts, **settings)
    found = {base: measure(pipe, predictions, name=base)}
    for student in students:
        del pipe  # one model at a time
        gc.collect()
        pipe = open_on_device(student, device=target, offload=offload, impl=impl, **weights, **open_arguments[student])
        found[student] = measure(pipe, predictions, name=student)
    output.mkdir(parents=True, exist_ok=True)
    rows = {name: asdict(one) | {"mean": one.mean} for name, one in found.items()}
    conditions = {"quantization": quantization and str(quantization), "offload": offload}
    content = {"base": base, "prompts": len(texts), **settings, **conditions, "models": rows}
    write_atomically(figures, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
    draw_nearness({name: one for name, one in found.items() if name != base}, picture)
    show(found, conditions_suffix(quantization, offload))
    print(f"Wrote {figures} and {picture.name}")


def _open_arguments(student: str, base: str, *, offline: bool) -> dict[str, Any]:
    """Arguments for opening a student; one that is missing is reported before the base is loaded."""
    from ..linearize.adapters.adapter import find_adapter
    from ..linearize.adapters.base import read_base

    if find_adapter(student, offline=offline) is not None:
        return {"base": base}  # instead of the one that it names
    read_base(student, offline=offline)
    return {}


def show(found: "dict[str, Nearness]", conditions: str = "") -> None:
    """Print a row for each model; `conditions` is from `conditions_suffix`."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for header in ("first", "last", "mean", "seconds a prediction"):
        table.add_column(header, justify="right")
    for name, one in found.items():
        values = one.errors[0], one.errors[-1], one.mean
        table.add_row(name, *(f"{value:.2g}" for value in values), f"{one.seconds:.3g}")
    print_titled(wide_console(), f"Relative error of one prediction{conditions}", table)
