"""Tables on a terminal, and uncut tables in a pipe or a file."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..linearize.adapters.quantization import Quantization

MAX_WIDTH = 100  # columns, of a terminal
UNLIMITED_WIDTH = 10_000  # columns, if it is not a terminal: no cell is cut or wrapped


def wide_console() -> Console:
    """A console as wide as the terminal, but at most `MAX_WIDTH`; in a pipe or a file as wide as its tables are.

    It prints text as given: brackets and colons in folder names are not markup.
    """
    console = Console(markup=False, emoji=False, highlight=False)
    console.width = min(console.width, MAX_WIDTH) if console.is_terminal else UNLIMITED_WIDTH
    return console


def print_titled(console: Console, title: str, table: Table) -> None:
    """Print a table under a title; rich would wrap the table's own title at the table's width."""
    console.print(title, style="italic", soft_wrap=True)
    console.print(table)


def conditions_suffix(quantization: "Quantization | None", offload: str = "none") -> str:
    """Suffix for the title of a quantized or offloaded model's figures: `; weights by torchao, offload model`."""
    conditions = [f"weights by {quantization}"] if quantization else []
    conditions += [f"offload {offload}"] if offload != "none" else []
    return f"; {', '.join(conditions)}" if conditions else ""
