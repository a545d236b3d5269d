"""How `--help` looks: plain text in sections, at most 120 columns wide, whatever it is written to."""

import re
from typing import Any

from typer.core import TyperCommand

WIDTH = 120  # columns, if the terminal has as many


class SectionedCommand(TyperCommand):
    """A command whose options are grouped by heading (`rich_help_panel`), headings in the order of their first option.

    typer draws such panels as coloured boxes, which at 80 columns leave half of a line for words.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        names = [_usage_name(parameter) for parameter in self.get_params(ctx) if _is_argument(parameter)]
        return [self.options_metavar or "", *names]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default_heading = "Arguments" if _is_argument(parameter) else "Options"
                section = sections.setdefault(getattr(parameter, "rich_help_panel", None) or default_heading, [])
                section.append(_format_record(parameter, *record))
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _usage_name(parameter: Any) -> str:
    """`BASE`, or `[PROMPT...]` if it is optional; typer puts the first in braces, which mean a choice."""
    return parameter.metavar if parameter.required else f"[{parameter.metavar}]"


def _format_record(parameter: Any, name: str, help_text: str) -> tuple[str, str]:
    """typer's help record of an argument or option, without Python's types and with bounds in words."""
    if _is_argument(parameter):
        name, help_text = _usage_name(parameter), help_text.removesuffix("[required]").rstrip()
    bounds = parameter.min, parameter.max
    if bounds != (None, None):
        minimum, maximum = bounds
        words = f"{minimum} to {maximum}" if maximum is not None and maximum < 2**32 else f"{minimum} or more"
        help_text = re.sub(r"[-\d.<=]*x[-\d.<=>]+\]$", f"{words}]", help_text)
    return name.replace(" range>", ">"), help_text
