"""Where a converted module makes the model's own call in place of its kernel's, and how that is told."""

from typing import Any

from ..layout import Layout

ORIGINAL = "original"
COVERED = f"{ORIGINAL} (the window covers the picture)"


def runs_original(kernel: Any, layout: Layout, dense_below: int) -> bool:
    """Whether the model's own call runs for these tokens.

    Args:
        kernel: A `Method`; one whose `impl` is forced always runs.
        dense_below: Image tokens from which on the kernel runs, even where the model's own call would be faster.
    """
    # in this order: a trace of small pictures does not depend on the window
    return kernel.impl == "auto" and (layout.num_image_tokens < dense_below or kernel.covers(layout))


def below(dense_below: int) -> str:
    """How the model's own call is told where it runs for so few tokens."""
    return f"{ORIGINAL} (fewer than {dense_below:,} image tokens)"
