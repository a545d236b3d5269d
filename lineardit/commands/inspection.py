"""`lineardit inspect`: the attention of a model or adapter, module by module, and the cost of a step."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .options import Base, Offline, Revision
from .tables import print_titled, wide_console

if TYPE_CHECKING:
    from ..linearize.measures.inspection import Inspection


def inspect(
    source: Annotated[str, typer.Argument(metavar="ADAPTER_OR_BASE", help="Adapter or model: Hub id or folder.")],
    base: Base = None,
    revision: Revision = None,
    impl: Annotated[str, typer.Option(help="Implementation to report.")] = "auto",
    offline: Offline = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write JSON; - prints JSON instead.")
    ] = None,
) -> None:
    """Show every attention module and the cost of a step. Swapped or the reason why not, method, and FLOPs."""
    from ..linearize.folders import write_atomically
    from ..linearize.measures.inspection import inspect_base
    from .quiet import quiet_libraries

    quiet_libraries()
    inspection = inspect_base(source, base=base, revision=revision, offline=offline, impl=impl)
    text = json.dumps(inspection.to_dict(), indent=2) + "\n"
    if json_file == Path("-"):
        typer.echo(text, nl=False)
        return
    if json_file is not None:
        write_atomically(json_file, partial(Path.write_text, data=text))
    show(inspection)


def show(inspection: "Inspection") -> None:
    """Print the two tables."""
    console = wide_console()
    console.print(f"{inspection.model_class} of {inspection.base}, family {inspection.family}")
    console.print(f"{inspection.num_swapped} of {inspection.num_swappable} self-attention modules converted")
    if inspection.dense_below:
        console.print(f"original attention in calls with fewer than {inspection.dense_below:,} image tokens")
    console.print(_modules(inspection))
    print_titled(console, "One denoising step, batch 1", _costs(inspection))


def _modules(inspection: "Inspection") -> Table:
    from ..linearize.methods import format_setting

    table = Table("module", "swapped", "method", "settings", "runs", box=SIMPLE_HEAD)
    for row in inspection.rows:
        if row.swapped:
            settings = ", ".join(
                f"{name}={format_setting(value)}" for name, value in row.settings.items() if value is not None
            )
            table.add_row(row.module, "yes", row.method, settings, row.impl)
        else:
            table.add_row(row.module, "no", "", row.reason, "")
    return table


def _costs(inspection: "Inspection") -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("size")
    for header in ("image tokens", "TFLOP before", "TFLOP after", "ratio"):
        table.add_column(header, justify="right")
    for step in inspection.flops:
        tokens = f"{step.grid[-2] * step.grid[-1]:,}"
        before, after = step.before / 1e12, step.after / 1e12
        table.add_row(step.size, tokens, f"{before:,.1f}", f"{after:,.1f}", f"{before / after:.2f}")
    return table
