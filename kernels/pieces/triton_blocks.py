"""Building blocks of the Triton kernels: loads and stores of one head's rows, one block of a softmax, its gradients.

Prefixes: i_ index, o_ offset, b_ block of data, p_ pointer. Logits are kept in base 2: s = scale * log2(e) * q . k.
Sums are float32, offsets 64-bit.
"""

import triton
import triton.language as tl

EXCLUDED = tl.constexpr(-1.0e30)  # logit of a pair that does not attend
FLOOR = tl.constexpr(-1.0e20)  # the running maximum starts here, so that exp2(EXCLUDED - FLOOR) is 0
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p_base, tokens, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] rows of one head; zeros beyond HEAD_DIM."""
    i_d = tl.arange(0, BLOCK_D)
    pointers = (p_base + i_d)[None, :] + (tokens.to(tl.int64) * stride)[:, None]
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=i_d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def store_rows(p_base, tokens, stride, rows, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    i_d = tl.arange(0, BLOCK_D)
    pointers = (p_base + i_d)[None, :] + (tokens.to(tl.int64) * stride)[:, None]
    tl.store(pointers, rows.to(p_base.dtype.element_ty), mask=exists[:, None] & (i_d[None, :] < HEAD_DIM))


@triton.jit
def head_of(pointer, i_batch, i_head, batch_stride, head_stride, UNIT: tl.constexpr):
    """Pointer to token 0 of one head; strides are in units of UNIT elements."""
    return pointer + (i_batch.to(tl.int64) * batch_stride + i_head.to(tl.int64) * head_stride) * UNIT


@triton.jit
def online_softmax(b_s, factor, b_v, b_acc, b_max, b_sum, PRECISION: tl.constexpr):
    """Add one block of logits and values to the running maximum, sum and weighted sum of values.

    Logits are `b_s` times `factor` > 0: multiplied here, product and difference are one instruction.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * factor)
    b_p = tl.exp2(b_s * factor - b_new_max[:, None])
    b_shrink = tl.exp2(b_max - b_new_max)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None], input_precision=PRECISION)
    return b_acc, b_new_max, b_sum * b_shrink + tl.sum(b_p, 1)


@triton.jit
def query_gradient(b_do, b_k, b_v, b_p, b_delta, b_dq, PRECISION: tl.constexpr):
    """Add one block of keys to dq / scale; `b_p` are the weights, [queries, keys]."""
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def key_gradients_of_columns(b_do, b_q, b_v, b_p, b_delta, b_dk, b_dv, PRECISION: tl.constexpr):
    """`key_gradients` with weights `b_p` [keys, queries], as the products take them: no transpose in shared memory."""
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION) - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def key_gradients(b_do, b_q, b_v, b_p, b_delta, b_dk, b_dv, PRECISION: tl.constexpr):
    """Add one block of queries to dk / scale and dv; `b_p` are the weights, [queries, keys]."""
    b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
    b_ds = b_p * (tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION) - b_delta[:, None])
    b_dk = tl.dot(tl.trans(b_ds.to(b_q.dtype)), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv
