"""Options that methods bring: `--pool-size 4` sets `pool_size` in the config of the method that `--method` names."""

import dataclasses
import json
from typing import Any

from typer.core import TyperCommand


def option_name(field: str) -> str:
    """`--pool-size` for the field `pool_size`."""
    return "--" + field.replace("_", "-")


def fields_of_methods() -> dict[str, tuple[dataclasses.Field[Any], ...]]:
    """The fields of every method's config, by the method's name in the registry."""
    from ..linearize.methods import METHODS

    return {config.__name__.lower(): dataclasses.fields(config) for config in METHODS}


def split_arguments(arguments: list[str], fields: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes `--field value` and `--field=value` out of `arguments`.

    Returns:
        ({field: value}, the other arguments). A value is what it is in JSON (`16` a number, `null` None), else text.
    Raises:
        ValueError: an option has no value.
    """
    options: dict[str, Any] = {}
    others: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, _, value = argument.partition("=")
        field = name.removeprefix("--").replace("-", "_")
        if not name.startswith("--") or field not in fields:
            others.append(argument)
            continue
        text = value or next(remaining, "--")
        if text.startswith("--"):
            raise ValueError(f"option {name} needs a value")
        try:
            options[field] = json.loads(text)
        except json.JSONDecodeError:
            options[field] = text
    return options, others


class MethodCommand(TyperCommand):
    """A command that takes the fields of every method as options and finds them in `ctx.obj`, {field: value}."""

    def method_options(self) -> list[str]:
        """The names of the options that the methods bring."""
        return sorted({option_name(field.name) for fields in fields_of_methods().values() for field in fields})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        names = {field.name for fields in fields_of_methods().values() for field in fields}
        ctx.obj, args = split_arguments(args, names)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        for method, fields in fields_of_methods().items():
            with formatter.section(f"Options of --method {method}"):
                formatter.write_dl([(option_name(field.name), _describe(field)) for field in fields])


def _describe(field: dataclasses.Field[Any]) -> str:
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return f"{kind}, required" if field.default is dataclasses.MISSING else f"{kind}, default {field.default}"
