"""Ends a run whose numbers are no longer finite with a message that says how to continue."""

import math
from collections.abc import Mapping

from .checkpoint import latest_checkpoint, whole_checkpoints
from .config import DistillConfig


class DivergedError(RuntimeError):
    """A loss or the gradient is not a finite number."""


def check_finite(values: Mapping[str, float], step: int, config: DistillConfig, started: int) -> None:
    """Check that all values of this step are finite.

    Args:
        started: The step after which this process began.
    Raises:
        DivergedError: one is not finite.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(f"{name} is {value} at step {step}; {_advice(step, config, started)}")


def _advice(step: int, config: DistillConfig, started: int) -> str:
    first, found = config.layerwise, latest_checkpoint(config.run.folder)
    name, rate = ("layerwise.lr", first.lr) if step <= first.steps else ("optimizer.lr", config.optimizer.lr)
    lower = f"a lower rate, such as --set {name}={rate / 3:.1g}"
    if found is None:
        return f"there is no checkpoint yet: start in another folder with {lower}"
    if step == started + 1:
        before = [one for one in whole_checkpoints(config.run.folder) if one < started]
        way = f"go on after the one before it with --resume {max(before)}" if before else "start in another folder"
        return (
            f"it is the first after {found[0]}: with --resume latest try {lower}; if that fails as well, its weights "
            f"are bad already: {way}"
        )
    return f"go on after the last checkpoint, {found[0]}, with --resume latest and {lower}"
