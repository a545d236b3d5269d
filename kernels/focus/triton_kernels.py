"""Attention outside a window in Triton: chosen cells token by token, all others by their proxies; and its gradients.

A program of the forward, and of the query gradient, owns one tile of queries, which chose together, in one head. It
iterates over

    the proxies                   s = scale q . k_c + log r_ic, without those of chosen cells
    tokens of chosen cells        s = scale q . k_j - log (m_j n/C), in two loops, so that Triton can load ahead: first
                                  the cells that no window of the tile reaches, then the others, masked by token

in one running softmax (formula in attention.py). Heads of one tile run next to each other: they read the same r. Each
loop is guarded by an `if` that it has a step (window/triton_kernels.py says why).

Key gradients have programs that own proxies and iterate over a part of all queries, and programs that own tokens of a
cell and iterate over the tiles that chose it. Results of several programs are summed afterwards, without atomics.

Prefixes: i_ index, o_ offset, b_ block of data, p_ pointer. Logits are kept in base 2: s = scale * log2(e) * q . k.
Tensors [B, H, N, D] are followed in a signature by their strides over batch, head and token, in units of UNIT elements;
the last axis has stride 1. Sums are float32.
"""

import triton
import triton.language as tl

from ..pieces.triton_blocks import (
    EXCLUDED,
    FLOOR,
    LOG2_E,
    head_of,
    key_gradients,
    load_rows,
    online_softmax,
    query_gradient,
    store_rows,
)
from . import rest_of_cells

# Added to the logits of keys that a query does not see. Not EXCLUDED: the log-sum-exp of a query that sees nothing must
# equal that of plain.py, whose backward reads it.
UNSEEN = tl.constexpr(rest_of_cells.UNSEEN)
# Arguments for which Triton would otherwise recompile if they are 1 or a multiple of 16, as image sizes change.
UNSPECIALIZED = [
    *(f"{tensor}_{axis}" for tensor in ("do", "q", "k", "v", "pk", "pv", "out", "dq") for axis in "bhn"),
    *("num_heads", "num_batch_heads", "num_tiles", "num_tokens", "cell_len", "num_chosen", "limit"),
    *("frames", "height", "width", "split_len", "per_cell", "per_height", "per_width"),
]


@triton.jit
def _proxy_bias(queries, i_cell, valid, b_hidden, REST, num_cells):
    """[queries, cells] added to the logits; `b_hidden`: 1 where the queries' tile chose a cell.

    `i_cell` is not clamped, so that Triton sees contiguous addresses and loads several at once.
    """
    p_rest = REST + queries.to(tl.int64)[:, None] * num_cells + i_cell[None, :]
    return (tl.load(p_rest, mask=valid[None, :], other=0.0).to(tl.float32) + UNSEEN * b_hidden) * LOG2_E


@triton.jit
def _divide(number, inverse):
    """number // d, for `inverse` = ceil(2**31 / d), number * d < 2**31. A division takes about twenty instructions."""
    return tl.umulhi((number + number).to(tl.uint32), inverse.to(tl.uint32)).to(tl.int32)


@triton.jit
def _chosen_tokens(start, num_tokens, CELLS, SHARES, p_chosen, cell_len, per_cell, BLOCK_K: tl.constexpr):
    """Tokens `start` to `start` + BLOCK_K of the chosen cells, and what is added to their logits."""
    i_token = start + tl.arange(0, BLOCK_K)
    exists = i_token < num_tokens
    i_cell = _divide(i_token, per_cell)
    cell = tl.load(p_chosen + i_cell, mask=exists, other=0)
    slot = cell * cell_len + i_token - i_cell * cell_len
    return tl.load(CELLS + slot), tl.where(exists, tl.load(SHARES + slot) * LOG2_E, EXCLUDED)


@triton.jit
def _near(queries, keys, limit, ROWS, COLUMNS, FRAMES, frames, height, width, per_height, per_width):
    """[queries, keys] bool: the key is in the query's window."""
    q_line, k_line = _divide(queries, per_width), _divide(keys, per_width)
    q_frame, k_frame = _divide(q_line, per_height), _divide(k_line, per_height)
    distance = tl.load(ROWS + (q_line - q_frame * height)[:, None] * height + (k_line - k_frame * height)[None, :])
    distance += tl.load(COLUMNS + (queries - q_line * width)[:, None] * width + (keys - k_line * width)[None, :])
    if frames > 1:
        distance += tl.load(FRAMES + q_frame[:, None] * frames + k_frame[None, :])
    return distance < limit


@triton.jit(do_not_specialize=UNSPECIALIZED)
def focus_forward(
    Q, q_b, q_h, q_n,
    K, k_b, k_h, k_n,
    V, v_b, v_h, v_n,
    PROXY_K, pk_b, pk_h, pk_n,
    PROXY_V, pv_b, pv_h, pv_n,
    OUT, out_b, out_h, out_n,
    LSE,  # [B, H, N]
    TILES,  # [tiles, BLOCK_Q] tokens, -1 where there is none
    CELLS, SHARES,  # [C, cell_len] tokens, and -log (m_j n/C); UNSEEN or less beyond the last of a cell
    REST,  # [N, C], log r
    CHOSEN, HIDDEN,  # [B, H, tiles, num_chosen] cells; [B, H, tiles, C] int8, 1 for these
    NUM_UNMASKED,  # [B, H, tiles] number of leading chosen cells that no window of the tile reaches
    ROWS, COLUMNS, FRAMES,  # [size, size] distances: a key is in the window where they add up to less than `limit`
    num_heads, num_batch_heads, num_tiles, num_tokens, num_cells, cell_len, num_chosen, limit, frames, height, width,
    per_cell, per_height, per_width,
    scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out and log-sum-exp of one tile of queries, one head; `num_batch_heads` is B * H."""
    q_n, k_n, v_n, pk_n, pv_n, out_n = q_n * UNIT, k_n * UNIT, v_n * UNIT, pk_n * UNIT, pv_n * UNIT, out_n * UNIT
    i_both, i_tile = tl.program_id(0) % num_batch_heads, tl.program_id(0) // num_batch_heads
    i_batch, i_head = i_both // num_heads, i_both % num_heads
    p_k = head_of(K, i_batch, i_head, k_b, k_h, UNIT)
    p_v = head_of(V, i_batch, i_head, v_b, v_h, UNIT)
    p_pk = head_of(PROXY_K, i_batch, i_head, pk_b, pk_h, UNIT)
    p_pv = head_of(PROXY_V, i_batch, i_head, pv_b, pv_h, UNIT)
    o_tile = i_both.to(tl.int64) * num_tiles + i_tile
    p_chosen, p_hidden = CHOSEN + o_tile * num_chosen, HIDDEN + o_tile * num_cells

    queries = tl.load(TILES + i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q))
    exists = queries >= 0
    queries = tl.maximum(queries, 0)
    b_q = load_rows(head_of(Q, i_batch, i_head, q_b, q_h, UNIT), queries, q_n, HEAD_DIM, BLOCK_D)
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_Q], FLOOR, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)

    if num_cells > 0:
        for start in tl.range(0, num_cells, BLOCK_K):
            i_cell = start + tl.arange(0, BLOCK_K)
            valid = i_cell < num_cells
            cells = tl.minimum(i_cell, num_cells - 1)
            b_k = load_rows(p_pk, cells, pk_n, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_pv, cells, pv_n, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            b_s += _proxy_bias(
                queries, i_cell, valid, tl.load(p_hidden + i_cell, mask=valid, other=0)[None, :], REST, num_cells
            )
            b_s = tl.where(valid[None, :], b_s, EXCLUDED)
            b_acc, b_max, b_sum = online_softmax(b_s, 1.0, b_v, b_acc, b_max, b_sum, PRECISION)

    num_seen = num_chosen * cell_len
    masked_from = tl.load(NUM_UNMASKED + o_tile) * cell_len // BLOCK_K * BLOCK_K
    if masked_from > 0:
        for start in tl.range(0, masked_from, BLOCK_K):
            keys, b_share = _chosen_tokens(start, num_seen, CELLS, SHARES, p_chosen, cell_len, per_cell, BLOCK_K)
            b_k = load_rows(p_k, keys, k_n, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_v, keys, v_n, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E) + b_share[None, :]
            b_acc, b_max, b_sum = online_softmax(b_s, 1.0, b_v, b_acc, b_max, b_sum, PRECISION)

    if masked_from < num_seen:
        for start in tl.range(masked_from, num_seen, BLOCK_K):
            keys, b_share = _chosen_tokens(start, num_seen, CELLS, SHARES, p_chosen, cell_len, per_cell, BLOCK_K)
            b_k = load_rows(p_k, keys, k_n, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_v, keys, v_n, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            near = _near(queries, keys, limit, ROWS, COLUMNS, FRAMES, frames, height, width, per_height, per_width)
            b_s += tl.where(near & (b_share > EXCLUDED)[None, :], UNSEEN * LOG2_E, b_share[None, :])
            b_acc, b_max, b_sum = online_softmax(b_s, 1.0, b_v, b_acc, b_max, b_sum, PRECISION)

    b_out = b_acc / b_sum[:, None]
    store_rows(head_of(OUT, i_batch, i_head, out_b, out_h, UNIT), queries, out_n, b_out, exists, HEAD_DIM, BLOCK_D)
    tl.store(LSE + i_both.to(tl.int64) * num_tokens + queries, (b_max + tl.log2(b_sum)) / LOG2_E, mask=exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def focus_grad_query(
    GRAD_OUT, do_b, do_h, do_n,
    Q, q_b, q_h, q_n,
    K, k_b, k_h, k_n,
    V, v_b, v_h, v_n,
    PROXY_K, pk_b, pk_h, pk_n,
    PROXY_V, pv_b, pv_h, pv_n,
    OUT, out_b, out_h, out_n,
    GRAD_Q, dq_b, dq_h, dq_n,
    LSE, GRAD_LSE, DELTA,  # [B, H, N]; DELTA: sum(out * grad_out) - lse's gradient, for the other kernels
    TILES, CELLS, SHARES, REST, CHOSEN, HIDDEN, NUM_UNMASKED, ROWS, COLUMNS, FRAMES,
    num_heads, num_batch_heads, num_tiles, num_tokens, num_cells, cell_len, num_chosen, limit, frames, height, width,
    per_cell, per_height, per_width,
    scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq = scale * sum_j ds_j k_j of one tile of queries, with p = exp(s - lse), ds = p (dout . v - delta)."""
    do_n, q_n, k_n, v_n = do_n * UNIT, q_n * UNIT, k_n * UNIT, v_n * UNIT
    pk_n, pv_n, out_n, dq_n = pk_n * UNIT, pv_n * UNIT, out_n * UNIT, dq_n * UNIT
    i_both, i_tile = tl.program_id(0) % num_batch_heads, tl.program_id(0) // num_batch_heads
    i_batch, i_head = i_both // num_heads, i_both % num_heads
    p_k = head_of(K, i_batch, i_head, k_b, k_h, UNIT)
    p_v = head_of(V, i_batch, i_head, v_b, v_h, UNIT)
    p_pk = head_of(PROXY_K, i_batch, i_head, pk_b, pk_h, UNIT)
    p_pv = head_of(PROXY_V, i_batch, i_head, pv_b, pv_h, UNIT)
    o_tile = i_both.to(tl.int64) * num_tiles + i_tile
    p_chosen, p_hidden = CHOSEN + o_tile * num_chosen, HIDDEN + o_tile * num_cells

    queries = tl.load(TILES + i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q))
    exists = queries >= 0
    queries = tl.maximum(queries, 0)
    b_q = load_rows(head_of(Q, i_batch, i_head, q_b, q_h, UNIT), queries, q_n, HEAD_DIM, BLOCK_D)
    b_do = load_rows(head_of(GRAD_OUT, i_batch, i_head, do_b, do_h, UNIT), queries, do_n, HEAD_DIM, BLOCK_D)
    b_out = load_rows(head_of(OUT, i_batch, i_head, out_b, out_h, UNIT), queries, out_n, HEAD_DIM, BLOCK_D)
    o_lse = i_both.to(tl.int64) * num_tokens
    grad_lse = tl.load(GRAD_LSE + o_lse + queries, mask=exists, other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1) - grad_lse
    tl.store(DELTA + o_lse + queries, b_delta, mask=exists)
    b_lse = tl.load(LSE + o_lse + queries)[:, None] * LOG2_E
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    if num_cells > 0:
        for start in tl.range(0, num_cells, BLOCK_K):
            i_cell = start + tl.arange(0, BLOCK_K)
            valid = i_cell < num_cells
            cells = tl.minimum(i_cell, num_cells - 1)
            b_k = load_rows(p_pk, cells, pk_n, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_pv, cells, pv_n, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            b_s += _proxy_bias(
                queries, i_cell, valid, tl.load(p_hidden + i_cell, mask=valid, other=0)[None, :], REST, num_cells
            )
            b_p = tl.where(valid[None, :], tl.exp2(b_s - b_lse), 0.0)
            b_dq = query_gradient(b_do, b_k, b_v, b_p, b_delta, b_dq, PRECISION)

    num_seen = num_chosen * cell_len
    masked_from = tl.load(NUM_UNMASKED + o_tile) * cell_len // BLOCK_K * BLOCK_K
    if masked_from > 0:
        for start in tl.range(0, masked_from, BLOCK_K):
            keys, b_share = _chosen_tokens(start, num_seen, CELLS, SHARES, p_chosen, cell_len, per_cell, BLOCK_K)
            b_k = load_rows(p_k, keys, k_n, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_v, keys, v_n, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E) + b_share[None, :]
            b_dq = query_gradient(b_do, b_k, b_v, tl.exp2(b_s - b_lse), b_delta, b_dq, PRECISION)

    if masked_from < num_seen:
        for start in tl.range(masked_from, num_seen, BLOCK_K):
            keys, b_share = _chosen_tokens(start, num_seen, CELLS, SHARES, p_chosen, cell_len, per_cell, BLOCK_K)
            b_k = load_rows(p_k, keys, k_n, HEAD_DIM, BLOCK_D)
            b_v = load_rows(p_v, keys, v_n, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            near = _near(queries, keys, limit, ROWS, COLUMNS, FRAMES, frames, height, width, per_height, per_width)
            b_s += tl.where(near & (b_share > EXCLUDED)[None, :], UNSEEN * LOG2_E, b_share[None, :])
            b_dq = query_gradient(b_do, b_k, b_v, tl.exp2(b_s - b_lse), b_delta, b_dq, PRECISION)

    p_dq = head_of(GRAD_Q, i_batch, i_head, dq_b, dq_h, UNIT)
    store_rows(p_dq, queries, dq_n, b_dq * scale, exists, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def focus_grad_proxy(
    GRAD_OUT, do_b, do_h, do_n,
    Q, q_b, q_h, q_n,
    PROXY_K, pk_b, pk_h, pk_n,
    PROXY_V, pv_b, pv_h, pv_n,
    GRAD_K, GRAD_V,  # [splits, B, H, C, HEAD_DIM] float32, to be summed over the splits
    LSE, DELTA, TILES, REST, HIDDEN,
    num_heads, num_tiles, num_tokens, num_cells, split_len,
    scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of proxies, over `split_len` slots of TILES, a multiple of BLOCK_ROWS."""
    do_n, q_n, pk_n, pv_n = do_n * UNIT, q_n * UNIT, pk_n * UNIT, pv_n * UNIT
    i_block, i_both, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_batch, i_head = i_both // num_heads, i_both % num_heads
    p_q = head_of(Q, i_batch, i_head, q_b, q_h, UNIT)
    p_do = head_of(GRAD_OUT, i_batch, i_head, do_b, do_h, UNIT)
    o_lse = i_both.to(tl.int64) * num_tokens

    i_cell = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = i_cell < num_cells
    cells = tl.minimum(i_cell, num_cells - 1)
    b_k = load_rows(head_of(PROXY_K, i_batch, i_head, pk_b, pk_h, UNIT), cells, pk_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(head_of(PROXY_V, i_batch, i_head, pv_b, pv_h, UNIT), cells, pv_n, HEAD_DIM, BLOCK_D)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    first, num_places = i_split * split_len, num_tiles * BLOCK_Q
    end = tl.minimum(first + split_len, num_places)
    if first < end:
        for start in tl.range(first, end, BLOCK_ROWS):
            i_place = start + tl.arange(0, BLOCK_ROWS)
            queries = tl.load(TILES + i_place, mask=i_place < num_places, other=-1)
            exists = queries >= 0
            queries = tl.maximum(queries, 0)
            o_tile = i_both.to(tl.int64) * num_tiles + tl.minimum(i_place // BLOCK_Q, num_tiles - 1)
            b_q = load_rows(p_q, queries, q_n, HEAD_DIM, BLOCK_D)
            b_do = load_rows(p_do, queries, do_n, HEAD_DIM, BLOCK_D)
            b_lse, b_delta = tl.load(LSE + o_lse + queries) * LOG2_E, tl.load(DELTA + o_lse + queries)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            b_hidden = tl.load(HIDDEN + o_tile[:, None] * num_cells + i_cell[None, :], mask=valid[None, :], other=0)
            b_s += _proxy_bias(queries, i_cell, valid, b_hidden, REST, num_cells)
            b_p = tl.where(exists[:, None], tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_dk, b_dv = key_gradients(b_do, b_q, b_v, b_p, b_delta, b_dk, b_dv, PRECISION)

    o_out = (i_split.to(tl.int64) * tl.num_programs(1) + i_both) * num_cells * HEAD_DIM
    store_rows(GRAD_K + o_out, cells, HEAD_DIM, b_dk * scale, valid, HEAD_DIM, BLOCK_D)
    store_rows(GRAD_V + o_out, cells, HEAD_DIM, b_dv, valid, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def focus_grad_cell(
    GRAD_OUT, do_b, do_h, do_n,
    Q, q_b, q_h, q_n,
    K, k_b, k_h, k_n,
    V, v_b, v_h, v_n,
    GRAD_K, GRAD_V,  # [B, H, N, HEAD_DIM] if DISJOINT: each token is in one cell; else
    # [B, H, C, cell_len, HEAD_DIM] float32, to be summed over the cells that hold a token
    LSE, DELTA, TILES, CELLS, SHARES,
    CHOOSERS, FIRST,  # [B, H, tiles * num_chosen] tiles that chose cell 0, cell 1, ...; [B, H, C + 1] their start
    ROWS, COLUMNS, FRAMES,
    num_heads, num_tiles, num_tokens, num_cells, cell_len, num_chosen, limit, frames, height, width,
    per_cell, per_height, per_width,
    scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_ROWS: tl.constexpr, DISJOINT: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_K tokens of one cell, over the queries of the tiles that chose it."""
    do_n, q_n, k_n, v_n = do_n * UNIT, q_n * UNIT, k_n * UNIT, v_n * UNIT
    i_cell, i_both, i_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_batch, i_head = i_both // num_heads, i_both % num_heads
    p_q = head_of(Q, i_batch, i_head, q_b, q_h, UNIT)
    p_do = head_of(GRAD_OUT, i_batch, i_head, do_b, do_h, UNIT)
    o_lse = i_both.to(tl.int64) * num_tokens
    p_choosers = CHOOSERS + i_both.to(tl.int64) * num_tiles * num_chosen

    i_slot = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    slots = tl.minimum(i_slot, cell_len - 1)
    keys = tl.load(CELLS + i_cell * cell_len + slots)
    b_share = tl.load(SHARES + i_cell * cell_len + slots) * LOG2_E
    b_k = load_rows(head_of(K, i_batch, i_head, k_b, k_h, UNIT), keys, k_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(head_of(V, i_batch, i_head, v_b, v_h, UNIT), keys, v_n, HEAD_DIM, BLOCK_D)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    p_first = FIRST + i_both * (num_cells + 1) + i_cell
    begin, end = tl.load(p_first) * BLOCK_Q, tl.load(p_first + 1) * BLOCK_Q
    if begin < end:
        for start in tl.range(begin, end, BLOCK_ROWS):
            i_place = start + tl.arange(0, BLOCK_ROWS)
            tile = tl.load(p_choosers + i_place // BLOCK_Q, mask=i_place < end, other=0)
            queries = tl.load(TILES + tile * BLOCK_Q + i_place % BLOCK_Q, mask=i_place < end, other=-1)
            exists = queries >= 0
            queries = tl.maximum(queries, 0)
            b_q = load_rows(p_q, queries, q_n, HEAD_DIM, BLOCK_D)
            b_do = load_rows(p_do, queries, do_n, HEAD_DIM, BLOCK_D)
            b_lse, b_delta = tl.load(LSE + o_lse + queries) * LOG2_E, tl.load(DELTA + o_lse + queries)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            near = _near(queries, keys, limit, ROWS, COLUMNS, FRAMES, frames, height, width, per_height, per_width)
            b_s += tl.where(near, UNSEEN * LOG2_E, b_share[None, :])
            b_p = tl.where(exists[:, None], tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_dk, b_dv = key_gradients(b_do, b_q, b_v, b_p, b_delta, b_dk, b_dv, PRECISION)

    if DISJOINT:
        rows = i_both.to(tl.int64) * num_tokens + keys
    else:
        rows = (i_both.to(tl.int64) * num_cells + i_cell) * cell_len + slots
    store_rows(GRAD_K, rows, HEAD_DIM, b_dk * scale, i_slot < cell_len, HEAD_DIM, BLOCK_D)
    store_rows(GRAD_V, rows, HEAD_DIM, b_dv, i_slot < cell_len, HEAD_DIM, BLOCK_D)
