"""Options that methods bring: `--pool-size 4` sets `pool_size` in the config of the method that `--method` names.

A setting that is a method in turn is spelled METHOD:SETTING=VALUE,..., as in `--local clear:radius=8 --global mala`, or
in JSON where it has more settings within another: `hybrid:local={"method":"clear","radius":8},global=mala`.
"""

import dataclasses
import json
import re
from typing import Any

from typer.core import TyperCommand


def option_name(field: str) -> str:
    """`--pool-size` for the field `pool_size`, `--global` for `global_`."""
    return "--" + field.rstrip("_").replace("_", "-")


def fields_of_methods() -> dict[str, tuple[dataclasses.Field[Any], ...]]:
    """The fields of every method's config, by the method's name in the registry."""
    from ..linearize.methods import METHODS

    return {config.__name__.lower(): dataclasses.fields(config) for config in METHODS}


def split_arguments(
    arguments: list[str], fields: set[str], of_methods: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """Takes `--field value` and `--field=value` out of `arguments`.

    Args:
        fields: Names of all fields.
        of_methods: Names of those that hold a method.
    Returns:
        ({field: value}, the other arguments). A value is what it is in JSON (`16` a number, `null` None), else text; a
        method is a dictionary.
    Raises:
        ValueError: an option has no value, or a method is misspelled.
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
        if re.match(r"-(?![\d.])", text):  # the next option, not a negative number
            raise ValueError(f"option {name} needs a value")
        options[field] = parse_method(text) if field in of_methods else _value(text)
    return options, others


def parse_method(text: str) -> Any:
    """{"method": "clear", "radius": 8} of `clear:radius=8`, or of JSON.

    Raises:
        ValueError: it is misspelled.
    """
    if text.startswith("{"):
        return _value(text)
    method, _, settings = text.partition(":")
    pairs = [part.partition("=") for part in _outside_brackets(settings)]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"a method is spelled METHOD:SETTING=VALUE,... such as clear:radius=8, got {text!r}")
    found = {key.replace("-", "_"): value for key, _, value in pairs}
    nested = nested_settings()
    return {"method": method} | {key: (parse_method if key in nested else _value)(found[key]) for key in found}


def nested_settings() -> frozenset[str]:
    """The settings that hold a method."""
    fields = [field for fields in fields_of_methods().values() for field in fields]
    return frozenset(field.name.rstrip("_") for field in fields if field.metadata.get("of_method"))


def _outside_brackets(text: str) -> list[str]:
    """What stands between the commas that no bracket holds; nothing of an empty text."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text else []


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class MethodCommand(TyperCommand):
    """A command that takes the fields of every method as options and finds them in `ctx.obj`, {field: value}."""

    def method_options(self) -> list[str]:
        """The names of the options that the methods bring."""
        return sorted({option_name(field.name) for fields in fields_of_methods().values() for field in fields})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        fields = [field for fields in fields_of_methods().values() for field in fields]
        names = {field.name.rstrip("_") for field in fields}
        ctx.obj, args = split_arguments(args, names, nested_settings())
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        for method, fields in fields_of_methods().items():
            with formatter.section(f"Options of --method {method}"):
                formatter.write_dl([(option_name(field.name), _describe(field)) for field in fields])


def _describe(field: dataclasses.Field[Any]) -> str:
    if field.metadata.get("of_method"):
        return "METHOD:SETTING=VALUE,..., required"
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return f"{kind}, required" if field.default is dataclasses.MISSING else f"{kind}, default {field.default}"
