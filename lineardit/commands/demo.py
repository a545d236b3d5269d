"""`lineardit demo`: convert, distill and generate with the small model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from .tables import wide_console


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder; resumed if it exists.")] = Path("demo"),
) -> None:
    """Convert, distill and generate with a small model. Takes about ten minutes on two cores; writes a page."""
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..demo import DemoSettings
    from ..demo import demo as run
    from ..demo_page import describe_timing, next_commands, table_rows, write_page

    settings = DemoSettings()
    report = run(output, settings=settings)
    page = write_page(report, settings)
    header, *rows = table_rows(report)
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console = wide_console()
    console.print(table)
    side, ratio = settings.large_side, report.speed.ratio
    print(f"A step at {side}x{side}: the student is {ratio:.1f} times as fast as the teacher (target: at least 3).")
    print(describe_timing(report))
    print(f"Pictures: {page}")
    print("Next:\n  " + "\n  ".join(next_commands(report)))
