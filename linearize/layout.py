"""Where the image tokens are in one attention call, and which text tokens may be attended to.

B batch, H heads, N tokens (text_len + frames * height * width, of a picture one frame), D head dimension.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..kernels.pieces.cells import Grid as Grid
from .errors import LayoutError

_TEXT_ONLY = (
    "attn_mask must hide text tokens only, the same in every head (True/False, or 0/-inf): linear attention supports "
    "neither a mask on image tokens nor a bias; drop it, or run this call inside `with dense(model):`"
)
_BLOCKED = -9e3  # an additive mask at or below this blocks; diffusers writes -inf or -10000, -9984 in bfloat16


@dataclass(frozen=True)
class Layout:
    """The tokens of one self-attention call: the image in row-major order, the text before or after it.

    Attributes:
        grid: Size of the image in tokens; symbolic integers under `torch.compile`.
        text_len: Number of tokens that are not of the image: text, registers, padding, references.
        text_first: The text is before the image.
        text_mask: [B, text_len] bool, True = attend; None: attend to all of it.
    """

    grid: Grid
    text_len: int
    text_first: bool
    text_mask: Tensor | None = None

    @property
    def num_image_tokens(self) -> int:
        return num_tokens(self.grid)


def num_tokens(grid: Grid) -> int:
    """Number of tokens of a grid, whose sides may be symbolic."""
    product = 1
    for side in grid:
        product = product * side
    return product


def as_shape(*sides: int) -> Tensor:
    """A meta tensor whose shape passes integers to traced code.

    A tuple of integers would be guarded as constants, and every resolution would recompile. Marked as dynamic, a side
    is symbolic from the first trace on, and two sides that happen to be equal keep separate symbols.
    """
    shape = torch.empty(sides, device="meta")
    for axis in range(len(sides)):
        torch._dynamo.maybe_mark_dynamic(shape, axis)
    return shape


def image_first(grid: Grid, image_starts: tuple[int, ...], text_len: int, *, text_first: bool) -> Tensor | None:
    """The token order that puts the image first.

    Args:
        image_starts: Where the image begins, in each sample or once for all.
        text_len: Number of tokens that are not of the image.
        text_first: The family has the image after all other tokens; False: before them.
    Returns:
        [B or 1, N] int64; None: the image is where the family has it in every sample.
    """
    if set(image_starts) == {text_len if text_first else 0}:
        return None
    num_image = prod(grid)
    positions = torch.arange(num_image + text_len)
    starts = image_starts[:1] if len(set(image_starts)) == 1 else image_starts
    return torch.stack(
        [torch.cat([positions[at : at + num_image], positions[:at], positions[at + num_image :]]) for at in starts]
    )


def reorder(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Tokens of x [B, ..., N, ...] in another order [B or 1, N]."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = order.shape
    return torch.take_along_dim(x, order.view(shape), dim)


def text_mask_of(
    attn_mask: Tensor, query: Tensor, layout: Layout, *, pending: list[Tensor] | None = None
) -> Tensor | None:
    """Reduce the mask that upstream passes to attention to a mask of the text.

    Args:
        attn_mask: Of keys: [B, N] or [B or 1, H or 1, 1, N]; bool (True = attend) or additive (0 or -inf). Or of
            queries and keys, [B or 1, H or 1, N, N], if all tokens that are attended to attend to the same ones.
        query: [B, H, N, D].
        layout: Layout of these tokens.
        pending: Receives a bool tensor, whether the mask hides text only, for `require_text_masks`; None: check it
            now, which waits for the device.
    Returns:
        [B, text_len] bool, None without text.
    Raises:
        LayoutError: the mask differs between queries, heads or image tokens, or is a bias rather than a mask.
    """
    batch, _, num_tokens, _ = query.shape
    mask = attn_mask
    if mask.ndim == 2 and mask.shape[0] in (1, batch) and num_tokens != batch:
        mask = mask[:, None, None]
    if mask.ndim == 4:
        # one row is enough where upstream has only expanded it
        mask = mask[:, : 1 if mask.stride(1) == 0 else None, : 1 if mask.stride(2) == 0 else None]
    if mask.ndim != 4 or mask.shape[2] not in (1, num_tokens) or mask.shape[3] != num_tokens:
        raise LayoutError(
            f"attn_mask must be a mask of keys, [batch, 1, 1, tokens], for linear attention, got shape "
            f"{tuple(attn_mask.shape)} for {num_tokens} tokens: mask text padding per key, or run this call inside "
            "`with dense(model):`"
        )
    attend = mask if mask.dtype == torch.bool else mask == 0
    text_len = layout.text_len
    image = slice(text_len, None) if layout.text_first else slice(0, num_tokens - text_len)
    text = slice(0, text_len) if layout.text_first else slice(num_tokens - text_len, None)
    attended = attend[:, :1, slice(text_len, text_len + 1) if layout.text_first and mask.shape[2] > 1 else slice(0, 1)]
    hidden_rows = False if mask.shape[2] == 1 else ~attended.mT  # rows of hidden tokens
    allowed = attended[..., image].all() & ((attend == attended) | hidden_rows).all()
    if mask.dtype != torch.bool:
        allowed = allowed & (attend | (mask <= _BLOCKED)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(allowed, _TEXT_ONLY)
    elif pending is not None:
        pending.append(allowed)
    else:
        require_text_masks([allowed])
    return attended[:, 0, 0, text].expand(batch, -1) if text_len > 0 else None


def require_text_masks(pending: list[Tensor]) -> None:
    """Raise a LayoutError if one of these is false; they may be on different devices, and it waits for them once."""
    if not torch.stack([allowed.to(pending[0].device) for allowed in pending]).all():
        raise LayoutError(_TEXT_ONLY)
