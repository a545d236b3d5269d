"""Trials of a Triton kernel on a device: its error against the plain formula, and its speed."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from statistics import median
from subprocess import SubprocessError
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.errors import TritonError

logger = logging.getLogger(__name__)

# Raised by a trial if no kernel is usable: none fits or is correct, no C compiler or headers, no driver.
NO_KERNEL = (RuntimeError, OSError, SubprocessError, AssertionError)
MAX_ERROR = 0.05  # relative to the largest value: above bfloat16 rounding, below the error of a wrong kernel

MAX_RACED = 4  # candidates that run are raced; later ones are for devices on which the first do not run
CLEARLY_FASTER = 0.95  # a later candidate wins below this share of an earlier one's time; a smaller gain may be noise

Candidate = TypeVar("Candidate")


def first_that_fits(candidates: Sequence[Candidate], error_of: Callable[[Candidate], float]) -> Candidate:
    """The first candidate that runs; `error_of` runs one and returns its error.

    Raises:
        RuntimeError: none runs, or the first that does is wrong.
    """
    candidate, error = next(_runnable(candidates, error_of))
    if error > MAX_ERROR:
        raise RuntimeError(_error_message(error))
    return candidate


def fastest_that_fits(
    candidates: Sequence[Candidate],
    error_of: Callable[[Candidate], float],
    race: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    """The fastest of the first `MAX_RACED` candidates that run, if correct, and a description of the race; a later one
    wins only if it is notably faster.

    Args:
        race: Seconds of each candidate that runs at the race's shape, for which Triton may recompile.
    Raises:
        RuntimeError: none runs, or all that do are wrong.
    """
    correct = []
    for candidate, error in islice(_runnable(candidates, error_of), MAX_RACED):
        if error <= MAX_ERROR:
            correct.append(candidate)
        else:
            logger.warning("skipping %s: %s", candidate, _error_message(error))
    if not correct:
        raise RuntimeError(_error_message(error))
    if len(correct) == 1:
        return correct[0], "the only one that runs"
    try:
        seconds = race(correct)
    except RuntimeError as exception:
        if "out of memory" not in str(exception).lower():
            raise
        return correct[0], f"not raced: {exception}"  # a card that is nearly full; what follows may still fit
    if not seconds:
        raise RuntimeError("no candidate runs at a common size")
    best, *others = seconds
    for candidate in others:
        if seconds[candidate] < CLEARLY_FASTER * seconds[best]:
            best = candidate
    return best, ", ".join(f"{candidate} {1e3 * time:.3f} ms" for candidate, time in seconds.items())


def find_or_warn(find: Callable[[], Candidate], subject: str, device_name: str) -> Candidate | None:
    """The result of `find`; None, with a warning, if no kernel is usable and plain PyTorch takes over."""
    try:
        return find()
    except torch.OutOfMemoryError:
        raise  # temporary: the next call tries again
    except NO_KERNEL as exception:
        logger.warning("%s fall back to plain PyTorch, which is slower: %s: %s", subject, device_name, exception)
        return None


def _error_message(error: float) -> str:
    return f"a trial differs from the reference by {error:.2g} of its largest value"


def _runnable(
    candidates: Sequence[Candidate], error_of: Callable[[Candidate], float]
) -> Iterator[tuple[Candidate, float]]:
    """Each candidate that runs, with its error; raises a RuntimeError with the last reason if none runs."""
    none_ran, reason = True, ""
    for candidate in candidates:
        try:
            error = error_of(candidate)
        except (TritonError, RuntimeError) as exception:  # needs too many resources, or does not compile
            if not _is_compiler_error(exception):
                raise
            reason = str(exception)
            continue
        none_ran = False
        yield candidate, error
    if none_ran:
        raise RuntimeError(reason)


def _is_compiler_error(exception: Exception) -> bool:
    """Whether the compiler failed; a failing pass raises a plain RuntimeError."""
    return isinstance(exception, TritonError) or "PassManager" in str(exception)


def device_seconds(calls: Mapping[Candidate, Callable[[], object]], *, rounds: int = 10) -> dict[Candidate, float]:
    """Median seconds of the calls that run, by CUDA events on the current device; calls take turns, so that a changing
    load affects all of them.
    """
    running = {candidate: call for candidate, call in calls.items() if _can_run(call)}
    events: dict[Candidate, list[list[Any]]] = {candidate: [] for candidate in running}
    for repeat in range(3 + rounds):  # three to warm up
        for candidate, call in running.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            if repeat >= 3:
                events[candidate].append([start, end])
    torch.cuda.synchronize()
    return {
        candidate: median(start.elapsed_time(end) for start, end in pairs) / 1e3 for candidate, pairs in events.items()
    }


def _can_run(call: Callable[[], object]) -> bool:
    try:
        call()
    except (TritonError, RuntimeError) as exception:
        if not _is_compiler_error(exception):
            raise
        return False
    return True


def relative_error(computed: Iterable[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest value of the same tensor; infinite for NaN."""
    pairs = zip(computed, expected, strict=True)
    errors = torch.stack([(ours.float() - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs])
    return float(errors.nan_to_num(torch.inf).max())
