"""Attention of image tokens to the text and to the image tokens near them."""

from .attention import window_attention
from .choose import choose_impl, implementations
from .reference import window_attention_reference

__all__ = ["choose_impl", "implementations", "window_attention", "window_attention_reference"]
