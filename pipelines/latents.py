"""Conversion of latents between pictures and FLUX's tokens; the pipelines' helpers for this are private.

B batch, C channels of latents, h, w sides in latents (even).
"""

from torch import Tensor


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> FLUX's tokens [B, h/2 * w/2, 4 C], each a square of 2 x 2 latents."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height * width // 4, 4 * channels)


def patches_of(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> FLUX.2's patches [B, 4 C, h/2, w/2], each of 2 x 2 latents as in FLUX's tokens."""
    batch, channels, height, width = latents.shape
    return pack_latents(latents).transpose(1, 2).reshape(batch, 4 * channels, height // 2, width // 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """FLUX's tokens [B, h/2 * w/2, 4 C] -> [B, C, h, w], h and w in latents."""
    batch, _, channels = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(batch, channels // 4, height, width)
