"""What a conversion did: which modules it swapped, and why it left the others."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .methods import config_to_dict, format_setting

CROSS_ATTENTION = "cross-attention"
NOT_IMAGE_SELF_ATTENTION = "not an image self-attention of this family"


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """Every attention module of a model, swapped or not; `str()` summarizes it in one line.

    Attributes:
        swapped: Module name -> config of the method that replaced its attention.
        skipped: Module name -> why it keeps its attention.
        family: Name of the model's family.
        impl: The requested implementation.
        dense_below: As in `linearize_`; 0 if something has been trained for the new attention.
    """

    swapped: dict[str, Any]
    skipped: dict[str, str]
    family: str
    impl: str
    dense_below: int = 0

    def __str__(self) -> str:
        left_out = [name for name, reason in self.skipped.items() if is_swappable(reason)]
        configs = Counter(_short(config) for config in self.swapped.values())
        methods = ", ".join(f"{count} x {config}" for config, count in configs.items())
        total = len(self.swapped) + len(left_out)
        line = f"{len(self.swapped)}/{total} self-attention modules: {methods}"
        reasons = Counter(self.skipped.values())
        left = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        dense = f", original below {self.dense_below:,} image tokens" if self.dense_below else ""
        return f"{line} (family {self.family}, impl {self.impl}{dense}{'; left: ' + left if left else ''})"


def _short(config: Any) -> str:
    """`Clear(radius=16)`: without the fields left at their defaults."""
    entries = [f"{key}={format_setting(value)}" for key, value in config_to_dict(config).items() if key != "method"]
    return f"{type(config).__name__}({', '.join(entries)})"


def is_swappable(reason: str) -> bool:
    """Whether a module left for this reason is image self-attention, which a method could replace."""
    return reason not in (CROSS_ATTENTION, NOT_IMAGE_SELF_ATTENTION)
