"""Causal grouped-query attention, forward, with XSA in its epilogue; scores stay in registers.

Queries are the last W positions of the sequence: row i of W is position length - W + i. Scores of query head
h are |gain_h| / sqrt(hd) q.k; q already carries the gain's sign, so the scale is not negative and the running
maximum can be taken before scaling. Softmax runs in base 2. Heads have HEAD_DIM channels, padded to
PADDED_DIM. XSA (exclusive self-attention) removes from a token's output the component along its own value.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, launch_options
from pgolf_fast.kernels.attention_projection import head_sizes
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
XSA_EPS = tl.constexpr(1e-12)  # as pgolf_fast.ops.reference


@triton.jit
def _online_softmax(
    acc,
    total,
    top,
    q,
    k_base,
    v_base,
    low,
    high,
    position,
    scale,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    segment=None,
):
    """Online softmax over keys low..high for one block of queries.

    acc [BLOCK_M, PADDED_DIM] is the weighted sum of values; top and total [BLOCK_M] are the largest base-2
    exponent and the sum of powers relative to it. MASKED blocks of keys may extend past a query's position
    and before the start of its segment, `segment` [BLOCK_M].
    """
    PADDED_DIM: tl.constexpr = acc.shape[1]
    in_block, channels = tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    offsets = in_block[:, None] * stride + channels[None, :]
    for start in range(low, high, BLOCK_N):
        block = start * tl.cast(stride, tl.int64)
        if MASKED:
            # `high` is one past the last query of this program, and no query attends to later keys
            inside = (start + in_block < high)[:, None] & (channels < HEAD_DIM)[None, :]
            k = tl.load(k_base + block + offsets, mask=inside, other=0.0)
            v = tl.load(v_base + block + offsets, mask=inside, other=0.0)
        elif PADDED_DIM != HEAD_DIM:
            k = tl.load(k_base + block + offsets, mask=(channels < HEAD_DIM)[None, :], other=0.0)
            v = tl.load(v_base + block + offsets, mask=(channels < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_base + block + offsets)
            v = tl.load(v_base + block + offsets)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            visible = (start + in_block)[None, :] <= position[:, None]
            if segment is not None:
                visible &= (start + in_block)[None, :] >= segment[:, None]
            scores = tl.where(visible, scores * scale, -float("inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            p = tl.exp2(scores - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
            p = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit
def flash_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gain_ptr,
    context_ptr,
    along_ptr,
    lse_ptr,
    gate_ptr,
    gated_ptr,
    starts_ptr,
    queries,
    length,
    num_heads,
    num_kv_heads,
    inverse_sqrt,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    XSA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of BLOCK_M queries of one head: context, logsumexp and, with XSA, the removed component.

    Programs of a head are neighbors, and share its K and V in L2; blocks with the most keys start first.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    first = ((blocks - 1 - pid % blocks) * BLOCK_M).to(tl.int32)
    batch, head = pid // blocks // num_heads, pid // blocks % num_heads
    kv_head = head // (num_heads // num_kv_heads)
    in_block, channels = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    position = length - queries + first + in_block
    inside = (first + in_block < queries)[:, None] & (channels < HEAD_DIM)[None, :]
    q_stride, kv_stride = num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM
    q_base = ((batch * queries + first) * num_heads + head) * HEAD_DIM
    kv_base = (batch * length * num_kv_heads + kv_head) * HEAD_DIM
    offsets = in_block[:, None] * q_stride + channels[None, :]
    q = tl.load(q_ptr + q_base + offsets, mask=inside, other=0.0)
    scale = tl.abs(tl.load(gain_ptr + head).to(tl.float32)) * inverse_sqrt * LOG2_E

    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    row_inside = first + in_block < queries
    full = (length - queries + first + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(length, length - queries + first + BLOCK_M)
    k_base, v_base = k_ptr + kv_base, v_ptr + kv_base
    top, segment = tl.full((BLOCK_M,), -float("inf"), tl.float32), None
    if starts_ptr is None:
        # every query attends to key 0, so `top` is finite after the first block
        acc, total, top = _online_softmax(
            acc, total, top, q, k_base, v_base, 0, full, position, scale, kv_stride, HEAD_DIM, BLOCK_N, False
        )
    else:
        starts_base = starts_ptr + batch * length + length - queries + first
        segment = tl.load(starts_base + in_block, mask=row_inside, other=0)
        full = tl.load(starts_base) // BLOCK_N * BLOCK_N  # starts do not decrease
        # finite, since a query may attend to no key of a block, and below all scores
        top = tl.full((BLOCK_M,), -1e30, tl.float32)
    acc, total, top = _online_softmax(
        acc,
        total,
        top,
        q,
        k_base,
        v_base,
        full,
        end,
        position,
        scale,
        kv_stride,
        HEAD_DIM,
        BLOCK_N,
        True,
        segment,
    )

    y = acc / total[:, None]
    per_row = (batch * num_heads + head) * queries + first + in_block
    tl.store(lse_ptr + per_row, (top + tl.log2(total)) * LN_2, mask=row_inside)
    if XSA:
        own = (length - queries + first).to(tl.int64) * kv_stride
        own_offsets = in_block[:, None] * kv_stride + channels[None, :]
        value = tl.load(v_base + own + own_offsets, mask=inside, other=0.0).to(tl.float32)
        unit = value / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), XSA_EPS)[:, None]
        along = tl.sum(y * unit, axis=1)
        y = y - along[:, None] * unit
        tl.store(along_ptr + per_row, along, mask=row_inside)
    tl.store(context_ptr + q_base + offsets, y.to(context_ptr.dtype.element_ty), mask=inside)
    if gate_ptr is not None:
        gates = gate_ptr + (batch * queries + first) * num_heads + head
        gate = tl.load(gates + in_block * num_heads, mask=row_inside, other=0.0).to(tl.float32)
        y = y * gate[:, None]
        tl.store(gated_ptr + q_base + offsets, y.to(gated_ptr.dtype.element_ty), mask=inside)


@triton.jit
def xsa_fwd_kernel(
    y_ptr,
    v_ptr,
    context_ptr,
    along_ptr,
    gate_ptr,
    gated_ptr,
    rows,
    queries,
    length,
    num_heads,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """XSA after another library's attention: y - (y.u) u and y.u, u = v / |v|, for BLOCK_M rows of a head."""
    pid = tl.program_id(0).to(tl.int64)
    head, block = pid % num_heads, pid // num_heads
    kv_head = head // (num_heads // num_kv_heads)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, query = row // queries, row % queries
    channels, row_inside = tl.arange(0, PADDED_DIM), row < rows
    inside = row_inside[:, None] & (channels < HEAD_DIM)[None, :]
    offsets = ((row * num_heads + head) * HEAD_DIM)[:, None] + channels[None, :]
    own = (batch * length + length - queries + query) * num_kv_heads + kv_head
    value = tl.load(v_ptr + (own * HEAD_DIM)[:, None] + channels[None, :], mask=inside, other=0.0)
    value = value.to(tl.float32)
    y = tl.load(y_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    unit = value / tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), XSA_EPS)[:, None]
    along = tl.sum(y * unit, axis=1)
    y = y - along[:, None] * unit
    tl.store(along_ptr + (batch * num_heads + head) * queries + query, along, mask=row_inside)
    tl.store(context_ptr + offsets, y.to(context_ptr.dtype.element_ty), mask=inside)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row * num_heads + head, mask=row_inside, other=0.0).to(tl.float32)
        y = y * gate[:, None]
        tl.store(gated_ptr + offsets, y.to(gated_ptr.dtype.element_ty), mask=inside)


def launch_flash_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    context: Tensor,
    along: Tensor | None,
    lse: Tensor,
    *,
    xsa: bool,
    tile: Tile,
    gate: Tensor | None = None,
    gated: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Attend with q (B, W, H, hd) to k, v (B, T, KV, hd): context (B, W, H, hd), lse (B, H, W) float32.

    q as saved by the projection: unit heads times the sign of gain (H,). With xsa, context is the output
    minus its component along the token's own value, and along (B, H, W) float32 is that component. lse is the
    natural logsumexp. With gate (B, W, H), also gated (B, W, H, hd), the gate times the context. starts
    (B, T) int32: the first position that each attends to, not decreasing. All contiguous.
    """
    batch, queries, num_heads, head_dim = q.shape
    sizes = (queries, k.shape[1], num_heads, k.shape[2], head_dim**-0.5)
    constants = {**head_sizes(head_dim), "XSA": xsa}
    flash_attention_fwd_kernel[(triton.cdiv(queries, tile.block_m) * batch * num_heads,)](
        *(q, k, v, gain, context, along if xsa else lse, lse, gate, None if gate is None else gated, starts),
        *sizes,
        **launch_options(tile, "MN", **constants),
    )


def launch_xsa_fwd(
    y: Tensor,
    v: Tensor,
    context: Tensor,
    along: Tensor,
    *,
    tile: Tile,
    gate: Tensor | None = None,
    gated: Tensor | None = None,
) -> None:
    """Write context (B, W, H, hd) and along (B, H, W) float32 from y and v (B, T, KV, hd). All contiguous.

    gate and gated as in `launch_flash_attention_fwd`.
    """
    batch, queries, num_heads, head_dim = y.shape
    rows, constants = batch * queries, head_sizes(head_dim)
    sizes = (rows, queries, v.shape[1], num_heads, v.shape[2])
    xsa_fwd_kernel[(triton.cdiv(rows, tile.block_m) * num_heads,)](
        *(y, v, context, along, gate, None if gate is None else gated),
        *sizes,
        **launch_options(tile, "M", **constants),
    )
