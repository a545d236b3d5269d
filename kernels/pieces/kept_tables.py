"""Operators that keep tables of a window from call to call, on the device."""

from typing import Any

import torch

# For `torch.library.custom_op`. A CUDA graph would run such an operator again without asking for its tables: those of a
# window that was not used for a while are freed, and their memory may hold something else by then.
KEEPS_TABLES: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}  # from torch 2.8 on
)
