"""Group offload collects a model's weights when it is enabled; with streams, it misses weights added later."""

from diffusers.hooks import group_offloading
from torch import nn


def regroup_offload_(model: nn.Module) -> None:
    """Re-apply group offload, if enabled, to include weights added since; diffusers does the same for LoRA."""
    group_offloading._maybe_remove_and_reapply_group_offloading(model)
