"""The numbers of a run for experiment trackers (TensorBoard, Weights & Biases and others), by accelerate's classes."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .config import DistillConfig
from .runs import flat_tables

PROJECT = "lineardit"  # as trackers show it; TensorBoard's events are in a folder of this name in the run's


def available(names: Iterable[str]) -> list[str]:
    """Those whose package is here."""
    here = [str(one) for one in get_available_trackers()]
    return [name for name in names if name in here]


def check_trackers(names: Iterable[str]) -> None:
    """Raise a ValueError for a tracker that accelerate does not know, or whose package is not here."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"save.report_to must be of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}; got {name!r}")
        if not available([name]):
            raise ValueError(f"save.report_to names {name}, which is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: DistillConfig) -> None:
    """Tell the accelerator's trackers, if it has any, of a run and its settings; all processes call it."""
    if accelerator.log_with:
        accelerator.init_trackers(PROJECT, config={name: _plain(value) for name, value in flat_tables(config).items()})


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
