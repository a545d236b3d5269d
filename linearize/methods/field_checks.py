"""Checks of the fields of a method's config: a ValueError names the field, its rule and the value."""

import math
from typing import Any


def check_count(name: str, value: Any, *, least: int = 1, odd: bool = False, optional: bool = False) -> None:
    """Require an integer >= `least`, or None if the field is optional."""
    if value is None and optional:
        return
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not (is_integer and value >= least and (not odd or value % 2 == 1)):
        kind, or_none = "an odd integer" if odd else "an integer", " or None" if optional else ""
        raise ValueError(f"{name} must be {kind} >= {least}{or_none}, got {value!r}")


def check_finite(name: str, value: Any, *, least: float | None = None) -> None:
    """Require a finite number, not below `least` if that is given."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and (least is None or value >= least)):
        raise ValueError(f"{name} must be a finite number{'' if least is None else f' >= {least:g}'}, got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Require True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")


def as_tuples(value: Any) -> Any:
    """Convert lists, which JSON gives, to tuples, at every depth."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
