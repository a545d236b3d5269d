"""Context parallelism: the order of an attention call's tokens when several processes share one image.

In Ulysses (arXiv:2309.14509) every process holds a share of the tokens outside attention, and all tokens of some heads
inside it. diffusers splits the text and the image separately, each in order, so that inside attention the tokens are
[text 0, image 0, text 1, image 1, ...]. A window needs text and image each in one piece.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import LayoutError


def ulysses_degree(processor: Any) -> int:
    """How many processes share the tokens of an attention processor; 1 without context parallelism.

    Raises:
        LayoutError: ring attention, which never has all keys at once, or an unknown kind of parallelism.
    """
    parallelism = getattr(processor, "_parallel_config", None)
    if parallelism is None:
        return 1
    context = getattr(parallelism, "context_parallel_config", None)
    if context is None or context.ring_degree not in (None, 1):
        raise LayoutError(
            "linear attention supports Ulysses context parallelism only, ContextParallelConfig(ulysses_degree=...): "
            f"ring attention sees only part of the keys at a time, got {context or parallelism}; use ulysses_degree, "
            "disable parallelism, or run this call inside `with dense(model):`"
        )
    return context.ulysses_degree or 1


def refuse_gradients(degree: int, output: Any) -> None:
    """Refuse gradients under Ulysses: upstream's backward recomputes dense attention, which cannot be intercepted.

    Raises:
        LayoutError: an output of the attention module requires gradients.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    if degree > 1 and any(out.requires_grad for out in outputs):
        raise LayoutError(
            "under context parallelism diffusers computes gradients of dense attention, which would be wrong here: "
            "generate under torch.no_grad(), and train without enable_parallelism"
        )


def share_sizes(first: int, second: int, degree: int) -> list[int]:
    """Sizes of [first 0, second 0, first 1, second 1, ...], as `torch.tensor_split` cuts each of the two."""
    return [total // degree + (rank < total % degree) for rank in range(degree) for total in (first, second)]


def join_shares(x: Tensor, sizes: Sequence[int], *, dim: int) -> Tensor:
    """[first 0, second 0, first 1, second 1, ...] along `dim` -> [first, second]."""
    shares = x.split_with_sizes(list(sizes), dim)
    return torch.cat([*shares[0::2], *shares[1::2]], dim)


def split_shares(x: Tensor, sizes: Sequence[int], *, dim: int) -> Tensor:
    """[first, second] along `dim` -> [first 0, second 0, first 1, second 1, ...]."""
    parts = x.split_with_sizes([*sizes[0::2], *sizes[1::2]], dim)
    degree = len(sizes) // 2
    return torch.cat([share for pair in zip(parts[:degree], parts[degree:], strict=True) for share in pair], dim)
