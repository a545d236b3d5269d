"""The methods that can replace softmax attention: one file and one line of `METHODS` each."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from ..errors import did_you_mean
from .agent import Agent as Agent
from .agent import AgentAttention
from .clear import Clear as Clear
from .clear import ClearAttention
from .field_checks import as_tuples
from .hybrid import Hybrid as Hybrid
from .hybrid import HybridAttention
from .linfusion import LinFusion as LinFusion
from .linfusion import LinFusionAttention
from .mala import Mala as Mala
from .mala import MalaAttention
from .method import Method as Method
from .neighborhood import Neighborhood as Neighborhood
from .proxy_tokens import ProxyTokens as ProxyTokens
from .proxy_tokens import ProxyTokensAttention
from .rala import Rala as Rala
from .rala import RalaAttention
from .sliding_tile import SlidingTile as SlidingTile
from .windows import WindowAttention

METHODS: dict[type, type[Method]] = {
    Clear: ClearAttention,
    LinFusion: LinFusionAttention,
    Neighborhood: WindowAttention,
    SlidingTile: WindowAttention,
    Agent: AgentAttention,
    Mala: MalaAttention,
    Rala: RalaAttention,
    ProxyTokens: ProxyTokensAttention,
    Hybrid: HybridAttention,
}

# The default method: docs/methods.md says why
RECOMMENDED = Hybrid(local=Clear(radius=16), global_=ProxyTokens(num_proxies=1024), gate=1.0, focus_tokens=1024)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as a JSON object, `{"method": "clear", "radius": 16}`, without fields at their defaults.

    A field that holds the config of another method becomes a nested object.

    Raises:
        ValueError: `config` is not the config of a method.
    """
    if type(config) not in METHODS:
        raise ValueError(
            f"expected a method config ({', '.join(_config_names())}), such as Clear(radius=16), got {config!r}; "
            "a dict must map patterns of module names to configs"
        )
    values = {field_name(field): (getattr(config, field.name), field.default) for field in fields(config)}
    changed = {name: _json_value(value) for name, (value, default) in values.items() if value != default}
    return {"method": type(config).__name__.lower(), **changed}


def _json_value(value: Any) -> Any:
    if type(value) in METHODS:
        return config_to_dict(value)
    return list(value) if isinstance(value, tuple) else value


def config_from_dict(entries: Mapping[str, Any]) -> Any:
    """The config that `config_to_dict` converted.

    Raises:
        ValueError: an unknown method or field (the nearest is named), a missing one, or a value out of range.
    """
    if not isinstance(entries, Mapping) or not isinstance(entries.get("method"), str):
        raise ValueError(f'a method must look like {{"method": "clear", "radius": 16}}, got {entries!r}')
    classes = _classes()
    method = entries["method"]
    if method not in classes:
        raise ValueError(
            f"unknown method {method!r}{did_you_mean(method, classes)}; choose from: {', '.join(classes)}, or import "
            "the package that adds it to METHODS first"
        )
    cls = classes[method]
    known = {field_name(field): field for field in fields(cls)}
    given = {key: value for key, value in entries.items() if key != "method"}
    for key in given:
        if key not in known:
            raise ValueError(
                f"unknown setting {key!r} of {method}{did_you_mean(key, known)}; known settings: {', '.join(known)}"
            )
    nested = {key: config_from_dict(given[key]) for key in given if known[key].metadata.get("of_method")}
    given = {key: as_tuples(value) for key, value in given.items()}
    try:
        return cls(**{known[key].name: value for key, value in (given | nested).items()})
    except TypeError as error:
        missing = [key for key, field in known.items() if key not in given and field.default is MISSING]
        raise ValueError(f"method {method} lacks required settings: {', '.join(missing)}") from error


def field_name(field: Field[Any]) -> str:
    """A config field's name in files and commands: `global`, a keyword in Python, for `global_`."""
    return field.name.rstrip("_")


def format_setting(value: Any) -> str:
    """A field's value as text; that of a nested method as on the command line, `clear:radius=8`."""
    if not isinstance(value, Mapping):
        return str(value)
    entries = ",".join(
        f"{key}={json.dumps(one, separators=(',', ':'))}" for key, one in value.items() if key != "method"
    )
    return f"{value['method']}:{entries}" if entries else value["method"]


def implementations() -> list[str]:
    """Names that `impl` may take for some method."""
    return list(dict.fromkeys(name for one in METHODS.values() for name in one.implementations()))


def check_impl_known(impl: str) -> None:
    """Raise a ValueError if no method has an implementation of this name."""
    names = implementations()
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(names)}, got {impl!r}{did_you_mean(impl, names)}")


def _classes() -> dict[str, type]:
    """Name of a method in files and commands -> class of its config.

    Raises:
        ValueError: two configs of `METHODS` have one name.
    """
    classes: dict[str, type] = {}
    for cls in METHODS:
        name = cls.__name__.lower()
        if name in classes:
            places = f"{classes[name].__module__} and {cls.__module__}"
            raise ValueError(
                f"two methods are called {name!r}, in {places}: rename the class of the config that is yours"
            )
        classes[name] = cls
    return classes


def _config_names() -> list[str]:
    return [cls.__name__ for cls in METHODS]
