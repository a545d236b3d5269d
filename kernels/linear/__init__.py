"""Attention whose tokens meet in one D x D state per head, and how it shares a query with softmax over text."""

from .attention import implementations, mala_attention, rala_attention
from .mass import log_mass
from .reference import log_mass_reference, mala_attention_reference, rala_attention_reference
from .with_text import attend_to_text, share_of_keys

__all__ = [
    "attend_to_text",
    "implementations",
    "log_mass",
    "log_mass_reference",
    "mala_attention",
    "mala_attention_reference",
    "rala_attention",
    "rala_attention_reference",
    "share_of_keys",
]
