"""What windows keep on the device from call to call, and its release."""

from ..kernels.focus.rest_of_cells import kept_log_rest
from ..kernels.focus.tables import focus_tables
from ..kernels.window.kept_bias import kept_bias
from ..kernels.window.tiled import window_groups

# The kernels' lists, not here, take 5 MiB at most at a grid of 512 x 512.
KEPT = (kept_log_rest, focus_tables, kept_bias, window_groups)


def release_tables() -> None:
    """Give the memory back; a call that needs them, of another converted model too, makes them anew."""
    for kept in KEPT:
        kept.cache_clear()
