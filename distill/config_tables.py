"""The settings of a distillation, from a TOML file or nested dictionaries and back; every name is checked."""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from ..linearize.methods import config_from_dict, config_to_dict
from .config import TRAINED, DistillConfig, Start, require
from .start import with_adapter_defaults


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a TOML file; each override is `table.key=value`, the value as in TOML, or bare text.

    If unset, the method and the trained weights default to those of the adapter in `[start]`, if there is one.

    Raises:
        ValueError: the file is not TOML, a table, key or value is invalid (the nearest name is suggested), or the
            adapter cannot be read.
        OSError: the file cannot be read.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    start = tables.get("start", {})
    require(isinstance(start, Mapping), "start", "a table", start)
    return config_from_tables(with_adapter_defaults(tables, _build(Start, start, "start")))


def config_from_tables(tables: Mapping[str, Any]) -> DistillConfig:
    """The config from nested dictionaries, as tomllib or `config_to_tables` returns them."""
    hints = get_type_hints(DistillConfig)
    _check_names(DistillConfig, tables, "")
    parts: dict[str, Any] = {}
    for name, table in tables.items():
        require(isinstance(table, Mapping), name, "a table", table)
        if name == "method":
            parts[name] = _method(table)
        elif name == "trained":
            parts[name] = _trained(table)
        else:
            parts[name] = _build(hints[name], table, name)
    return DistillConfig(**parts)


def config_to_tables(config: DistillConfig) -> dict[str, Any]:
    """Nested dictionaries of plain values; `config_from_tables` reads them back."""
    tables: dict[str, Any] = {
        part.name: asdict(getattr(config, part.name)) for part in fields(config) if part.name != "method"
    }
    method = config.method
    tables["method"] = (
        {pattern: config_to_dict(one) for pattern, one in method.items()}
        if isinstance(method, Mapping)
        else config_to_dict(method)
    )
    kind = next(kind for kind, cls in TRAINED.items() if isinstance(config.trained, cls))
    tables["trained"] = {"kind": kind} | tables["trained"]
    return tables


def as_toml(value: Any) -> str:
    """A value as one line of TOML; dictionaries become inline tables without their None entries."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(one)}" for key, one in value.items() if one is not None) + "}"
    return json.dumps(value)


def _override(tables: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    table, _, key = path.strip().partition(".")
    if not (equals and table and key):
        raise ValueError(f"an override must look like table.key=value, got {text!r}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    values = tables.setdefault(table, {})
    require(isinstance(values, dict), table, "a table", values)
    values[key] = parsed
    is_kind = isinstance(parsed, str) and parsed in TRAINED
    if (table, key) == ("trained", "kind") and is_kind:  # drop the file's settings of the other kind
        known_fields = {item.name for kind in TRAINED.values() for item in fields(kind)}
        for name in known_fields - {item.name for item in fields(TRAINED[parsed])}:
            values.pop(name, None)


def _method(table: Mapping[str, Any]) -> Any:
    if isinstance(table.get("method"), str):
        return config_from_dict(dict(table))
    patterns = all(isinstance(one, Mapping) for one in table.values())
    require(patterns, "method", "one method (method = NAME), or one table per pattern", table)
    return {pattern: config_from_dict(dict(one)) for pattern, one in table.items()}


def _trained(table: Mapping[str, Any]) -> Any:
    kind = table.get("kind", "lora")
    require(isinstance(kind, str) and kind in TRAINED, "trained.kind", " or ".join(TRAINED), kind)
    return _build(TRAINED[kind], {key: value for key, value in table.items() if key != "kind"}, "trained")


def _build(cls: type, table: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(cls)
    _check_names(cls, table, f"{where}.")
    return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in table.items()})


def _check_names(cls: type, table: Mapping[str, Any], where: str) -> None:
    known = {item.name: item for item in fields(cls)}
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown setting {where}{key}; {hint}")
    for name, item in known.items():
        if name not in table and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"the setting {where}{name} is missing")


def _convert(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is UnionType:
        hints = [one for one in get_args(hint) if one is not type(None)]
        return None if value is None else _convert(value, hints[0], where)
    if is_dataclass(hint) or get_origin(hint) is dict:
        require(isinstance(value, Mapping), where, "a table", value)
        return dict(value) if get_origin(hint) is dict else _build(hint, value, where)
    if get_origin(hint) is tuple:
        inner, rest = get_args(hint)
        long_enough = isinstance(value, list | tuple) and (rest is Ellipsis or len(value) == len(get_args(hint)))
        require(long_enough, where, f"a list of {inner.__name__}" + ("" if rest is Ellipsis else " pairs"), value)
        return tuple(_convert(one, inner, where) for one in value)
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, where, f"of type {hint.__name__}", value)
    return value
