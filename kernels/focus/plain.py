"""Focus in plain PyTorch, in chunks of tiles, forward and backward: any device and dtype.

Letters as in attention.py; g tiles of a chunk.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..pieces.cells import Grid
from ..pieces.results import sum_dtype
from ..window.partial import Keys, Partial, fastest_partial, merge
from ..window.windows import Window
from .chosen_cells import choose
from .rest_of_cells import UNSEEN
from .tables import FocusTables, focus_tables

# Memory of one chunk of tiles: logits, biases and gathered tokens.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}


def plain_forward(
    inputs: Sequence[Tensor], out: Tensor, grid: Grid, window: Window, count: int, side: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Fill `out` [B, H, n, D].

    Args:
        inputs: query, key, value [B, H, n, D], proxy_key, proxy_value [B, H, C, D].
        count: k, the number of cells that a tile chooses.
    Returns:
        The log-sum-exp [B, H, n], and the chosen cells [B, H, G, k].
    """
    prepared = _prepare(inputs, grid, window, count, side)
    tables, partial = prepared.tables, prepared.partial
    lse = out.new_empty(out.shape[:3], dtype=sum_dtype(out))
    choices = []
    for tiles in prepared.chunks:
        chunk, cells = _gather(tiles, prepared, None, count, scale)
        choices.append(cells)
        far, far_lse = partial.forward(chunk.query, chunk.proxies, scale)
        chosen, chosen_lse = partial.forward(_by_tile(chunk.query, cells), chunk.focus, scale)
        far, far_lse = merge(far, far_lse, chosen.view(far.shape), chosen_lse.reshape(far_lse.shape))
        real = tables.real[tiles].flatten()
        out[:, :, chunk.tokens[real]] = far[:, :, real].to(out.dtype)
        lse[:, :, chunk.tokens[real]] = far_lse[:, :, real]
    return lse, torch.cat(choices, 2)


def plain_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    inputs: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    grid: Grid,
    window: Window,
    side: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs; `out`, `lse` and `chosen` are those of any forward."""
    key, proxy_key = inputs[1], inputs[3]
    count = chosen.shape[3]
    prepared = _prepare(inputs, grid, window, count, side)
    tables, partial = prepared.tables, prepared.partial
    grads = [torch.zeros_like(one) for one in prepared.inputs]
    for tiles in prepared.chunks:
        choice = chosen[:, :, tiles]
        chunk, _ = _gather(tiles, prepared, choice, count, scale)
        real = tables.real[tiles].flatten()
        do, o = (one[:, :, chunk.tokens].to(lse.dtype) for one in (grad_out, out))
        do = do * real[:, None]
        dl = None if grad_lse is None else grad_lse[:, :, chunk.tokens].to(lse.dtype) * real
        rows = (do, chunk.query, o, lse[:, :, chunk.tokens])
        dq, dk, dv = _partial_backward(partial, rows, dl, chunk.proxies, scale)
        grads[3] += dk
        grads[4] += dv
        by_tile = [_by_tile(one, choice) for one in rows]
        dl = None if dl is None else _by_tile(dl, choice)
        tile_dq, dk, dv = _partial_backward(partial, by_tile, dl, chunk.focus, scale)
        grads[0].index_add_(2, chunk.tokens, dq + tile_dq.reshape(dq.shape))
        for total, grad in zip(grads[1:3], (dk, dv), strict=True):
            total.index_add_(0, chunk.cells, grad.reshape(len(chunk.cells), -1))
    for place in (1, 2):
        by_cell = grads[place].view(*proxy_key.shape[:2], -1, key.shape[3])
        grads[place] = torch.zeros_like(key, dtype=lse.dtype).index_add_(2, tables.cells.flatten(), by_cell)
    dq, dk, dv, dpk, dpv = (grad.to(one.dtype).contiguous() for grad, one in zip(grads, inputs, strict=True))
    return dq, dk, dv, dpk, dpv


class _Chunk(NamedTuple):
    """Some tiles, and all that their queries attend to."""

    tokens: Tensor  # [tiles * Q] of the queries
    query: Tensor  # [B, H, tiles * Q, D]
    cells: Tensor  # [B * H * tiles * k] the chosen cells in [B * H * C, L * D]
    proxies: Keys  # for queries [B, H, tiles * Q, D]
    focus: Keys  # for queries [B * H, tiles, Q, D]


def _gather(
    tiles: slice, prepared: "_Prepared", chosen: Tensor | None, count: int, scale: float
) -> tuple[_Chunk, Tensor]:
    """The tiles' chunk and their chosen cells, which are chosen here if None. The next call overwrites the chunk."""
    (query, key_cells, value_cells, proxy_key, proxy_value), tables, buffers = prepared[:3]
    batch, num_heads, num_cells, head_dim = proxy_key.shape
    tokens = tables.tiles[tiles]  # [g, Q]
    q = query[:, :, tokens]  # [B, H, g, Q, D]
    if chosen is None:
        chosen = choose(q, proxy_key, tables, tiles, count, scale)
    hidden = q.new_zeros(*chosen.shape[:3], num_cells).scatter_(-1, chosen, UNSEEN)
    queries = q.shape[:4]  # B, H, g, Q
    proxy_bias, token_bias = (buffer[: math.prod(queries)] for buffer in (buffers.proxy_bias, buffers.token_bias))
    proxy_bias = proxy_bias.view(*queries, num_cells)
    torch.add(tables.log_rest.at(tokens), hidden[:, :, :, None], out=proxy_bias)
    token_bias = token_bias.view(*queries, chosen.shape[3], -1)  # [B, H, g, Q, k, L]
    _fill_token_bias(token_bias, chosen, tables, tiles)
    first = torch.arange(batch * num_heads, device=query.device).view(batch, num_heads, 1, 1) * num_cells
    index = (chosen + first).flatten()
    k, v = (
        torch.index_select(cells, 0, index, out=buffer[: len(index)]).view(batch * num_heads, len(tokens), -1, head_dim)
        for cells, buffer in zip((key_cells, value_cells), (buffers.key, buffers.value), strict=True)
    )
    return _Chunk(
        tokens.flatten(),
        q.flatten(2, 3),
        index,
        Keys(proxy_key, proxy_value, proxy_bias.flatten(2, 3)),
        Keys(k, v, token_bias.flatten(4).flatten(0, 1)),
    ), chosen


def _fill_token_bias(token_bias: Tensor, chosen: Tensor, tables: FocusTables, tiles: slice) -> None:
    """Biases [B, H, g, Q, k, L] of the tokens of the chosen cells [B, H, g, k]: UNSEEN in a query's own window."""
    shares = tables.shares[chosen]
    token_bias.copy_(shares[:, :, :, None])
    # Most chosen cells are outside all windows of their tile.
    batch, head, tile, place = tables.reached_of(chosen, tiles).nonzero(as_tuple=True)
    if len(tile) > 0:
        near = _near(tables.cells[chosen[batch, head, tile, place]], tables, tiles.start + tile)
        token_bias[batch, head, tile, :, place] = torch.where(near, UNSEEN, shares[batch, head, tile, place][:, None])


def _near(tokens: Tensor, tables: FocusTables, tile: Tensor) -> Tensor:
    """[m, Q, L] bool: tokens [m, L] are in the windows of the queries of tiles [m]."""
    frames, rows, columns = tables.distances
    height, width = len(rows), len(columns)
    row, column = tokens // width % height, tokens % width
    left = tables.limit - rows[tables.rows[tile][:, :, None], row[:, None]]  # [m, side, L]
    column_distance = columns[tables.columns[tile][:, :, None], column[:, None]]
    if len(frames) > 1:
        frame = tokens // (height * width)
        left = left - frames[tables.frames[tile][:, None], frame][:, None]
    return (column_distance[:, None] < left[:, :, None]).flatten(1, 2)


class _Buffers(NamedTuple):
    """Buffers that all chunks reuse: allocating them costs more than filling them."""

    key: Tensor  # [B * H * tiles * k, L * D]
    value: Tensor
    proxy_bias: Tensor  # biases [B * H * tiles * Q, C]
    token_bias: Tensor  # and [B * H * tiles * Q, K]


class _Prepared(NamedTuple):
    """Inputs, tables and buffers of the chunks."""

    inputs: tuple[Tensor, ...]  # query, key and value by cells [B * H * C, L * D], proxy_key, proxy_value
    tables: FocusTables
    buffers: _Buffers
    partial: Partial
    chunks: tuple[slice, ...]  # of the tiles


def _prepare(inputs: Sequence[Tensor], grid: Grid, window: Window, count: int, side: int) -> _Prepared:
    dtype, device = sum_dtype(inputs[0]), inputs[0].device
    query, key, value, proxy_key, proxy_value = (one.to(dtype) for one in inputs)
    batch, num_heads, num_cells, head_dim = proxy_key.shape
    tables = focus_tables(grid, window, num_cells, side, dtype, device, dtype)
    by_cell = tuple(one[:, :, tables.cells].flatten(3).flatten(0, 2) for one in (key, value))
    num_seen = count * tables.cells.shape[1]
    numbers_per_tile = side * side * (num_cells + 2 * num_seen) + 2 * num_seen * head_dim
    max_tiles = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (
        batch * num_heads * numbers_per_tile * dtype.itemsize
    )
    step = max(1, min(max_tiles, len(tables.tiles)))
    tiles = batch * num_heads * step
    key_buffer, value_buffer = (one.new_empty(tiles * count, one.shape[1]) for one in by_cell)
    proxy_bias, token_bias = (query.new_empty(tiles * side * side, length) for length in (num_cells, num_seen))
    return _Prepared(
        (query, *by_cell, proxy_key, proxy_value),
        tables,
        _Buffers(key_buffer, value_buffer, proxy_bias, token_bias),
        fastest_partial(device, dtype),
        tuple(slice(start, start + step) for start in range(0, len(tables.tiles), step)),
    )


def _by_tile(tensor: Tensor, chosen: Tensor) -> Tensor:
    """[B, H, g * Q, ...] -> [B * H, g, Q, ...]."""
    return tensor.unflatten(2, (chosen.shape[2], -1)).flatten(0, 1)


def _partial_backward(
    partial: Partial, rows: Sequence[Tensor], grad_lse: Tensor | None, keys: Keys, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, query, out, lse = rows
    return partial.backward(grad_out, query, keys, out, lse, scale, grad_lse)
