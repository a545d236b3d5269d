"""What lies beyond a window, by cells, in Triton: chosen cells token by token, all others by their proxies.

A program owns one tile of queries, which chose together, in one head. It goes over

    the proxies                   s = scale q . k_c + log r_ic, those of chosen cells left out
    tokens of chosen cells        s = scale q . k_j - log (m_j n/C), in two loops, so that Triton can load ahead: first
                                  the cells that no window of the tile reaches, then the others, token by token

in one running softmax (attention.py has the formula). Heads of one tile run beside each other: they read the same r.

Prefixes: i_ index, o_ offset, b_ block of data, p_ pointer. Logits are kept in base 2: s = scale * log2(e) * q . k.
Tensors [B, H, N, D] are followed in a signature by their strides over batch, head and token; the last axis has
stride 1. Sums are float32.
"""

import triton
import triton.language as tl

from ..pieces.triton_blocks import EXCLUDED, FLOOR, LOG2_E, head_of, load_rows, online_softmax, store_rows

# Added to the logit of what a query does not see. Not EXCLUDED: the log-sum-exp of a query that sees nothing is that of
# plain.py, whose backward reads it.
UNSEEN = tl.constexpr(-1.0e4)


@triton.jit
def _chosen_tokens(start, num_tokens, CELLS, SHARES, p_chosen, cell_len, BLOCK_K: tl.constexpr):
    """Tokens `start` to `start` + BLOCK_K of the chosen cells, and what is added to their logits."""
    i_token = start + tl.arange(0, BLOCK_K)
    exists = i_token < num_tokens
    cell = tl.load(p_chosen + i_token // cell_len, mask=exists, other=0)
    slot = cell * cell_len + i_token % cell_len
    return tl.load(CELLS + slot), tl.where(exists, tl.load(SHARES + slot) * LOG2_E, EXCLUDED)


@triton.jit
def _near(queries, keys, limit, ROWS, COLUMNS, FRAMES, frames, height, width):
    """[queries, keys] bool: the key lies in the window of the query."""
    q_row, k_row = queries // width % height, keys // width % height
    distance = tl.load(ROWS + q_row[:, None] * height + k_row[None, :])
    distance += tl.load(COLUMNS + (queries % width)[:, None] * width + (keys % width)[None, :])
    if frames > 1:
        q_frame, k_frame = queries // (height * width), keys // (height * width)
        distance += tl.load(FRAMES + q_frame[:, None] * frames + k_frame[None, :])
    return distance < limit


@triton.jit
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
    CLEAR,  # [B, H, tiles] how many, at the front, no window of the tile reaches
    ROWS, COLUMNS, FRAMES,  # [size, size] distances: a key is in the window where they add up to less than `limit`
    num_heads, num_programs, num_tiles, num_tokens, num_cells, cell_len, num_chosen, limit, frames, height, width,
    scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and log-sum-exp of one tile of queries, one head; `num_programs` is B * H."""
    i_both, i_tile = tl.program_id(0) % num_programs, tl.program_id(0) // num_programs
    i_batch, i_head = i_both // num_heads, i_both % num_heads
    p_k, p_v = head_of(K, i_batch, i_head, k_b, k_h), head_of(V, i_batch, i_head, v_b, v_h)
    p_pk, p_pv = head_of(PROXY_K, i_batch, i_head, pk_b, pk_h), head_of(PROXY_V, i_batch, i_head, pv_b, pv_h)
    o_tile = i_both.to(tl.int64) * num_tiles + i_tile
    p_chosen, p_hidden = CHOSEN + o_tile * num_chosen, HIDDEN + o_tile * num_cells

    queries = tl.load(TILES + i_tile * BLOCK_Q + tl.arange(0, BLOCK_Q))
    exists = queries >= 0
    queries = tl.maximum(queries, 0)
    b_q = load_rows(head_of(Q, i_batch, i_head, q_b, q_h), queries, q_n, HEAD_DIM, BLOCK_D)
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_Q], FLOOR, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)

    p_rest = REST + queries.to(tl.int64)[:, None] * num_cells
    for start in tl.range(0, num_cells, BLOCK_K):
        i_cell = start + tl.arange(0, BLOCK_K)
        cells = tl.minimum(i_cell, num_cells - 1)
        b_k = load_rows(p_pk, cells, pk_n, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_pv, cells, pv_n, HEAD_DIM, BLOCK_D)
        b_bias = tl.load(p_rest + cells[None, :]).to(tl.float32) + UNSEEN * tl.load(p_hidden + cells)[None, :]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E) + b_bias * LOG2_E
        b_s = tl.where((i_cell < num_cells)[None, :], b_s, EXCLUDED)
        b_acc, b_max, b_sum = online_softmax(b_s, b_v, b_acc, b_max, b_sum, PRECISION)

    num_seen = num_chosen * cell_len
    masked_from = tl.load(CLEAR + o_tile) * cell_len // BLOCK_K * BLOCK_K
    for start in tl.range(0, masked_from, BLOCK_K):
        keys, b_share = _chosen_tokens(start, num_seen, CELLS, SHARES, p_chosen, cell_len, BLOCK_K)
        b_k = load_rows(p_k, keys, k_n, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_v, keys, v_n, HEAD_DIM, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E) + b_share[None, :]
        b_acc, b_max, b_sum = online_softmax(b_s, b_v, b_acc, b_max, b_sum, PRECISION)

    for start in tl.range(masked_from, num_seen, BLOCK_K):
        keys, b_share = _chosen_tokens(start, num_seen, CELLS, SHARES, p_chosen, cell_len, BLOCK_K)
        b_k = load_rows(p_k, keys, k_n, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_v, keys, v_n, HEAD_DIM, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
        near = _near(queries, keys, limit, ROWS, COLUMNS, FRAMES, frames, height, width)
        b_s += tl.where(near & (b_share > EXCLUDED)[None, :], UNSEEN * LOG2_E, b_share[None, :])
        b_acc, b_max, b_sum = online_softmax(b_s, b_v, b_acc, b_max, b_sum, PRECISION)

    b_out = b_acc / b_sum[:, None]
    store_rows(head_of(OUT, i_batch, i_head, out_b, out_h), queries, out_n, b_out, exists, HEAD_DIM, BLOCK_D)
    tl.store(LSE + i_both.to(tl.int64) * num_tokens + queries, (b_max + tl.log2(b_sum)) / LOG2_E, mask=exists)
