"""Attention to the image outside a window: chosen cells token by token, the others by one proxy each."""

from ..pieces.cells import sides_of_cells
from .attention import cells_in_focus, focus_attention, focus_pairs
from .choose import choose_impl
from .rest_of_cells import log_rest

__all__ = ["cells_in_focus", "choose_impl", "focus_attention", "focus_pairs", "log_rest", "sides_of_cells"]
