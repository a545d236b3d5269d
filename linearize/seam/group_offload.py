"""Group offload keeps a copy of each weight that there is when it is enabled, and with streams looks for no other."""

from diffusers.hooks import group_offloading
from torch import nn


def regroup_offload_(model: nn.Module) -> None:
    """Enable group offload once more, where it is, for the weights that have come since: as diffusers does for LoRA."""
    group_offloading._maybe_remove_and_reapply_group_offloading(model)
