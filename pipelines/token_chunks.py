"""Runs FLUX.1's token-wise layers on some tokens at a time, so that their intermediate activations stay small.

Such a layer's output for a token depends on that token alone: chunks only change the summation order of products.

    double block      ff(x), chunk by chunk: it is 4 C wide inside
    single block      proj_out([a, act_mlp(proj_mlp(x))]), chunk by chunk: before it, proj_mlp and act_mlp pass x on
    attention         norms of queries and keys, then RoPE, which is in float32: diffusers' function, chunk by chunk

The peak is then what attention itself needs: queries, keys and values of all tokens.

Meanwhile modules have a subclass with another `__call__`: the hooks of offloading and casting, LoRA and quantized
weights run inside of it, and nothing is registered or copied.

B pictures, N tokens, C numbers of a token, H heads, D numbers of a head.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from ..linearize.errors import UnsupportedModelError
from ..linearize.networks import denoiser


def supports_chunks(model: nn.Module) -> bool:
    """Whether the model has blocks that run on some tokens at a time."""
    return any(isinstance(module, FluxTransformerBlock | FluxSingleTransformerBlock) for module in model.modules())


@contextmanager
def in_token_chunks(pipe_or_model: Any, chunk_tokens: int) -> Iterator[None]:
    """Inside, token-wise layers of the model's blocks run on at most `chunk_tokens` tokens at a time.

    Offloading by layers moves their weights to the device once for each chunk. No other thread may run the model
    meanwhile: an attention module keeps the positions of its running call.

    Raises:
        UnsupportedModelError: the model has none of FLUX.1's blocks.
        ValueError: chunk_tokens is below 1, or the model runs in chunks already.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    _, model = denoiser(pipe_or_model)
    if any(isinstance(module, _InChunks) for module in model.modules()):
        raise ValueError(f"this {type(model).__name__} already runs in chunks of tokens")
    changes = list(_changes(model, chunk_tokens))
    if not changes:
        raise UnsupportedModelError(
            f"token-wise layers run in chunks only in FLUX.1's blocks, and this {type(model).__name__} has none: "
            "leave chunk_tokens out"
        )
    original_classes = [(module, type(module)) for module, _ in changes]
    try:
        for module, change in changes:
            module.__class__ = change
        yield
    finally:
        for module, original in original_classes:
            module.__class__ = original


def _changes(model: nn.Module, chunk_tokens: int) -> Iterator[tuple[nn.Module, type[Any]]]:
    """Modules, and the classes that they get."""
    for block in model.modules():
        if isinstance(block, FluxTransformerBlock):
            yield block.ff, _subclass(_Layer, block.ff, chunk_tokens)
            yield block.ff_context, _subclass(_Layer, block.ff_context, chunk_tokens)
        elif isinstance(block, FluxSingleTransformerBlock):
            mlp = block.proj_mlp, block.act_mlp
            yield block.proj_out, _subclass(_Out, block.proj_out, chunk_tokens, mlp=mlp)
            for module in mlp:
                yield module, _subclass(_PassThrough, module, chunk_tokens)
        else:
            continue
        # other processors, such as that of image prompts, use queries before RoPE
        if type(block.attn.processor) is FluxAttnProcessor:
            yield from _attention_changes(block.attn, chunk_tokens)


def _attention_changes(attention: Any, chunk_tokens: int) -> Iterator[tuple[nn.Module, type[Any]]]:
    positions = _Positions()
    yield attention, _subclass(_Attention, attention, chunk_tokens, positions=positions)
    text_norms = () if attention.added_kv_proj_dim is None else (attention.norm_added_q, attention.norm_added_k)
    for norm in (attention.norm_q, attention.norm_k, *text_norms):
        yield norm, _subclass(_Norm, norm, chunk_tokens, positions=positions, is_text=norm in text_norms)


def _subclass(kind: type[Any], module: nn.Module, chunk_tokens: int, **attributes: Any) -> type[Any]:
    """A subclass of a module's class with the mixin `kind`; what its calls need are attributes of the class."""
    base = type(module)
    return type(f"{base.__name__}{kind.__name__}", (kind, base), {"chunk_tokens": chunk_tokens, **attributes})


def _in_pieces(num_tokens: int, chunk_tokens: int, piece: Callable[[slice], Tensor]) -> Tensor:
    """[B, N, ...] from pieces [B, n, ...], which `piece` makes for a slice of tokens."""
    if num_tokens <= chunk_tokens:
        return piece(slice(0, num_tokens))
    first = piece(slice(0, chunk_tokens))
    out = first.new_empty(first.shape[0], num_tokens, *first.shape[2:])
    out[:, :chunk_tokens] = first
    for start in range(chunk_tokens, num_tokens, chunk_tokens):
        span = slice(start, min(start + chunk_tokens, num_tokens))
        out[:, span] = piece(span)
    return out


@dataclass
class _Positions:
    """RoPE's cosines and sines [N, D] in the running call of one attention; None outside of a call."""

    cos_sin: tuple[Tensor, Tensor] | None = None
    text_len: int = 0


class _InChunks:
    """Mixed in before a module's own class."""

    chunk_tokens: int


class _Layer(_InChunks):
    """A token-wise layer."""

    def __call__(self, tokens: Tensor) -> Tensor:  # [B, N, C] -> [B, N, C]
        layer = super().__call__  # type: ignore[misc]
        return _in_pieces(tokens.shape[1], self.chunk_tokens, lambda span: layer(tokens[:, span]))


class _PassThrough(_InChunks):
    """A single block's `proj_mlp` or `act_mlp`, whose work is left to `proj_out`."""

    def __call__(self, tokens: Tensor) -> Tensor:
        return tokens

    def compute(self, tokens: Tensor) -> Tensor:
        return super().__call__(tokens)  # type: ignore[misc]


class _Out(_InChunks):
    """A single block's `proj_out`, whose input is attention's output joined with the input of `proj_mlp`."""

    mlp: tuple[Any, Any]

    def __call__(self, joined: Tensor) -> Tensor:  # [B, N, 2 C] -> [B, N, C]
        project = super().__call__  # type: ignore[misc]
        proj_mlp, act_mlp = self.mlp

        def piece(span: slice) -> Tensor:
            attended, tokens = joined[:, span].chunk(2, dim=-1)
            return project(torch.cat([attended, act_mlp.compute(proj_mlp.compute(tokens))], dim=-1))

        return _in_pieces(joined.shape[1], self.chunk_tokens, piece)


class _Attention(_InChunks):
    """An attention module whose norms of queries and keys apply RoPE."""

    positions: _Positions

    def __call__(
        self, *, image_rotary_emb: Any = None, encoder_hidden_states: Tensor | None = None, **others: Any
    ) -> Any:
        positions = self.positions
        positions.cos_sin = image_rotary_emb
        positions.text_len = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        try:
            return super().__call__(encoder_hidden_states=encoder_hidden_states, **others)  # type: ignore[misc]
        finally:
            positions.cos_sin = None


class _Norm(_InChunks):
    """The norm of queries or keys, of the text's or of all others, followed by RoPE."""

    positions: _Positions
    is_text: bool

    def __call__(self, heads: Tensor) -> Tensor:  # [B, N, H, D] -> [B, N, H, D]
        norm = super().__call__  # type: ignore[misc]
        cos_sin = self.positions.cos_sin
        offset = 0 if self.is_text else self.positions.text_len

        def piece(span: slice) -> Tensor:
            normed = norm(heads[:, span])
            if cos_sin is None:
                return normed
            cos, sin = (table[span.start + offset : span.stop + offset] for table in cos_sin)
            return apply_rotary_emb(normed, (cos, sin), sequence_dim=1)

        return _in_pieces(heads.shape[1], self.chunk_tokens, piece)
