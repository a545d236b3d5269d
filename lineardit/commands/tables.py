"""Tables on a terminal, and whole ones in a pipe or a file."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..linearize.adapters.quantization import Quantization

MAX_WIDTH = 100  # columns, of a terminal
WHOLE = 10_000  # columns, of what is no terminal: no cell is cut or wrapped


def wide_console() -> Console:
    """A console as wide as the terminal, but at most `MAX_WIDTH`; in a pipe or a file as wide as its tables are.

    It prints what it is given: brackets and colons in the names of folders are no markup.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    console.width = min(console.width, MAX_WIDTH) if console.is_terminal else WHOLE
    return console


def print_titled(console: Console, title: str, table: Table) -> None:
    """A table under a title; one of the table's own is wrapped at the table's width."""
    console.print(title, style="italic", soft_wrap=True)
    console.print(table)


def how_told(quantization: "Quantization | None", offload: str = "none") -> str:
    """What is to be said of figures whose model is quantized or offloaded: `; weights by torchao, offload model`."""
    told = [f"weights by {quantization}"] if quantization else []
    told += [f"offload {offload}"] if offload != "none" else []
    return f"; {', '.join(told)}" if told else ""
