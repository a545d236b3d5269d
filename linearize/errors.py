"""Errors that conversion raises, errors that are not the arguments' fault, and "did you mean" in messages."""

from collections.abc import Iterable
from difflib import get_close_matches


class UnsupportedModelError(ValueError):
    """The model cannot be converted, because of its class or its current state."""


class LayoutError(ValueError):
    """The layout of the image tokens in this call is unknown or not supported by the method."""


class KernelNotReachedError(RuntimeError):
    """A converted attention module ran without calling its linear kernel exactly once."""


class NotFiniteError(ValueError):
    """A model computed NaN or infinity."""


NOT_ARGUMENT_ERRORS = (UnsupportedModelError, LayoutError, KernelNotReachedError, NotFiniteError)

_TOO_MANY_ELEMENTS = ("less than INT_MAX elements", "canUse32BitIndexMath")  # 2^31, as in a VAE at 4096 x 4096 pixels
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator: can't allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that a GPU or the CPU is out of memory."""
    while True:
        if type(error).__name__ == "OutOfMemoryError" or any(words in str(error) for words in _NO_MEMORY):
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


def why_too_large(error: BaseException) -> str | None:
    """Why a computation was too large, so that less at a time may work, in words; None for any other error."""
    if is_out_of_memory(error):
        return "out of memory"
    return "a tensor is too large for CUDA's kernels" if any(one in str(error) for one in _TOO_MANY_ELEMENTS) else None


def error_text(error: Exception) -> str:
    """An error's message on one line; of an OSError, the file names and the system's message without its number."""
    if isinstance(error, OSError) and type(error).__str__ is OSError.__str__ and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror
    return " ".join(str(error).split())


def did_you_mean(name: object, names: Iterable[object]) -> str:
    """ " (did you mean ...?)" for a name close to one of `names`, else nothing: for the end of a message."""
    near = get_close_matches(str(name), [str(known) for known in names], n=3)
    return f" (did you mean {', '.join(near)}?)" if near else ""
