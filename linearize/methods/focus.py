"""Focus: of the image beyond a window, the cells that weigh most are seen token by token, the others by their proxies.

    far_i = sum_c exp(s_ic - lse_i) v_c + sum_j exp(s_ij - lse_i) v_j      c not chosen, j a token of a chosen cell
    lse_i = log (sum_c exp(s_ic) + sum_j exp(s_ij))

    s_ic = scale q_i . k_c + log r_ic      k_c, v_c the proxy of cell c; r_ic its tokens outside of the window of i
    s_ij = scale q_i . k_j - log m_j       j outside of the window of i; m_j the number of cells that hold token j

r and m as in rest_of_cells.py, both counted in n / C tokens. With every cell chosen, far is softmax over the image
beyond the window; with none, what its proxies give. Queries choose together, in tiles of `side` x `side`, the cells of
the largest

    scale q_t . k_c + log r_tc             q_t the mean of the tile's queries, r_tc that of its r_ic

and as many cells as hold `num_tokens` tokens (`cells_in_focus`), so cost is linear; the choice has no gradient. Where a
side does not divide, a token counts 1/m_j in each of the cells that hold it, chosen or not.

NSA (arXiv:2502.11089) has these three views of a sequence, near, compressed and selected, each under a softmax of its
own, with learned gates and compression; MoBA (arXiv:2502.13189) chooses blocks by their mean key; SLA
(arXiv:2509.24006) leaves to linear attention what is not chosen. Here all is one softmax with the base's own weights,
near the base's attention before any training.

B batch, H heads, n = frames * height * width tokens, C cells, k of them chosen, L tokens of the largest cell, K = k L,
G tiles of Q = side * side queries, D head dimension.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.window.inputs import sum_dtype, token_major
from ...kernels.window.partial import Keys, Partial, fastest_partial, merge
from ...kernels.window.windows import Window, from_arguments, to_arguments
from ..layout import Grid
from .focus_tables import Plan, plan_of, sizes_of
from .rest_of_cells import EXCLUDED, log_rest

# What one chunk of tiles may hold in logits, biases and gathered tokens.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}


def cells_in_focus(num_tokens: int, num_cells: int, grid: Grid) -> int:
    """k: the cells that hold `num_tokens` tokens together; 0 where the image is so large that one cell holds more."""
    return min(num_cells, num_tokens * num_cells // math.prod(grid))


def focus_pairs(num_tokens: int, num_cells: int, side: int, grid: Grid) -> int:
    """Pairs of a query and a token of a chosen cell, and of a tile and a cell that it may choose."""
    count = cells_in_focus(num_tokens, num_cells, grid)
    if count == 0:
        return 0
    frames, height, width = sizes_of(grid)
    tiles = frames * math.ceil(height / side) * math.ceil(width / side)
    return math.prod(grid) * math.ceil(count * math.prod(grid) / num_cells) + tiles * num_cells


def focus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    *,
    grid: Grid,
    window: Window,
    num_tokens: int,
    side: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """far and lse above, differentiable once.

    Args:
        query, key, value: [B, H, n, D], the image's tokens.
        proxy_key, proxy_value: [B, H, C, D].
        grid: of the image; `cells_in_focus` must give at least 1 on it.
        window: what is left out.
        num_tokens: seen one by one, by each query.
        side: of the tiles, in tokens.
        scale: of the logits.
    Returns:
        [B, H, n, D], and [B, H, n] in float32, or float64 for float64; lse counts in n / C tokens.
    """
    count = cells_in_focus(num_tokens, proxy_key.shape[2], grid)
    tensors = (query, key, value, proxy_key, proxy_value)
    return focus_op(*tensors, grid, count, side, scale, *to_arguments(window))[:2]


def _choose(query: Tensor, proxy_key: Tensor, plan: Plan, tiles: slice, count: int, scale: float) -> Tensor:
    """[B, H, tiles, k]; query [B, H, tiles, Q, D]."""
    real = plan.real[tiles].to(query.dtype)[:, :, None]
    mean = (query * real).sum(3) / real.sum(1)
    logits = scale * mean @ proxy_key.mT + plan.rest_of_tiles[tiles]
    return logits.topk(count, dim=-1).indices


class _Chunk(NamedTuple):
    """Some tiles, and all that their queries attend to."""

    tokens: Tensor  # [tiles * Q] of the queries
    query: Tensor  # [B, H, tiles * Q, D]
    cells: Tensor  # [B * H * tiles * k] the chosen cells in [B * H * C, L * D]
    proxies: Keys  # of [B, H, tiles * Q, D]
    focus: Keys  # of [B * H, tiles, Q, D]


def _gather(
    tiles: slice, prepared: "_Prepared", chosen: Tensor | None, count: int, scale: float
) -> tuple[_Chunk, Tensor]:
    """The tiles' chunk, and their choice, made here if it is None. The next chunk is written over its tokens."""
    (query, key_cells, value_cells, proxy_key, proxy_value), rest, plan, spaces = prepared[:4]
    batch, num_heads, num_cells, head_dim = proxy_key.shape
    tokens = plan.tiles[tiles]  # [g, Q]
    q = query[:, :, tokens]  # [B, H, g, Q, D]
    if chosen is None:
        chosen = _choose(q, proxy_key, plan, tiles, count, scale)
    hidden = q.new_zeros(*chosen.shape[:3], num_cells).scatter_(-1, chosen, EXCLUDED)
    of_proxies = rest[tokens].to(q.dtype) + hidden[:, :, :, None]  # [B, H, g, Q, C]
    seen = plan.cells[chosen].flatten(3)  # [B, H, g, K]
    of_tokens = plan.shares[chosen].flatten(3)[:, :, :, None]  # [B, H, g, 1, K]
    of_tokens = torch.where(_near(seen, plan, tiles), EXCLUDED, of_tokens)  # [B, H, g, Q, K]
    first = torch.arange(batch * num_heads, device=query.device).view(batch, num_heads, 1, 1) * num_cells
    index = (chosen + first).flatten()
    k, v = (
        torch.index_select(cells, 0, index, out=space[: len(index)]).view(batch * num_heads, len(tokens), -1, head_dim)
        for cells, space in zip((key_cells, value_cells), spaces, strict=True)
    )
    return _Chunk(
        tokens.flatten(),
        q.flatten(2, 3),
        index,
        Keys(proxy_key, proxy_value, of_proxies.flatten(2, 3)),
        Keys(k, v, of_tokens.flatten(0, 1)),
    ), chosen


def _near(seen: Tensor, plan: Plan, tiles: slice) -> Tensor:
    """Whether tokens [B, H, g, K] lie in the windows of the queries, [B, H, g, Q, K]."""
    frames, rows, columns = plan.distances
    height, width = len(rows), len(columns)
    row, column = seen // width % height, seen % width
    row_distance = rows[plan.rows[tiles][:, :, None], row[:, :, :, None]]  # [B, H, g, side, K]
    column_distance = columns[plan.columns[tiles][:, :, None], column[:, :, :, None]]
    if len(frames) > 1:
        frame = seen // (height * width)
        row_distance = row_distance + frames[plan.frames[tiles][:, None], frame][:, :, :, None]
    return (row_distance[:, :, :, :, None] + column_distance[:, :, :, None] < plan.limit).flatten(3, 4)


class _Prepared(NamedTuple):
    """What chunks are made of."""

    inputs: tuple[Tensor, ...]  # query, key and value by cells [B * H * C, L * D], proxy_key, proxy_value
    rest: Tensor  # [n, C], log (r / (n/C))
    plan: Plan
    spaces: tuple[Tensor, Tensor]  # for the gathered keys and values of a chunk: new ones would cost more than filling
    partial: Partial
    chunks: tuple[slice, ...]  # of the tiles


def _prepare(
    inputs: Sequence[Tensor],
    grid: Sequence[int],
    count: int,
    side: int,
    radius: float | None,
    frame_radius: int | None,
    box: Sequence[int] | None,
) -> _Prepared:
    dtype, device = sum_dtype(inputs[0]), inputs[0].device
    query, key, value, proxy_key, proxy_value = (one.to(dtype) for one in inputs)
    window, (batch, num_heads, num_cells, head_dim) = from_arguments(radius, frame_radius, box), proxy_key.shape
    plan = plan_of(tuple(grid), window, num_cells, side, dtype, device)
    rest = log_rest(inputs[0], tuple(grid), window, num_cells)
    by_cell = tuple(one[:, :, plan.cells].flatten(3).flatten(0, 2) for one in (key, value))
    num_seen = count * plan.cells.shape[1]
    of_a_tile = side * side * (num_cells + 2 * num_seen) + 2 * num_seen * head_dim
    most = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (batch * num_heads * of_a_tile * dtype.itemsize)
    step = max(1, min(most, len(plan.tiles)))
    spaces = tuple(one.new_empty(step * batch * num_heads * count, one.shape[1]) for one in by_cell)
    return _Prepared(
        (query, *by_cell, proxy_key, proxy_value),
        rest,
        plan,
        (spaces[0], spaces[1]),
        fastest_partial(device.type, dtype),
        tuple(slice(start, start + step) for start in range(0, len(plan.tiles), step)),
    )


INPUTS = "Tensor query, Tensor key, Tensor value, Tensor proxy_key, Tensor proxy_value"
SHAPES = "SymInt[] grid, SymInt count, SymInt side, float scale, float? radius, SymInt? frame_radius, SymInt[]? box"


@torch.library.custom_op(
    "lineardit::focus_attention", mutates_args=(), schema=f"({INPUTS}, {SHAPES}) -> (Tensor, Tensor, Tensor)"
)
def focus_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    grid: Sequence[int],
    count: int,
    side: int,
    scale: float,
    radius: float | None,
    frame_radius: int | None,
    box: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """far [B, H, n, D], lse [B, H, n], and the cells that the tiles chose [B, H, G, k]; an operator since tables depend
    on the grid, so that tracing would compile anew for each one.
    """
    with torch.autocast(query.device.type, enabled=False):
        given = (query, key, value, proxy_key, proxy_value)
        prepared = _prepare(given, grid, count, side, radius, frame_radius, box)
        plan, partial = prepared.plan, prepared.partial
        out = token_major(query, query.shape[2])
        lse = query.new_empty(query.shape[:3], dtype=sum_dtype(query))
        choices = []
        for tiles in prepared.chunks:
            chunk, chosen = _gather(tiles, prepared, None, count, scale)
            choices.append(chosen)
            far, far_lse = partial.forward(chunk.query, chunk.proxies, scale)
            near, near_lse = partial.forward(_by_tile(chunk.query, chosen), chunk.focus, scale)
            far, far_lse = merge(far, far_lse, near.view(far.shape), near_lse.reshape(far_lse.shape))
            real = plan.real[tiles].flatten()
            out[:, :, chunk.tokens[real]] = far[:, :, real].to(out.dtype)
            lse[:, :, chunk.tokens[real]] = far_lse[:, :, real]
    return out, lse, torch.cat(choices, 2)


def _by_tile(tensor: Tensor, chosen: Tensor) -> Tensor:
    """[B, H, g * Q, ...] -> [B * H, g, Q, ...]."""
    return tensor.unflatten(2, (chosen.shape[2], -1)).flatten(0, 1)


@focus_op.register_fake
def _(query, key, value, proxy_key, proxy_value, grid, count, side, *_):  # type: ignore[no-untyped-def]
    frames, height, width = (1, *grid)[-3:]
    tiles = frames * ((height + side - 1) // side) * ((width + side - 1) // side)
    return (
        token_major(query, query.shape[2]),
        query.new_empty(query.shape[:3], dtype=sum_dtype(query)),
        query.new_empty(*query.shape[:2], tiles, count, dtype=torch.long),
    )


@torch.library.custom_op(
    "lineardit::focus_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor? grad_lse, {INPUTS}, Tensor out, Tensor lse, Tensor chosen, {SHAPES}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _focus_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    proxy_key: Tensor,
    proxy_value: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    grid: Sequence[int],
    count: int,
    side: int,
    scale: float,
    radius: float | None,
    frame_radius: int | None,
    box: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        given = (query, key, value, proxy_key, proxy_value)
        prepared = _prepare(given, grid, count, side, radius, frame_radius, box)
        plan, partial = prepared.plan, prepared.partial
        grads = [torch.zeros_like(one) for one in prepared.inputs]
        for tiles in prepared.chunks:
            choice = chosen[:, :, tiles]
            chunk, _ = _gather(tiles, prepared, choice, count, scale)
            real = plan.real[tiles].flatten()
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
            grads[place] = torch.zeros_like(key, dtype=lse.dtype).index_add_(2, plan.cells.flatten(), by_cell)
    dq, dk, dv, dpk, dpv = (grad.to(one.dtype).contiguous() for grad, one in zip(grads, given, strict=True))
    return dq, dk, dv, dpk, dpv


def _partial_backward(
    partial: Partial, rows: Sequence[Tensor], grad_lse: Tensor | None, keys: Keys, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, query, out, lse = rows
    return partial.backward(grad_out, query, keys, out, lse, scale, grad_lse)


@_focus_backward.register_fake
def _(grad_out, grad_lse, query, key, value, proxy_key, proxy_value, *_):  # type: ignore[no-untyped-def]
    return tuple(one.new_empty(one.shape) for one in (query, key, value, proxy_key, proxy_value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.shapes = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse, chosen = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _focus_backward(grad_out, grad_lse, *tensors, out, lse, chosen, *ctx.shapes)
    return (*grads, *(None,) * 7)


focus_op.register_autograd(_backward, setup_context=_setup_context)
