"""Logging to experiment trackers (TensorBoard, Weights & Biases and others) through accelerate."""

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from .config import DistillConfig
from .runs import flat_tables

PROJECT = "lineardit"  # shown by trackers; TensorBoard's events are in a subfolder of this name in the run's folder


def installed_trackers(names: Iterable[str]) -> list[str]:
    """The trackers whose package is installed."""
    installed = [str(one) for one in get_available_trackers()]
    return [name for name in names if name in installed]


def check_trackers(names: Iterable[str]) -> None:
    """Raise a ValueError for a tracker that accelerate does not know, or whose package is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"save.report_to must be one or more of {known}, got {name!r}")
        if not installed_trackers([name]):
            raise ValueError(f"save.report_to names {name}, which is not installed: pip install {name}")


def start_trackers(accelerator: Accelerator, config: DistillConfig) -> None:
    """Start the accelerator's trackers, if it has any, with the run's settings; called in all processes."""
    if accelerator.log_with:
        accelerator.init_trackers(PROJECT, config={name: _plain(value) for name, value in flat_tables(config).items()})


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
