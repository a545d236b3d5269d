"""Argument checks shared by all public attention functions."""

from collections.abc import Sequence

from torch import Tensor


def check_attention(query: Tensor, key: Tensor, value: Tensor, impl: str, implementations: Sequence[str]) -> None:
    """Raise a ValueError for tensors that are not floating point [B, H, N, D] of one shape on one device, or an unknown
    `impl`.
    """
    if impl not in ("auto", *implementations):
        raise ValueError(f"impl must be one of {('auto', *implementations)}, got {impl!r}")
    if query.ndim != 4 or not query.is_floating_point():
        raise ValueError(f"query must be floating point [B, H, N, D], got {query.dtype} {tuple(query.shape)}")
    if not query.shape == key.shape == value.shape:
        shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        raise ValueError(f"query, key and value must have one shape [B, H, N, D], got {shapes}")
    check_devices(query, key=key, value=value)


def check_devices(query: Tensor, **others: Tensor | None) -> None:
    """Raise a ValueError for a tensor that is not on the query's device; an operator may not notice it."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
