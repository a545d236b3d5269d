"""A trial of a Triton kernel on the device at hand, against the plain formula."""

from collections.abc import Callable, Iterable, Sequence
from subprocess import SubprocessError
from typing import TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

# What a trial fails with where kernels cannot be had: none fits or is right, no C compiler or headers, no driver.
NO_KERNEL = (RuntimeError, OSError, SubprocessError, AssertionError)
MAX_ERROR = 0.05  # of the largest value; a wrong kernel is off by more than bfloat16 rounds

Candidate = TypeVar("Candidate")


def first_that_fits(candidates: Sequence[Candidate], error_of: Callable[[Candidate], float]) -> Candidate:
    """The first with which a trial runs; its error is told by `error_of`.

    Raises:
        RuntimeError: none runs, or the first that does is wrong.
    """
    for candidate in candidates:
        try:
            error = error_of(candidate)
        except (TritonError, RuntimeError) as exception:  # it needs too much, or does not compile
            # A pass of the compiler that gives up has no class of its own.
            if not isinstance(exception, TritonError) and "PassManager" not in str(exception):
                raise
            reason = str(exception)
            continue
        if error > MAX_ERROR:
            raise RuntimeError(f"a trial differs from the reference by {error:.2g} of its largest value")
        return candidate
    raise RuntimeError(reason)


def relative_error(computed: Iterable[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of the same tensor; infinite for NaN."""
    pairs = zip(computed, expected, strict=True)
    errors = torch.stack([(ours.float() - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs])
    return float(errors.nan_to_num(torch.inf).max())
