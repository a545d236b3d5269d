"""`lineardit distill`: one process runs here, several through `accelerate launch -m lineardit.distill`."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def distill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's settings, a TOML file.")],
    resume: Annotated[str | None, typer.Option(metavar="latest", help="Go on after the newest checkpoint.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting; repeatable.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")] = 1,
) -> None:
    """Teach a student what its teacher does. For several machines use accelerate launch itself."""
    from ..distill.__main__ import main
    from ..distill.config import load_config

    options = [
        *(["--resume", resume] if resume else []),
        *(word for pair in settings or [] for word in ("--set", pair)),
    ]
    if processes == 1:
        raise typer.Exit(main([str(config), *options]))
    load_config(config, settings or [])  # bad settings are told once, not by every process
    raise typer.Exit(_launch(processes, ["-m", "lineardit.distill", str(config), *options]))


def _launch(processes: int, arguments: list[str]) -> int:
    """Runs `accelerate launch` and returns its exit code; --multi_gpu is what starts several processes on CPUs too."""
    launch = ["--quiet", "--multi_gpu", "--num_machines", "1", "--num_processes", str(processes)]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    print(shlex.join(["accelerate", "launch", *launch, *arguments]), flush=True)
    # the child finds the same package as this process, installed or not
    search_path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": search_path}, check=False).returncode
