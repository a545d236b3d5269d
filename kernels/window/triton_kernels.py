"""Window attention of image queries in Triton: forward, gradients of the queries, gradients of the keys.

A program owns one tile of tokens and iterates over the tiles of its list (lists.py) in two flat loops: first the tiles
that every query sees whole, then those read through a mask. Two things let Triton load ahead on 9.0 and keep the tensor
cores busy: each step reads the position of the next step's tile, so that it waits for keys and values only; and each
loop is guarded by an `if` that it has a step, since the path around an empty loop would set the accumulators, and ptxas
then ends each product before the next (its warning C7515, with Triton 3.6).

    tile    rectangle of the row-major image: a corner token, and the image's width; slots beyond an edge are other
            tokens of the image, or clamped to its last one, and every mask excludes them
    mask    one 64-bit word for each query of a tile: bit j is set if it sees key j of the key tile; where programs own
            keys, one for each key, with a bit for each query
    shared  keys that all queries see (text, pooled tokens), in blocks before (unmasked) and after (masked) the tiles;
            one word for each block serves all queries

Prefixes: i_ index, o_ offset, b_ block of data, p_ pointer. Logits are kept in base 2: s = scale * log2(e) * q . k,
with scale > 0. Tensors [B, H, N, D] are followed in a signature by their strides over batch, head and token, in units
of UNIT elements; the last axis has stride 1. Offsets into them are 64-bit. The lists are those of `TiledWindow` in
triton_window.py. Sums are float32.
"""

import triton
import triton.language as tl

from ..pieces.triton_blocks import (
    EXCLUDED,
    FLOOR,
    LOG2_E,
    head_of,
    key_gradients_of_columns,
    load_rows,
    online_softmax,
    query_gradient,
    store_rows,
)

# Arguments for which Triton would otherwise recompile if they are 1 or a multiple of 16, as image sizes change.
UNSPECIALIZED = [
    *(f"{tensor}_{axis}" for tensor in ("do", "q", "k", "v", "sk", "sv", "out", "dq", "dk", "dv") for axis in "bhn"),
    *("num_heads", "height", "width", "num_tokens", "num_shared", "shared_whole", "list_len", "split_len"),
]


@triton.jit
def _tile_tokens(corner, width, last, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS * COLUMNS] tokens of the tile, none beyond `last`."""
    i_slot = tl.arange(0, ROWS * COLUMNS)
    return tl.minimum(corner + (i_slot // COLUMNS) * width + i_slot % COLUMNS, last)


@triton.jit
def _tile_exists(corner, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS * COLUMNS] bool, False beyond the edge of the grid."""
    i_slot = tl.arange(0, ROWS * COLUMNS)
    row, column = (corner // width) % height, corner % width
    return (row + i_slot // COLUMNS < height) & (column + i_slot % COLUMNS < width)


@triton.jit
def _load_either(
    is_shared, p_shared, shared_stride, p_image, image_stride, tokens, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of the shared keys, or of the image's."""
    stride = tl.where(is_shared, shared_stride, image_stride)
    return load_rows(tl.where(is_shared, p_shared, p_image), tokens, stride, HEAD_DIM, BLOCK_D)


@triton.jit
def _sees(words, BLOCK_K: tl.constexpr):
    """[rows] words -> [rows, BLOCK_K] bool; from 32-bit halves, which take half the registers."""
    i_key = tl.arange(0, BLOCK_K)[None, :]
    low, high = words.to(tl.int32)[:, None], (words >> 32).to(tl.int32)[:, None]
    return ((tl.where(i_key < 32, low, high) >> (i_key & 31)) & 1) != 0


@triton.jit
def _whole_tokens(n, corner, width, last, shared_whole, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Keys of step `n` of the unmasked loop, with a tile at `corner`: (whether shared, tokens)."""
    is_shared = n < shared_whole
    shared_tokens = n * (ROWS * COLUMNS) + tl.arange(0, ROWS * COLUMNS)
    return is_shared, tl.where(is_shared, shared_tokens, _tile_tokens(corner, width, last, ROWS, COLUMNS))


@triton.jit
def _masked_tokens(
    n,
    corner,
    mask_id,
    i_batch,
    border,
    MASK_WORDS,
    SHARED_WORDS,
    width,
    last,
    num_shared,
    shared_whole,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Keys of step `n` of the masked loop, with a tile at `corner`: (whether shared, tokens, [BLOCK_Q] words)."""
    BLOCK_K: tl.constexpr = ROWS * COLUMNS
    is_shared = n >= border
    i_block = shared_whole + n - border
    shared_tokens = tl.minimum(i_block * BLOCK_K + tl.arange(0, BLOCK_K), num_shared - 1)
    tokens = tl.where(is_shared, shared_tokens, _tile_tokens(corner, width, last, ROWS, COLUMNS))
    i_query = tl.arange(0, BLOCK_Q)
    shared_word = i_batch * tl.cdiv(num_shared, BLOCK_K) + i_block
    p_words = tl.where(is_shared, SHARED_WORDS + shared_word + i_query * 0, MASK_WORDS + mask_id * BLOCK_Q + i_query)
    return is_shared, tokens, tl.load(p_words)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_forward(
    Q, q_b, q_h, q_n,
    K, k_b, k_h, k_n,
    V, v_b, v_h, v_n,
    SHARED_K, sk_b, sk_h, sk_n,
    SHARED_V, sv_b, sv_h, sv_n,
    OUT, out_b, out_h, out_n,
    LSE,  # [B, H, N]
    QUERY_CORNERS, KEY_CORNERS, MASK_IDS, COUNTS, INSIDE, MASK_WORDS, SHARED_WORDS,
    num_heads, height, width, num_tokens, num_shared, shared_whole, list_len,
    scale,
    Q_ROWS: tl.constexpr, Q_COLUMNS: tl.constexpr, K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out and log-sum-exp of one tile of queries, one head."""
    q_n, k_n, v_n, sk_n, sv_n, out_n = q_n * UNIT, k_n * UNIT, v_n * UNIT, sk_n * UNIT, sv_n * UNIT, out_n * UNIT
    BLOCK_Q: tl.constexpr = Q_ROWS * Q_COLUMNS
    BLOCK_K: tl.constexpr = K_ROWS * K_COLUMNS
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    p_k = head_of(K, i_batch, i_head, k_b, k_h, UNIT)
    p_v = head_of(V, i_batch, i_head, v_b, v_h, UNIT)
    p_sk = head_of(SHARED_K, i_batch, i_head, sk_b, sk_h, UNIT)
    p_sv = head_of(SHARED_V, i_batch, i_head, sv_b, sv_h, UNIT)
    last = num_tokens - 1

    corner = tl.load(QUERY_CORNERS + i_tile)
    queries = _tile_tokens(corner, width, last, Q_ROWS, Q_COLUMNS)
    b_q = load_rows(head_of(Q, i_batch, i_head, q_b, q_h, UNIT), queries, q_n, HEAD_DIM, BLOCK_D)
    b_acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_Q], FLOOR, tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)

    inside = tl.load(INSIDE + i_tile)
    first = i_tile * list_len
    key_corner = tl.load(KEY_CORNERS + first)
    steps = shared_whole + inside
    if steps > 0:
        for n in tl.range(0, steps):
            is_shared, keys = _whole_tokens(n, key_corner, width, last, shared_whole, K_ROWS, K_COLUMNS)
            key_corner = tl.load(KEY_CORNERS + first + tl.minimum(tl.maximum(n + 1 - shared_whole, 0), list_len - 1))
            b_k = _load_either(is_shared, p_sk, sk_n, p_k, k_n, keys, HEAD_DIM, BLOCK_D)
            b_v = _load_either(is_shared, p_sv, sv_n, p_v, v_n, keys, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_acc, b_max, b_sum = online_softmax(b_s, scale * LOG2_E, b_v, b_acc, b_max, b_sum, PRECISION)

    border = tl.load(COUNTS + i_tile) - inside
    first += inside
    entry = first + tl.minimum(0, border - 1)
    key_corner, mask_id = tl.load(KEY_CORNERS + entry), tl.load(MASK_IDS + entry)
    steps = border + tl.cdiv(num_shared, BLOCK_K) - shared_whole
    if steps > 0:
        for n in tl.range(0, steps):
            is_shared, keys, words = _masked_tokens(
                n, key_corner, mask_id, i_batch, border, MASK_WORDS, SHARED_WORDS,
                width, last, num_shared, shared_whole, K_ROWS, K_COLUMNS, BLOCK_Q,
            )  # fmt: skip
            entry = first + tl.minimum(n + 1, border - 1)
            key_corner, mask_id = tl.load(KEY_CORNERS + entry), tl.load(MASK_IDS + entry)
            b_k = _load_either(is_shared, p_sk, sk_n, p_k, k_n, keys, HEAD_DIM, BLOCK_D)
            b_v = _load_either(is_shared, p_sv, sv_n, p_v, v_n, keys, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_s = tl.where(_sees(words, BLOCK_K), b_s, EXCLUDED)
            b_acc, b_max, b_sum = online_softmax(b_s, scale * LOG2_E, b_v, b_acc, b_max, b_sum, PRECISION)

    exists = _tile_exists(corner, height, width, Q_ROWS, Q_COLUMNS)
    b_sum = tl.where(exists, b_sum, 1.0)  # a slot beyond the edge may have seen nothing
    b_out = b_acc / b_sum[:, None]
    store_rows(head_of(OUT, i_batch, i_head, out_b, out_h, UNIT), queries, out_n, b_out, exists, HEAD_DIM, BLOCK_D)
    o_lse = tl.program_id(1).to(tl.int64) * num_tokens
    tl.store(LSE + o_lse + queries, (b_max + tl.log2(b_sum)) / LOG2_E, mask=exists)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_grad_query(
    GRAD_OUT, do_b, do_h, do_n,
    Q, q_b, q_h, q_n,
    K, k_b, k_h, k_n,
    V, v_b, v_h, v_n,
    SHARED_K, sk_b, sk_h, sk_n,
    SHARED_V, sv_b, sv_h, sv_n,
    OUT, out_b, out_h, out_n,
    GRAD_Q, dq_b, dq_h, dq_n,
    LSE, GRAD_LSE, DELTA,  # [B, H, N]; DELTA: sum(out * grad_out) - lse's gradient, for the other kernels
    QUERY_CORNERS, KEY_CORNERS, MASK_IDS, COUNTS, INSIDE, MASK_WORDS, SHARED_WORDS,
    num_heads, height, width, num_tokens, num_shared, shared_whole, list_len,
    scale,
    Q_ROWS: tl.constexpr, Q_COLUMNS: tl.constexpr, K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dq = scale * sum_j ds_j k_j of one tile of queries, with p = exp(s - lse), ds = p (dout . v - delta)."""
    do_n, q_n, k_n, v_n = do_n * UNIT, q_n * UNIT, k_n * UNIT, v_n * UNIT
    sk_n, sv_n, out_n, dq_n = sk_n * UNIT, sv_n * UNIT, out_n * UNIT, dq_n * UNIT
    BLOCK_Q: tl.constexpr = Q_ROWS * Q_COLUMNS
    BLOCK_K: tl.constexpr = K_ROWS * K_COLUMNS
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    p_k = head_of(K, i_batch, i_head, k_b, k_h, UNIT)
    p_v = head_of(V, i_batch, i_head, v_b, v_h, UNIT)
    p_sk = head_of(SHARED_K, i_batch, i_head, sk_b, sk_h, UNIT)
    p_sv = head_of(SHARED_V, i_batch, i_head, sv_b, sv_h, UNIT)
    last = num_tokens - 1

    corner = tl.load(QUERY_CORNERS + i_tile)
    queries = _tile_tokens(corner, width, last, Q_ROWS, Q_COLUMNS)
    exists = _tile_exists(corner, height, width, Q_ROWS, Q_COLUMNS)
    b_q = load_rows(head_of(Q, i_batch, i_head, q_b, q_h, UNIT), queries, q_n, HEAD_DIM, BLOCK_D)
    b_do = load_rows(head_of(GRAD_OUT, i_batch, i_head, do_b, do_h, UNIT), queries, do_n, HEAD_DIM, BLOCK_D)
    b_out = load_rows(head_of(OUT, i_batch, i_head, out_b, out_h, UNIT), queries, out_n, HEAD_DIM, BLOCK_D)
    o_lse = tl.program_id(1).to(tl.int64) * num_tokens
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1) - tl.load(GRAD_LSE + o_lse + queries)
    tl.store(DELTA + o_lse + queries, b_delta, mask=exists)
    b_lse = tl.load(LSE + o_lse + queries) * LOG2_E
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

    inside = tl.load(INSIDE + i_tile)
    first = i_tile * list_len
    key_corner = tl.load(KEY_CORNERS + first)
    steps = shared_whole + inside
    if steps > 0:
        for n in tl.range(0, steps):
            is_shared, keys = _whole_tokens(n, key_corner, width, last, shared_whole, K_ROWS, K_COLUMNS)
            key_corner = tl.load(KEY_CORNERS + first + tl.minimum(tl.maximum(n + 1 - shared_whole, 0), list_len - 1))
            b_k = _load_either(is_shared, p_sk, sk_n, p_k, k_n, keys, HEAD_DIM, BLOCK_D)
            b_v = _load_either(is_shared, p_sv, sv_n, p_v, v_n, keys, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            b_p = tl.exp2(b_s - b_lse[:, None])
            b_dq = query_gradient(b_do, b_k, b_v, b_p, b_delta, b_dq, PRECISION)

    border = tl.load(COUNTS + i_tile) - inside
    first += inside
    entry = first + tl.minimum(0, border - 1)
    key_corner, mask_id = tl.load(KEY_CORNERS + entry), tl.load(MASK_IDS + entry)
    steps = border + tl.cdiv(num_shared, BLOCK_K) - shared_whole
    if steps > 0:
        for n in tl.range(0, steps):
            is_shared, keys, words = _masked_tokens(
                n, key_corner, mask_id, i_batch, border, MASK_WORDS, SHARED_WORDS,
                width, last, num_shared, shared_whole, K_ROWS, K_COLUMNS, BLOCK_Q,
            )  # fmt: skip
            entry = first + tl.minimum(n + 1, border - 1)
            key_corner, mask_id = tl.load(KEY_CORNERS + entry), tl.load(MASK_IDS + entry)
            b_k = _load_either(is_shared, p_sk, sk_n, p_k, k_n, keys, HEAD_DIM, BLOCK_D)
            b_v = _load_either(is_shared, p_sv, sv_n, p_v, v_n, keys, HEAD_DIM, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
            b_p = tl.where(_sees(words, BLOCK_K), tl.exp2(b_s - b_lse[:, None]), 0.0)
            b_dq = query_gradient(b_do, b_k, b_v, b_p, b_delta, b_dq, PRECISION)

    p_dq = head_of(GRAD_Q, i_batch, i_head, dq_b, dq_h, UNIT)
    store_rows(p_dq, queries, dq_n, b_dq * scale, exists, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_grad_key(
    GRAD_OUT, do_b, do_h, do_n,
    Q, q_b, q_h, q_n,
    K, k_b, k_h, k_n,
    V, v_b, v_h, v_n,
    GRAD_K, dk_b, dk_h, dk_n,
    GRAD_V, dv_b, dv_h, dv_n,
    LSE, DELTA,
    KEY_CORNERS, QUERY_CORNERS, MASK_IDS, COUNTS, MASK_WORDS,  # lists with the roles swapped; bit i: query i sees a key
    num_heads, height, width, num_tokens, list_len,
    scale,
    Q_ROWS: tl.constexpr, Q_COLUMNS: tl.constexpr, K_ROWS: tl.constexpr, K_COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dk = scale * sum_i ds_i q_i and dv = sum_i p_i dout_i of one tile of keys, over the queries that see it."""
    do_n, q_n, k_n, v_n, dk_n, dv_n = do_n * UNIT, q_n * UNIT, k_n * UNIT, v_n * UNIT, dk_n * UNIT, dv_n * UNIT
    BLOCK_Q: tl.constexpr = Q_ROWS * Q_COLUMNS
    BLOCK_K: tl.constexpr = K_ROWS * K_COLUMNS
    i_tile, i_batch, i_head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    p_q = head_of(Q, i_batch, i_head, q_b, q_h, UNIT)
    p_do = head_of(GRAD_OUT, i_batch, i_head, do_b, do_h, UNIT)
    last = num_tokens - 1
    o_lse = tl.program_id(1).to(tl.int64) * num_tokens

    corner = tl.load(KEY_CORNERS + i_tile)
    keys = _tile_tokens(corner, width, last, K_ROWS, K_COLUMNS)
    b_k = load_rows(head_of(K, i_batch, i_head, k_b, k_h, UNIT), keys, k_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(head_of(V, i_batch, i_head, v_b, v_h, UNIT), keys, v_n, HEAD_DIM, BLOCK_D)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    steps = tl.load(COUNTS + i_tile)
    q_corner, mask_id = tl.load(QUERY_CORNERS + i_tile * list_len), tl.load(MASK_IDS + i_tile * list_len)
    if steps > 0:
        for n in tl.range(0, steps):
            queries = _tile_tokens(q_corner, width, last, Q_ROWS, Q_COLUMNS)
            words = tl.load(MASK_WORDS + mask_id * BLOCK_K + tl.arange(0, BLOCK_K))
            entry = i_tile * list_len + tl.minimum(n + 1, steps - 1)
            q_corner, mask_id = tl.load(QUERY_CORNERS + entry), tl.load(MASK_IDS + entry)
            b_q = load_rows(p_q, queries, q_n, HEAD_DIM, BLOCK_D)
            b_do = load_rows(p_do, queries, do_n, HEAD_DIM, BLOCK_D)
            b_lse, b_delta = tl.load(LSE + o_lse + queries) * LOG2_E, tl.load(DELTA + o_lse + queries)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2_E)
            b_p = tl.where(_sees(words, BLOCK_Q), tl.exp2(b_s - b_lse[None, :]), 0.0)
            b_dk, b_dv = key_gradients_of_columns(b_do, b_q, b_v, b_p, b_delta, b_dk, b_dv, PRECISION)

    exists = _tile_exists(corner, height, width, K_ROWS, K_COLUMNS)
    p_dk = head_of(GRAD_K, i_batch, i_head, dk_b, dk_h, UNIT)
    p_dv = head_of(GRAD_V, i_batch, i_head, dv_b, dv_h, UNIT)
    store_rows(p_dk, keys, dk_n, b_dk * scale, exists, HEAD_DIM, BLOCK_D)
    store_rows(p_dv, keys, dv_n, b_dv, exists, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def window_grad_shared(
    GRAD_OUT, do_b, do_h, do_n,
    Q, q_b, q_h, q_n,
    SHARED_K, sk_b, sk_h, sk_n,
    SHARED_V, sv_b, sv_h, sv_n,
    GRAD_K, GRAD_V,  # [splits, B, H, S, HEAD_DIM] float32, to be summed over the splits
    LSE, DELTA, SHARED_WORDS,
    num_heads, num_tokens, num_shared, split_len,
    scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WORD_LEN: tl.constexpr,  # WORD_LEN: keys of one word
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of shared keys, over `split_len` image queries, a multiple of BLOCK_Q."""
    do_n, q_n, sk_n, sv_n = do_n * UNIT, q_n * UNIT, sk_n * UNIT, sv_n * UNIT
    i_block, i_split = tl.program_id(0), tl.program_id(2)
    i_batch, i_head = tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    p_q = head_of(Q, i_batch, i_head, q_b, q_h, UNIT)
    p_do = head_of(GRAD_OUT, i_batch, i_head, do_b, do_h, UNIT)
    o_lse = tl.program_id(1).to(tl.int64) * num_tokens

    slots = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    keys = tl.minimum(slots, num_shared - 1)
    b_k = load_rows(head_of(SHARED_K, i_batch, i_head, sk_b, sk_h, UNIT), keys, sk_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(head_of(SHARED_V, i_batch, i_head, sv_b, sv_h, UNIT), keys, sv_n, HEAD_DIM, BLOCK_D)
    words = tl.load(SHARED_WORDS + i_batch * tl.cdiv(num_shared, WORD_LEN) + keys // WORD_LEN)
    seen = ((words >> (keys % WORD_LEN)) & 1) != 0
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

    first = i_split * split_len
    end = tl.minimum(first + split_len, num_tokens)
    if first < end:
        for start in tl.range(first, end, BLOCK_Q):
            i_query = start + tl.arange(0, BLOCK_Q)
            queries = tl.minimum(i_query, num_tokens - 1)
            b_q = load_rows(p_q, queries, q_n, HEAD_DIM, BLOCK_D)
            b_do = load_rows(p_do, queries, do_n, HEAD_DIM, BLOCK_D)
            b_lse, b_delta = tl.load(LSE + o_lse + queries) * LOG2_E, tl.load(DELTA + o_lse + queries)
            b_lse = tl.where(i_query < num_tokens, b_lse, float("inf"))  # no weight beyond the last query
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2_E)
            b_p = tl.exp2(b_s - b_lse[None, :])
            b_dk, b_dv = key_gradients_of_columns(b_do, b_q, b_v, b_p, b_delta, b_dk, b_dv, PRECISION)

    o_out = (i_split.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * num_shared * HEAD_DIM
    exists = slots < num_shared
    b_dk = tl.where(seen[:, None], b_dk * scale, 0.0)  # masked once, here: each key has sums of its own
    b_dv = tl.where(seen[:, None], b_dv, 0.0)
    store_rows(GRAD_K + o_out, keys, HEAD_DIM, b_dk, exists, HEAD_DIM, BLOCK_D)
    store_rows(GRAD_V + o_out, keys, HEAD_DIM, b_dv, exists, HEAD_DIM, BLOCK_D)
