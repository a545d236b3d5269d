"""Options of methods: `--pool-size 4` sets `pool_size` in the config of the method that `--method` names.

A setting that is itself a method is spelled METHOD:SETTING=VALUE,..., as in `--local clear:radius=8 --global mala`, or
in JSON if it has settings within another method: `hybrid:local={"method":"clear","radius":8},global=mala`.
"""

import dataclasses
import inspect
import json
import re
from typing import Any, get_args, get_origin

from .help_text import SectionedCommand
from .prompts import split_outside_brackets


def option_name(field: str) -> str:
    """`--pool-size` for the field `pool_size`, `--global` for `global_`."""
    return "--" + field.rstrip("_").replace("_", "-")


def fields_of_methods() -> dict[str, tuple[dataclasses.Field[Any], ...]]:
    """The fields of every method's config, by the method's name in the registry."""
    from ..linearize.methods import METHODS

    return {config.__name__.lower(): dataclasses.fields(config) for config in METHODS}


def split_arguments(
    arguments: list[str], fields: set[str], method_fields: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], list[str]]:
    """Separate `--field value` and `--field=value` from the other arguments.

    Args:
        fields: Names of all fields.
        method_fields: Names of those that hold a method.
    Returns:
        ({field: value}, the other arguments). A value is parsed as JSON (`16` a number, `null` None), else it is text;
        a method is a dictionary.
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
        options[field] = parse_method(text) if field in method_fields else _value(text)
    return options, others


def parse_method(text: str) -> Any:
    """{"method": "clear", "radius": 8} from `clear:radius=8`, or from JSON.

    Raises:
        ValueError: it is misspelled.
    """
    if text.startswith("{"):
        return _value(text)
    method, _, entries = text.partition(":")
    pairs = [part.partition("=") for part in split_outside_brackets(entries)]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError(f"a method must be METHOD:SETTING=VALUE,... such as clear:radius=8, got {text!r}")
    found = {key.replace("-", "_"): value for key, _, value in pairs}
    nested = nested_fields()
    return {"method": method} | {key: (parse_method if key in nested else _value)(found[key]) for key in found}


def nested_fields() -> frozenset[str]:
    """The fields that hold a method."""
    fields = [field for fields in fields_of_methods().values() for field in fields]
    return frozenset(field.name.rstrip("_") for field in fields if field.metadata.get("of_method"))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


class MethodCommand(SectionedCommand):
    """A command that takes the fields of every method as options and finds them in `ctx.obj`, {field: value}."""

    def method_options(self) -> list[str]:
        """The names of the methods' options."""
        return sorted({option_name(field.name) for fields in fields_of_methods().values() for field in fields})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        fields = [field for fields in fields_of_methods().values() for field in fields]
        names = {field.name.rstrip("_") for field in fields}
        ctx.obj, args = split_arguments(args, names, nested_fields())
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from ..linearize.methods import METHODS

        super().format_options(ctx, formatter)
        for config in METHODS:
            descriptions = field_descriptions(config)
            with formatter.section(f"Options of --method {config.__name__.lower()}"):
                formatter.write_dl(
                    [(_option_usage(one), _describe_field(one, descriptions)) for one in dataclasses.fields(config)]
                )


def field_descriptions(config: type) -> dict[str, str]:
    """{field: text} from `Attributes:` in the docstrings of a config and its bases."""
    descriptions: dict[str, str] = {}
    for one in reversed(config.__mro__):
        _, _, attributes = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")
        found = re.findall(r"(?m)^    (\w[\w, ]*): (.*(?:\n {8,}.*)*)", attributes)
        descriptions |= {name: " ".join(text.split()) for names, text in found for name in names.split(", ")}
    return descriptions


def _option_usage(field: dataclasses.Field[Any]) -> str:
    """`--window <int>|[<int>,<int>]`."""
    return f"{option_name(field.name)} {'METHOD[:SETTING=VALUE,...]' if _holds_method(field) else _syntax(field.type)}"


def _holds_method(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("of_method"))


def _syntax(kind: Any) -> str:
    """How a value of this type is written."""
    if get_origin(kind) is tuple:
        return f"[{','.join(map(_syntax, get_args(kind)))}]"
    if parts := [part for part in get_args(kind) if part is not type(None)]:
        return "|".join(map(_syntax, parts))
    return "true|false" if kind is bool else f"<{getattr(kind, '__name__', kind)}>"


def _describe_field(field: dataclasses.Field[Any], descriptions: dict[str, str]) -> str:
    """The field's description and default, as for other options."""
    default = "required" if field.default is dataclasses.MISSING else f"default: {json.dumps(field.default)}"
    is_none = field.default is None
    return " ".join([descriptions.get(field.name, ""), *([] if is_none else [f" [{default}]"])]).strip()
