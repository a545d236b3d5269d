"""How `--help` looks: plain text in sections, at most 120 columns wide, whatever it is written to."""

from typing import Any

from typer.core import TyperCommand

WIDTH = 120  # columns, where the terminal has as many


class SectionedCommand(TyperCommand):
    """A command whose options stand under the headings that they name (`rich_help_panel`), in the order of the first.

    typer draws such panels as boxes of colour, which at 80 columns leave half of a line for words.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[Any]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)
