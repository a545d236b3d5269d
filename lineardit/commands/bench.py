"""`lineardit bench`: seconds of a step before and after conversion, on this machine, by size."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .options import MODEL, Device, Dtype, Impl, MaxSequenceLength, Offline
from .prompts import parse_size
from .tables import print_titled, wide_console

if TYPE_CHECKING:
    from ..linearize.measures.step_times import StepTime
    from ..linearize.measures.weightless_conversion import Conditions, Size, WeightlessConversion

SIZES = ("1024x1024", "2048x2048", "4096x4096")
FIGURES, PICTURE = "bench.json", "bench.png"


def bench(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Conversions, trained or not.")],
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size", metavar="WIDTHxHEIGHT", help=f"Size in pixels; repeatable. Default: {', '.join(SIZES)}."
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Timed steps of each, after one warm-up step.")] = 3,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the repeated blocks of both models.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for bench.json and bench.png.")] = Path(
        "bench"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing figures.")] = False,
    max_sequence_length: MaxSequenceLength = None,
    base: Annotated[
        str | None, typer.Option(rich_help_panel=MODEL, help="Base to use instead of those that the adapters name.")
    ] = None,
    impl: Impl = "auto",
    offline: Offline = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Time a step of the original and of conversions, alternating. Reads no weights of the base."""
    requested = [parse_size(size) for size in sizes or SIZES]
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..distill.figures import require_matplotlib
    from ..linearize.folders import check_output, check_output_file
    from ..linearize.measures.weightless_conversion import Conditions, WeightlessConversion
    from .devices import find_device, find_dtype

    require_matplotlib(PICTURE)
    conversions = [WeightlessConversion.read(name, base=base, offline=offline) for name in dict.fromkeys(adapters)]
    check_output(output, overwrite=True)  # its other files stay
    for name in (FIGURES, PICTURE):
        check_output_file(output / name, overwrite=overwrite)
    target = find_device(device)
    conditions = Conditions(
        device=target,
        dtype=find_dtype(dtype, target),
        pairs=pairs,
        text_len=max_sequence_length,
        impl=impl,
        compiled=compiled,
    )
    # reports what does not fit before any of them runs
    fitting = {
        one: one.supported_sizes(list(dict.fromkeys(requested)), conditions, require_all=bool(sizes))
        for one in conversions
    }
    _time(fitting, conditions, output)


def _time(fitting: "Mapping[WeightlessConversion, Sequence[Size]]", conditions: "Conditions", output: Path) -> None:
    """Time every conversion at its sizes; figures are written as they come, and shown even after an interruption."""
    from ..distill.files import write_json
    from ..kernels.pieces.results import dtype_name
    from ..linearize.measures.step_times import time_steps
    from ..plots import draw_step_times
    from ..work_log import describe_device

    where = {"device": describe_device(conditions.device), "dtype": dtype_name(conditions.dtype)}
    about = where | {name: getattr(conditions, name) for name in ("pairs", "text_len", "impl", "compiled")}
    found: dict[str, list[StepTime]] = {}
    for conversion, sizes in fitting.items():
        rows = found.setdefault(conversion.name, [])
        try:
            for row in time_steps(conversion, sizes, conditions):
                rows.append(row)
                output.mkdir(parents=True, exist_ok=True)
                rows_by_name = {name: list(map(entry, one)) for name, one in found.items()}
                write_json(output / FIGURES, about | {"conversions": rows_by_name})
        finally:
            if rows:
                show(conversion.name, rows)
                draw_step_times(found, output / PICTURE)
    print(f"On {where['device']}, weights in {where['dtype']}. Wrote {output / FIGURES} and {PICTURE}")


def entry(row: "StepTime") -> dict[str, Any]:
    """A row as a JSON object."""
    return asdict(row) | {"speedup": row.speedup, "flops": asdict(row.flops) | {"after": row.flops.after}}


def show(name: str, rows: "Sequence[StepTime]") -> None:
    """Print the table of one conversion, and the size from which it is faster."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("size", no_wrap=True)
    with_memory = any(row.original_gib or row.converted_gib for row in rows)
    for header in ("original", "converted", "ratio", "as counted", *["peak GiB"] * with_memory):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("runs", overflow="fold")
    for row in rows:
        cells = [f"{row.width}x{row.height}", _seconds(row.original), _seconds(row.converted)]
        cells += ["" if row.speedup is None else f"{row.speedup:.2f}", f"{row.flops.before / row.flops.after:.2f}"]
        cells += [" to ".join(map(_gib, (row.original_gib, row.converted_gib)))] * with_memory
        table.add_row(*cells, row.runs)
    console = wide_console()
    print_titled(console, f"One step, batch 1, medians: {name}", table)
    console.print(verdict(rows))


def verdict(rows: "Sequence[StepTime]") -> str:
    """A sentence on the measured size from which the conversion is faster."""
    fitting = [row for row in rows if row.converted is not None]
    if not fitting:
        return "No step of the conversion fits into memory: use smaller sizes, or a smaller dtype."
    converted = sorted((row for row in fitting if not row.is_original), key=lambda row: row.tokens)
    if not converted:
        return "At these sizes the conversion runs the original attention: larger pictures gain from it."
    largest = f"{converted[-1].width}x{converted[-1].height}"
    slower = [row.tokens for row in converted if row.speedup is not None and row.speedup <= 1]
    faster = [row for row in converted if row.tokens > max(slower, default=0)]
    if not faster:
        return f"At {largest} the conversion is not faster: larger pictures gain more."
    note = "" if slower else " (the smallest size measured)"
    return f"The conversion is faster from {faster[0].width}x{faster[0].height}{note} on."


def _seconds(times: tuple[float, ...] | None) -> str:
    if times is None:
        return "out of memory"
    return f"{median(times):.3g} s" if median(times) < 100 else f"{median(times):.0f} s"


def _gib(peak: float | None) -> str:
    return "?" if peak is None else f"{peak:.1f}"
