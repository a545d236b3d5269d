"""The folder of a run: refused when it holds something else, and resumed with the settings that made it, or with others
that count from there on, which are told and kept.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..linearize.adapters.base import read_json
from .checkpoint import latest_checkpoint
from .config import DistillConfig
from .config_tables import config_from_tables, config_to_tables
from .files import write_json

logger = logging.getLogger(__name__)

RECORD = "run.json"
# In it, beside the settings:
SAMPLES = "samples"  # fingerprint of the data
HISTORY = "history"  # what was changed on the way
AUTOCAST = "bfloat16"  # whether the student computes in it, which `run.mixed_precision = "auto"` leaves to the machine

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
# What follows depends on these, what was learnt does not: a run that diverged goes on with a lower rate, for example.
_MAY_CHANGE_FROM_HERE = (
    "layerwise.lr",
    "layerwise.warmup",
    "optimizer.betas",
    "optimizer.eps",
    "optimizer.lr",
    "optimizer.max_grad_norm",
    "optimizer.weight_decay",
    "run.steps",
    "schedule.final",
    "schedule.kind",
    "schedule.warmup",
)


def check_run(config: DistillConfig, data: str, *, resume: bool) -> None:
    """Whether the folder is free, or holds this run.

    Args:
        data: Fingerprint of the samples.
    Raises:
        ValueError: the folder is in use, was started with settings (which are named) that made what it holds, or is
            further than `run.steps`.
    """
    directory = config.run.folder
    record = directory / RECORD
    if resume and record.is_file():
        _compare(_read(record), _contents(config, data), directory)
        _check_steps(config, directory)
    elif not directory.exists() or all(path.name.startswith(".") for path in directory.iterdir()):
        return  # a lock, or what a call left that was killed while it wrote the record
    elif resume:
        raise ValueError(f"{directory} holds no run (no {RECORD}) to go on with: name another folder")
    else:
        raise ValueError(f"{directory} is not empty; add --resume latest to go on with its run, or name another folder")


def record_run(config: DistillConfig, data: str, *, mixed: bool) -> bool:
    """Make the folder and write down what it is for, and which settings changed since it was last written down.

    Args:
        data: Fingerprint of the samples.
        mixed: Whether the student shall compute in bfloat16.
    Returns:
        Whether it shall: as it did where the run began.
    """
    directory = config.run.folder
    directory.mkdir(parents=True, exist_ok=True)
    record, contents = directory / RECORD, _contents(config, data)
    before = _read(record) if record.is_file() else contents
    history, mixed = before.get(HISTORY, []), before.get(AUTOCAST, mixed)
    changed = _differences(before, contents, _MAY_CHANGE_FROM_HERE)
    if changed:
        found = latest_checkpoint(directory)
        step = found[1] if found else 0
        logger.warning("%s goes on after step %d with other settings: %s", directory, step, "; ".join(changed))
        history = [*history, {"after_step": step, "changed": changed}]
    write_json(record, contents | {AUTOCAST: mixed} | ({HISTORY: history} if history else {}))
    return mixed


def _contents(config: DistillConfig, data: str) -> dict[str, Any]:
    return json.loads(json.dumps(config_to_tables(config) | {SAMPLES: data}))


def _read(record: Path) -> dict[str, Any]:
    """A record, with what settings that came after it are where nothing is said.

    Raises:
        ValueError: it is damaged.
    """
    stored = read_json(record)
    for name, kind, what in ((HISTORY, list, "a list"), (AUTOCAST, bool, "true or false")):
        if not isinstance(stored.get(name, kind()), kind):
            raise ValueError(
                f"{record} is damaged: {name} must be {what}, got {stored[name]!r}: mend it, or take that entry out"
            )
    others = {name: stored[name] for name in (SAMPLES, HISTORY, AUTOCAST) if name in stored}
    tables = {name: table for name, table in stored.items() if name not in others}
    try:
        config = config_from_tables(tables)
    except ValueError:  # a setting is gone: it is told as a difference
        return stored
    return json.loads(json.dumps(config_to_tables(config))) | others


def _compare(stored: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    names = {name for table in (stored, now) for name, _ in _flat(table)}
    different = _differences(stored, now, names - _MAY_CHANGE - {*_MAY_CHANGE_FROM_HERE})
    if different:
        raise ValueError(
            f"{directory} was started with other settings: {'; '.join(different)}; name another folder, or go on with "
            "what it had"
        )


def _check_steps(config: DistillConfig, directory: Path) -> None:
    first, found = config.layerwise.steps, latest_checkpoint(directory)
    if found is not None and found[1] > first + config.run.steps:
        raise ValueError(
            f"run.steps must be >= {found[1] - first}, for which {found[0]} is the newest checkpoint, got "
            f"{config.run.steps}; each checkpoint holds an adapter"
        )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    old, new = dict(_flat(before)), dict(_flat(after))
    return [
        f"{name} was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(names)
        if old.get(name) != new.get(name)
    ]


def _flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in (HISTORY, AUTOCAST):
            yield f"{prefix}{name}", value
