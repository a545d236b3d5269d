"""The error allowed: twice the reference's own error in the same precision, plus four roundings."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .bench import Measurement

ROUNDINGS = 4


def verdict(
    actual: list[Tensor], exact: list[Tensor], low: list[Tensor], names: Sequence[str] | None = None
) -> Measurement:
    """Verdict on the tensor closest to its allowed error; NaN never passes. Default names: out, then gradients."""
    names = names or ["out", *(f"gradient {index}" for index in range(len(actual) - 1))]
    figures = [_errors(*tensors) for tensors in zip(actual, exact, low, strict=True)]
    name, worst = max(zip(names, figures, strict=True), key=lambda one: one[1]["share_of_allowed"])
    passed = worst["share_of_allowed"] <= 1
    note = f"worst: {name}" if passed else f"WRONG: {name} has an error of {worst['largest_error']}"
    return Measurement(figures=worst, note=note, passed=passed)


def _errors(actual: Tensor, exact: Tensor, low: Tensor) -> dict[str, float]:
    error = (actual.double() - exact).abs()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    allowed = 2 * (low.double() - exact).abs().max().item() + ROUNDINGS * rounding
    share = error.max().item() / allowed
    return {
        "share_of_allowed": share if math.isfinite(share) else math.inf,
        "largest_error": error.max().item(),
        "relative_error": (error.norm() / exact.norm()).item(),
    }


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """A context in which `torch.empty` and its relatives give NaN, so that uses of unwritten memory show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
