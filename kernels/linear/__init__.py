"""Linear attention with one D x D state per head, and an estimate of the softmax mass of the same keys."""

from .attention import implementations, mala_attention, rala_attention
from .mass import log_mass
from .reference import log_mass_reference, mala_attention_reference, rala_attention_reference

__all__ = [
    "implementations",
    "log_mass",
    "log_mass_reference",
    "mala_attention",
    "mala_attention_reference",
    "rala_attention",
    "rala_attention_reference",
]
