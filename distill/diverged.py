"""Ends a run whose numbers are no longer finite with a message that says how to continue."""

import math
from collections.abc import Mapping

from .checkpoint import complete_checkpoints, latest_checkpoint
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
    first, latest = config.layerwise, latest_checkpoint(config.run.folder)
    name, rate = ("layerwise.lr", first.lr) if step <= first.steps else ("optimizer.lr", config.optimizer.lr)
    lower = f"a lower rate, such as --set {name}={rate / 3:.1g}"
    if latest is None:
        return f"there is no checkpoint yet: start in another folder with {lower}"
    if step == started + 1:
        before = [one for one in complete_checkpoints(config.run.folder) if one < started]
        alternative = (
            f"continue from the one before it with --resume {max(before)}" if before else "start in another folder"
        )
        return (
            f"it is the first step after {latest[0]}: try --resume latest with {lower}; if that fails too, the weights "
            f"of this checkpoint are already bad: {alternative}"
        )
    return f"continue from the last checkpoint, {latest[0]}, with --resume latest and {lower}"
