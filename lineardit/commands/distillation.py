"""`lineardit distill`: train in this process, or launch several."""

from pathlib import Path
from typing import Annotated

import typer


def distill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings of the run, a TOML file.")],
    resume: Annotated[
        str | None,
        typer.Option(metavar="latest|STEP", help="Continue from the newest checkpoint, or from that of a step."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; repeatable.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")] = 1,
) -> None:
    """Train a student to match its teacher. For several machines, use accelerate launch."""
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..distill.__main__ import main
    from ..distill.config_tables import load_config
    from ..distill.launch import launch

    options = [
        *(["--resume", resume] if resume else []),
        *(word for pair in changes or [] for word in ("--set", pair)),
    ]
    if processes == 1:
        raise typer.Exit(main([str(config), *options]))
    load_config(config, changes or [])  # reports bad settings once, not in every process
    raise typer.Exit(launch(config, options, processes=processes))
