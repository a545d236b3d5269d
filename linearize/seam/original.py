"""When a converted module runs the model's own attention call instead of its kernel, and how reports say so."""

from typing import Any

from ..layout import Layout

ORIGINAL = "original"
COVERED = f"{ORIGINAL} (the window covers the picture)"


def runs_original(kernel: Any, layout: Layout, dense_below: int) -> bool:
    """Whether the model's own call runs for these tokens.

    Args:
        kernel: A `Method`; it always runs if its `impl` is not "auto".
        dense_below: Number of image tokens below which the model's own call runs.
    """
    # in this order, a trace of small pictures does not depend on the window
    return kernel.impl == "auto" and (layout.num_image_tokens < dense_below or kernel.is_exact(layout))


def dense_below_text(dense_below: int) -> str:
    """What reports say when the model's own call runs because of `dense_below`."""
    return f"{ORIGINAL} (fewer than {dense_below:,} image tokens)"
