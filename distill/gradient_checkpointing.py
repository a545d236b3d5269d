"""diffusers' gradient checkpointing: blocks are recomputed in the backward, which takes less memory."""

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint


def check_gradient_checkpointing(model: Any) -> None:
    """Raise a ValueError if diffusers has no gradient checkpointing for the model."""
    if not model._supports_gradient_checkpointing:
        raise ValueError(
            f"run.gradient_checkpointing must be false for a {type(model).__name__}, for which diffusers does not "
            "support it; a smaller run.batch_size needs less memory"
        )


def enable_gradient_checkpointing_(model: Any) -> None:
    """Enable gradient checkpointing; diffusers' default function rejects HunyuanImage's keyword arguments."""
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
