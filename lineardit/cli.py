"""The command `lineardit`: a command line for the Python API, with one sentence for bad input.

Commands import what they need when they run, so that `--help` answers without loading torch.
"""

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .commands.bench import bench
from .commands.convert import convert
from .commands.decode import decode
from .commands.demo import demo
from .commands.distillation import distill
from .commands.evaluate import evaluate
from .commands.generate import generate
from .commands.help_text import WIDTH, SectionedCommand
from .commands.inspection import inspect
from .commands.method_options import MethodCommand
from .commands.nearness import nearness
from .commands.preparation import prepare
from .commands.profile import profile
from .commands.upscale import upscale

INTERRUPTED = 130  # the exit code after Ctrl-C
PIPE_CLOSED = 141  # 128 + SIGPIPE, as of other tools whose reader has gone
RESUMABLE = ("prepare", "generate", "upscale", "evaluate", "demo")  # commands that resume their own work
MEMORY_ADVICE = "use a smaller size or batch or, if the command has them, --dtype bfloat16, --chunk-tokens or --offload"

app = typer.Typer(
    name="lineardit",
    help="Attention of linear cost for pretrained diffusion models: convert, distill, generate.",
    context_settings={"max_content_width": WIDTH},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(cls=MethodCommand)(convert)
app.command(cls=SectionedCommand)(inspect)
app.command(cls=SectionedCommand)(prepare)
app.command(cls=SectionedCommand)(distill)
app.command(cls=SectionedCommand)(generate)
app.command(cls=SectionedCommand)(upscale)
app.command(cls=SectionedCommand)(decode)
app.command(cls=SectionedCommand)(evaluate)
app.command(cls=SectionedCommand)(profile)
app.command(cls=SectionedCommand)(nearness)
app.command(cls=SectionedCommand)(bench)
app.command(cls=SectionedCommand)(demo)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"lineardit {__version__}")
        raise typer.Exit


@app.callback()
def _before_each_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lineardit").setLevel(logging.DEBUG if traceback else logging.INFO)


def _with_valid_options(error: typer.TyperException) -> str:
    """The error's message; for an unknown option, with the options that exist."""
    message = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None or not message.startswith("No such option"):
        return message
    options = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    if isinstance(context.command, MethodCommand):
        options += context.command.method_options()
    return f"{message.rstrip('.')}; {context.command_path} takes {', '.join(options)}"


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code. Bad input is one sentence on standard error, and 2.

    Raises:
        BrokenPipeError: the reader of the output has gone.
    """
    words = [_expand_home(word) for word in arguments] or ["--help"]
    try:
        exit_code = app(args=words, prog_name="lineardit", standalone_mode=False) or 0
        print(end="", flush=True)  # here, where a failure is still handled
        command = next((word for word in words if not word.startswith("-")), "")
        if exit_code != INTERRUPTED or command == "distill":  # distill says itself how to continue
            return exit_code
        message = "interrupted" + ("; run the same command again to continue" if command in RESUMABLE else "")
    except typer.TyperException as error:
        message, exit_code = _with_valid_options(error), error.exit_code
    except SystemExit as error:
        if error.code != 1:
            raise
        raise BrokenPipeError from error  # typer and rich turn a broken pipe into this
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        if "--traceback" in arguments:
            raise
        from .linearize.errors import error_text

        message, exit_code = error_text(error), 2
    except RuntimeError as error:
        from .linearize.errors import is_out_of_memory

        if "--traceback" in arguments or not is_out_of_memory(error):
            raise
        message, exit_code = f"out of memory: {error}; {MEMORY_ADVICE}", 1
    print(f"lineardit: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _expand_home(word: str) -> str:
    """An argument with a leading `~/` expanded, also after an equals sign, where shells leave it."""
    return re.sub(r"^(--[\w-]+=)?~(?=/)", lambda found: f"{found[1] or ''}{Path.home()}", word)


def main() -> None:
    """The entry point; ends quietly if the reader of its output has gone, as in `lineardit inspect BASE | head -1`."""
    try:
        exit_code = run(sys.argv[1:])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes
        exit_code = PIPE_CLOSED
    sys.exit(exit_code)
