"""A trial of a Triton kernel on the device at hand: against the plain formula, and against the clock."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from statistics import median
from subprocess import SubprocessError
from typing import TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

logger = logging.getLogger(__name__)

# What a trial fails with where kernels cannot be had: none fits or is right, no C compiler or headers, no driver.
NO_KERNEL = (RuntimeError, OSError, SubprocessError, AssertionError)
MAX_ERROR = 0.05  # of the largest value; a wrong kernel is off by more than bfloat16 rounds

TIMED = 4  # candidates that run are raced; those after them are for devices on which these do not
NOTABLY = 0.95  # of the time of an earlier one: less is noise, and the choice shall be the same in every process

Candidate = TypeVar("Candidate")


def first_that_fits(candidates: Sequence[Candidate], error_of: Callable[[Candidate], float]) -> Candidate:
    """The first with which a trial runs; its error is told by `error_of`.

    Raises:
        RuntimeError: none runs, or the first that does is wrong.
    """
    candidate, error = next(_that_run(candidates, error_of))
    if error > MAX_ERROR:
        raise RuntimeError(_wrong(error))
    return candidate


def fastest_that_fits(
    candidates: Sequence[Candidate],
    error_of: Callable[[Candidate], float],
    seconds_of: Callable[[Candidate], float],
) -> tuple[Candidate, dict[Candidate, float]]:
    """The fastest of the first `TIMED` with which a trial runs and is right, an earlier one where none is notably
    faster; and the times, none where only one is left or the race has no memory.

    Raises:
        RuntimeError: none runs, or all that do are wrong.
    """
    right = []
    for candidate, error in islice(_that_run(candidates, error_of), TIMED):
        if error <= MAX_ERROR:
            right.append(candidate)
        else:
            logger.warning("%s is left out: %s", candidate, _wrong(error))
    if not right:
        raise RuntimeError(_wrong(error))
    if len(right) == 1:
        return right[0], {}
    try:
        seconds = {candidate: seconds_of(candidate) for candidate in right}
    except torch.OutOfMemoryError:  # of a card that is nearly full: what follows may still fit
        return right[0], {}
    best = right[0]
    for candidate in right[1:]:
        if seconds[candidate] < NOTABLY * seconds[best]:
            best = candidate
    return best, seconds


def _wrong(error: float) -> str:
    return f"a trial differs from the reference by {error:.2g} of its largest value"


def _that_run(
    candidates: Sequence[Candidate], error_of: Callable[[Candidate], float]
) -> Iterator[tuple[Candidate, float]]:
    """Each with its error; raises the RuntimeError of the last if none runs."""
    none_ran, reason = True, ""
    for candidate in candidates:
        try:
            error = error_of(candidate)
        except (TritonError, RuntimeError) as exception:  # it needs too much, or does not compile
            # A pass of the compiler that gives up has no class of its own.
            if not isinstance(exception, TritonError) and "PassManager" not in str(exception):
                raise
            reason = str(exception)
            continue
        none_ran = False
        yield candidate, error
    if none_ran:
        raise RuntimeError(reason)


def device_seconds(call: Callable[[], object], *, warm: int = 3, repeats: int = 10) -> float:
    """Median time of a call on the current CUDA device, by its own clock."""
    for _ in range(warm):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in events) / 1e3


def relative_error(computed: Iterable[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of the same tensor; infinite for NaN."""
    pairs = zip(computed, expected, strict=True)
    errors = torch.stack([(ours.float() - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs])
    return float(errors.nan_to_num(torch.inf).max())
