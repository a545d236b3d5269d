"""The folder of a run: refused if it holds something else; resumed with its original settings, or with changes that
affect later steps only, which are logged and recorded.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..linearize.adapters.base import read_json
from .checkpoint import Resume, step_to_resume
from .config import DistillConfig
from .config_tables import config_from_tables, config_to_tables
from .files import write_json
from .start import adapter_fingerprint

logger = logging.getLogger(__name__)

FILE = "run.json"
# Its entries besides the settings:
SAMPLES = "samples"  # fingerprint of the data
START = "start_adapter"  # fingerprint of the adapter that the student started from
HISTORY = "history"  # settings changed on resuming
AUTOCAST = "bfloat16"  # whether the student computes in it, which `run.mixed_precision = "auto"` leaves to the machine

# These move files or trade memory for time; training does not depend on them. (Samples and adapters are compared by
# content.)
_MAY_CHANGE = {
    "data.directory",
    "run.directory",
    "run.gradient_accumulation",
    "run.gradient_checkpointing",
    "run.impl",
    "save.every",
    "save.keep_last",
    "save.log_every",
    "save.report_to",
    "start.adapter",
    "start.revision",
    "validate.every",
}
# These affect later steps only: a run that diverged can continue with a lower rate, for example.
_MAY_CHANGE_ON_RESUME = (
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


def flat_tables(config: DistillConfig) -> dict[str, Any]:
    """Every setting by its full name, such as "loss.flow"."""
    return dict(_flat(config_to_tables(config)))


def check_run(config: DistillConfig, data: str, *, resume: Resume | None) -> int:
    """The step after which the run begins; 0 in a free folder.

    Args:
        data: Fingerprint of the samples.
        resume: The checkpoint to continue after; None: a new run.
    Raises:
        ValueError: the folder is not empty, was started with other settings (which are named), holds no such
            checkpoint, or is further than `run.steps`.
    """
    directory = config.run.folder
    file = directory / FILE
    if resume is not None and file.is_file():
        _compare(_read(file), _contents(config, data), directory)
        step = step_to_resume(directory, resume)
        _check_steps(config, step)
        if not step:
            logger.info("%s holds no complete checkpoint; starting at step 0", directory)
        return step
    free = not directory.exists() or all(path.name.startswith(".") for path in directory.iterdir())
    if free and resume in (None, "latest"):
        return 0  # a lock, or leftovers of a call that was killed before it wrote the file
    if resume is not None:
        raise ValueError(f"{directory} holds no run (no {FILE}) to continue: name another folder")
    raise ValueError(f"{directory} is not empty; add --resume latest to continue its run, or name another folder")


def write_run(config: DistillConfig, data: str, *, start: int = 0, mixed: bool) -> bool:
    """Create the folder and record its settings, and which of them changed since they were last recorded.

    Args:
        data: Fingerprint of the samples.
        start: The step after which the run begins.
        mixed: Whether a new run's student computes in bfloat16.
    Returns:
        Whether this run's student does, as when it began.
    """
    directory = config.run.folder
    directory.mkdir(parents=True, exist_ok=True)
    file, contents = directory / FILE, _contents(config, data)
    before = _read(file) if file.is_file() else contents
    history, mixed = before.get(HISTORY, []), before.get(AUTOCAST, mixed)
    changed = _differences(before, contents, _MAY_CHANGE_ON_RESUME)
    if changed:
        logger.warning("%s continues after step %d with other settings: %s", directory, start, "; ".join(changed))
        history = [*history, {"after_step": start, "changed": changed}]
    write_json(file, contents | {AUTOCAST: mixed} | ({HISTORY: history} if history else {}))
    return mixed


def _contents(config: DistillConfig, data: str) -> dict[str, Any]:
    started = adapter_fingerprint(config.start)
    contents = config_to_tables(config) | {SAMPLES: data} | ({START: started} if started else {})
    return json.loads(json.dumps(contents))


def _read(file: Path) -> dict[str, Any]:
    """A run's recorded settings, with defaults for settings added since; raises ValueError if the file is damaged."""
    stored = read_json(file)
    for name, kind, what in ((HISTORY, list, "a list"), (AUTOCAST, bool, "true or false")):
        if not isinstance(stored.get(name, kind()), kind):
            raise ValueError(
                f"{file} is damaged: {name} must be {what}, got {stored[name]!r}: repair it, or remove that entry"
            )
    others = {name: stored[name] for name in (SAMPLES, START, HISTORY, AUTOCAST) if name in stored}
    tables = {name: table for name, table in stored.items() if name not in others}
    try:
        config = config_from_tables(tables)
    except ValueError:  # a setting no longer exists: reported as a difference
        return stored
    return json.loads(json.dumps(config_to_tables(config))) | others


def _compare(stored: Mapping[str, Any], now: Mapping[str, Any], directory: Path) -> None:
    names = {name for table in (stored, now) for name, _ in _flat(table)}
    different = _differences(stored, now, names - _MAY_CHANGE - {*_MAY_CHANGE_ON_RESUME})
    if different:
        raise ValueError(
            f"{directory} was started with other settings: {'; '.join(different)}; name another folder, or continue "
            "with those settings"
        )


def _check_steps(config: DistillConfig, start: int) -> None:
    first = config.layerwise.steps
    if start > first + config.run.steps:
        raise ValueError(
            f"run.steps must be >= {start - first}, the step after which the run continues, got {config.run.steps}; "
            "each checkpoint holds an adapter, and --resume STEP continues from an earlier one"
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
