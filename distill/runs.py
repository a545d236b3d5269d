"""The folder of a run: refused when it holds something else, and resumed only with the settings that made it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import DistillConfig, config_to_tables
from .files import write_json

RECORD = "run.json"

# These move files or trade memory for time; what is learnt does not depend on them. (Of the data, the content counts.)
_MAY_CHANGE = {
    "data.directory",
    "run.directory",
    "run.gradient_accumulation",
    "run.gradient_checkpointing",
    "run.impl",
    "save.every",
    "save.keep_last",
    "save.log_every",
    "validate.every",
}


def check_run(config: DistillConfig, data: str, *, resume: bool) -> None:
    """Whether the folder is free, or holds this run.

    Args:
        data: Fingerprint of the samples.
    Raises:
        ValueError: the folder is in use, or was started with other settings (which are named).
    """
    directory = Path(config.run.directory)
    record = directory / RECORD
    if resume and record.is_file():
        _compare(json.loads(record.read_text()), _contents(config, data), directory)
    elif directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; add --resume latest to go on with its run, or name another folder")


def record_run(config: DistillConfig, data: str) -> None:
    """Make the folder and write down what it is for."""
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECORD, _contents(config, data))


def _contents(config: DistillConfig, data: str) -> dict[str, Any]:
    return json.loads(json.dumps(config_to_tables(config) | {"samples": data}))


def _compare(stored: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    before, after = dict(_flat(stored)), dict(_flat(now))
    # a longer run has the same beginning, unless the cosine stretches with it
    may_change = _MAY_CHANGE | ({"run.steps"} if now["schedule"]["kind"] == "constant" else set())
    different = [
        f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and name not in may_change
    ]
    if different:
        raise ValueError(f"{directory} was started with other settings: {'; '.join(different)}")


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
