"""Window attention: image tokens attend to the text and to nearby image tokens."""

from .attention import window_attention, windowed_attention, windowed_attention_and_lse
from .choose import choose_impl, implementations
from .reference import window_attention_reference, windowed_attention_reference
from .windows import Box, Circle, Window

__all__ = [
    "Box",
    "Circle",
    "Window",
    "choose_impl",
    "implementations",
    "window_attention",
    "window_attention_reference",
    "windowed_attention",
    "windowed_attention_and_lse",
    "windowed_attention_reference",
]
