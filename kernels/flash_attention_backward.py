"""Causal grouped-query attention, backward: three deterministic passes without atomics.

`delta` takes the gradient of the context through XSA and writes delta = dy . y per row; `dkdv` owns a block
of keys of a KV head and loops over the queries of its group; `dq` owns a block of queries and loops over
keys.

XSA, context = y - (y.u) u with u = v / |v|, in terms of what is saved (context and s = y.u):
dy = g - (g.u) u;  y = context + s u;  dv = -sum over the group of ((g.u) context + s dy) / |v|, which is
orthogonal to u already. Everything uses dy as rounded, because the passes multiply that: where a token
attends only to itself, gradients then cancel exactly.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, launch_options
from pgolf_fast.kernels.attention_projection import head_sizes
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
XSA_EPS = tl.constexpr(1e-12)  # as pgolf_fast.ops.reference


@triton.jit
def flash_attention_bwd_delta_kernel(
    dcontext_ptr,
    context_ptr,
    along_ptr,
    v_ptr,
    dy_ptr,
    delta_ptr,
    own_ptr,
    y_ptr,
    gate_ptr,
    dgate_ptr,
    gated_ptr,
    rows,
    queries,
    length,
    num_heads,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    XSA: tl.constexpr,
    WRITE_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dy, delta and, with XSA, the part of dv that it adds, for BLOCK_M rows of one KV head's query heads."""
    pid = tl.program_id(0).to(tl.int64)
    kv_head, block = pid % num_kv_heads, pid // num_kv_heads
    group = num_heads // num_kv_heads
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    batch, query = row // queries, row % queries
    channels, row_inside = tl.arange(0, PADDED_DIM), row < rows
    inside = row_inside[:, None] & (channels < HEAD_DIM)[None, :]
    own = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    unit, norm = own, tl.zeros((BLOCK_M,), tl.float32)
    if XSA:
        own_row = (batch * length + length - queries + query) * num_kv_heads + kv_head
        value_offsets = (own_row * HEAD_DIM)[:, None] + channels[None, :]
        value = tl.load(v_ptr + value_offsets, mask=inside, other=0.0).to(tl.float32)
        norm = tl.maximum(tl.sqrt(tl.sum(value * value, axis=1)), XSA_EPS)
        unit = value / norm[:, None]
    for member in range(0, group):
        head = kv_head * group + member
        offsets = ((row * num_heads + head) * HEAD_DIM)[:, None] + channels[None, :]
        per_row = (batch * num_heads + head) * queries + query
        g = tl.load(dcontext_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        context = tl.load(context_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            gates = row * num_heads + head
            gate = tl.load(gate_ptr + gates, mask=row_inside, other=0.0).to(tl.float32)[:, None]
            tl.store(dgate_ptr + gates, tl.sum(g * context, axis=1), mask=row_inside)
            tl.store(gated_ptr + offsets, (context * gate).to(gated_ptr.dtype.element_ty), mask=inside)
            g = g * gate
            if not XSA:
                rounded = g.to(dy_ptr.dtype.element_ty)
                tl.store(dy_ptr + offsets, rounded, mask=inside)
                g = rounded.to(tl.float32)
        dy, y = g, context
        if XSA:
            g_along = tl.sum(g * unit, axis=1)[:, None]
            along = tl.load(along_ptr + per_row, mask=row_inside, other=0.0)[:, None]
            rounded = (g - g_along * unit).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + offsets, rounded, mask=inside)
            dy, y = rounded.to(tl.float32), context + along * unit
            own -= g_along * context + along * dy
            if WRITE_Y:
                tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(delta_ptr + per_row, tl.sum(dy * y, axis=1), mask=row_inside)
    if XSA:
        own_offsets = ((row * num_kv_heads + kv_head) * HEAD_DIM)[:, None] + channels[None, :]
        tl.store(own_ptr + own_offsets, own / norm[:, None], mask=inside)


@triton.jit
def flash_attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gain_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    own_ptr,
    dk_ptr,
    dv_ptr,
    ends_ptr,
    queries,
    length,
    num_heads,
    num_kv_heads,
    dv_stride,
    inverse_sqrt,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    XSA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one KV head; blocks with the most queries, the first keys, start first."""
    blocks, group = tl.cdiv(length, BLOCK_N), num_heads // num_kv_heads
    pid = tl.program_id(0).to(tl.int64)
    first = (pid % blocks * BLOCK_N).to(tl.int32)
    batch, kv_head = pid // blocks // num_kv_heads, pid // blocks % num_kv_heads
    in_block, channels = tl.arange(0, BLOCK_N), tl.arange(0, PADDED_DIM)
    key, offset = first + in_block, length - queries
    inside = (key < length)[:, None] & (channels < HEAD_DIM)[None, :]
    # 64 bits for the start of a tile, 32 within it: wide offsets would cost a register pair per element
    kv_base = ((batch * length + first) * num_kv_heads + kv_head) * HEAD_DIM
    kv_offsets = in_block[:, None] * (num_kv_heads * HEAD_DIM) + channels[None, :]
    k = tl.load(k_ptr + kv_base + kv_offsets, mask=inside, other=0.0)
    v = tl.load(v_ptr + kv_base + kv_offsets, mask=inside, other=0.0)
    low = tl.maximum(0, first - offset) // BLOCK_M * BLOCK_M  # first block of queries that attend to a key
    high, stride = queries, num_heads * HEAD_DIM
    segment_end = key
    if ends_ptr is not None:
        last = tl.minimum(first + BLOCK_N, length) - 1
        high = tl.minimum(queries, tl.load(ends_ptr + batch * length + last) - offset)  # ends do not decrease
        segment_end = tl.load(ends_ptr + batch * length + key, mask=key < length, other=0)
    rows = tl.arange(0, BLOCK_M)
    offsets = rows[:, None] * stride + channels[None, :]
    dk, dv = tl.zeros((BLOCK_N, PADDED_DIM), tl.float32), tl.zeros((BLOCK_N, PADDED_DIM), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        scale = tl.abs(tl.load(gain_ptr + head).to(tl.float32)) * inverse_sqrt
        base = (batch * queries * num_heads + head) * HEAD_DIM
        per_row = (batch * num_heads + head) * queries
        q_base, dy_base = q_ptr + base, dy_ptr + base
        lse_base, delta_base = lse_ptr + per_row, delta_ptr + per_row
        # One masked loop: a second, unmasked one for queries past all keys would cost 25 registers per thread
        # (sm_90, heads of 64), and this kernel has none to spare.
        for start in range(low, high, BLOCK_M):
            block = start * tl.cast(stride, tl.int64)
            row_inside = start + rows < queries
            tile = row_inside[:, None] & (channels < HEAD_DIM)[None, :]
            q = tl.load(q_base + block + offsets, mask=tile, other=0.0)
            dy = tl.load(dy_base + block + offsets, mask=tile, other=0.0)
            lse = tl.load(lse_base + start + rows, mask=row_inside, other=0.0) * LOG2_E
            delta = tl.load(delta_base + start + rows, mask=row_inside, other=0.0) * scale
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            p = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
            p = tl.where(key[:, None] <= (offset + start + rows)[None, :], p, 0.0)
            if ends_ptr is not None:
                p = tl.where((offset + start + rows)[None, :] < segment_end[:, None], p, 0.0)
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
            ds = p * (dp * scale - delta[None, :])  # scale times p (dp - delta)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    tl.store(dk_ptr + kv_base + kv_offsets, dk.to(dk_ptr.dtype.element_ty), mask=inside)
    if XSA:
        own_base = ((batch * queries + first - offset) * num_kv_heads + kv_head) * HEAD_DIM
        own_inside = inside & (key >= offset)[:, None]
        dv += tl.load(own_ptr + own_base + kv_offsets, mask=own_inside, other=0.0)
    dv_base = (batch * length + first) * dv_stride + kv_head * HEAD_DIM
    dv_offsets = in_block[:, None] * dv_stride + channels[None, :]
    tl.store(dv_ptr + dv_base + dv_offsets, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _accumulate_dq(
    dq,
    q,
    dy,
    lse,
    delta,
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
    """Add the contribution of keys low..high to dq [BLOCK_M, PADDED_DIM].

    MASKED blocks of keys may extend past a query's own position and, with segments, before its own, `segment`
    [BLOCK_M].
    """
    in_block, channels = tl.arange(0, BLOCK_N), tl.arange(0, dq.shape[1])
    offsets = in_block[:, None] * stride + channels[None, :]
    for start in range(low, high, BLOCK_N):
        block = start * tl.cast(stride, tl.int64)
        inside = (start + in_block < high)[:, None] & (channels < HEAD_DIM)[None, :]
        k = tl.load(k_base + block + offsets, mask=inside, other=0.0)
        v = tl.load(v_base + block + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            p = tl.where((start + in_block)[None, :] <= position[:, None], p, 0.0)
            if segment is not None:
                p = tl.where((start + in_block)[None, :] >= segment[:, None], p, 0.0)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def flash_attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    gain_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    starts_ptr,
    queries,
    length,
    num_heads,
    num_kv_heads,
    inverse_sqrt,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of gain * unit q, which is finite at gain 0, for BLOCK_M queries of one head."""
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0).to(tl.int64)
    first = ((blocks - 1 - pid % blocks) * BLOCK_M).to(tl.int32)
    batch, head = pid // blocks // num_heads, pid // blocks % num_heads
    kv_head = head // (num_heads // num_kv_heads)
    in_block, channels = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM)
    position, row_inside = length - queries + first + in_block, first + in_block < queries
    inside = row_inside[:, None] & (channels < HEAD_DIM)[None, :]
    q_base = ((batch * queries + first) * num_heads + head) * HEAD_DIM
    offsets = in_block[:, None] * (num_heads * HEAD_DIM) + channels[None, :]
    per_row = (batch * num_heads + head) * queries + first + in_block
    q = tl.load(q_ptr + q_base + offsets, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + q_base + offsets, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + per_row, mask=row_inside, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + per_row, mask=row_inside, other=0.0)
    scale = tl.abs(tl.load(gain_ptr + head).to(tl.float32)) * inverse_sqrt * LOG2_E
    full = (length - queries + first + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(length, length - queries + first + BLOCK_M)
    kv_base = (batch * length * num_kv_heads + kv_head) * HEAD_DIM
    k_base, v_base, stride = k_ptr + kv_base, v_ptr + kv_base, num_kv_heads * HEAD_DIM
    dq = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    segment = None
    if starts_ptr is None:
        dq = _accumulate_dq(
            dq, q, dy, lse, delta, k_base, v_base, 0, full, position, scale, stride, HEAD_DIM, BLOCK_N, False
        )
    else:
        starts_base = starts_ptr + batch * length + length - queries + first
        segment = tl.load(starts_base + in_block, mask=row_inside, other=0)
        full = tl.load(starts_base) // BLOCK_N * BLOCK_N  # starts do not decrease
    dq = _accumulate_dq(
        dq,
        q,
        dy,
        lse,
        delta,
        k_base,
        v_base,
        full,
        end,
        position,
        scale,
        stride,
        HEAD_DIM,
        BLOCK_N,
        True,
        segment,
    )
    dq = dq * inverse_sqrt
    tl.store(dq_ptr + q_base + offsets, dq.to(dq_ptr.dtype.element_ty), mask=inside)


def launch_flash_attention_bwd_delta(
    dcontext: Tensor,
    context: Tensor,
    along: Tensor | None,
    v: Tensor,
    dy: Tensor,
    delta: Tensor,
    own: Tensor | None,
    y: Tensor | None = None,
    *,
    xsa: bool,
    tile: Tile,
    gate: Tensor | None = None,
    dgate: Tensor | None = None,
    gated: Tensor | None = None,
) -> None:
    """Write delta (B, H, W) float32 from dcontext and context (B, W, H, hd) and v (B, T, KV, hd).

    With xsa, also dy (B, W, H, hd), which may be dcontext itself, and own (B, W, KV, hd) float32, the part of
    dv that XSA adds. along (B, H, W) as saved by the forward; along and own are not touched without xsa, nor
    dy without xsa or gate. With `y` (like context) and xsa, also the attention output before XSA, for another
    library's backward. With gate (B, W, H), dcontext is the gradient of the gated context, which is written
    again to gated, and dgate (B, W, H) float32 is the gate's. All contiguous.
    """
    batch, queries, num_heads, head_dim = context.shape
    rows, (length, num_kv_heads) = batch * queries, v.shape[1:3]
    sizes = (rows, queries, length, num_heads, num_kv_heads)
    flash_attention_bwd_delta_kernel[(triton.cdiv(rows, tile.block_m) * num_kv_heads,)](
        *(
            dcontext,
            context,
            along if xsa else delta,
            v,
            dy,
            delta,
            own if xsa else dy,
            dy if y is None else y,
            *((None,) * 3 if gate is None else (gate, dgate, gated)),
        ),
        *sizes,
        **launch_options(tile, "M", **head_sizes(head_dim), XSA=xsa, WRITE_Y=y is not None),
    )


def launch_flash_attention_bwd_dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    dy: Tensor,
    lse: Tensor,
    delta: Tensor,
    own: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    *,
    tile: Tile,
    ends: Tensor | None = None,
) -> None:
    """Write the gradients of k and v (B, T, KV, hd), summed over each group: dk like k, dv (B * T, KV * hd).

    q, dy (B, W, H, hd), lse and delta (B, H, W); own as from the delta pass, or None without XSA. dv may have
    any row stride; the rest is contiguous. ends (B, T) int32: one past the last position that attends to
    each, not decreasing.
    """
    batch, length, num_kv_heads, head_dim = k.shape
    sizes = (q.shape[1], length, q.shape[2], num_kv_heads, dv.stride(0), head_dim**-0.5)
    flash_attention_bwd_dkdv_kernel[(triton.cdiv(length, tile.block_n) * batch * num_kv_heads,)](
        *(q, k, v, gain, dy, lse, delta, dy if own is None else own, dk, dv, ends),
        *sizes,
        **launch_options(tile, "MN", **head_sizes(head_dim), XSA=own is not None),
    )


def launch_flash_attention_bwd_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gain: Tensor,
    dy: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    *,
    tile: Tile,
    starts: Tensor | None = None,
) -> None:
    """Write the gradient of gain * q to dq (B, W, H, hd); the rest as for `dkdv`. All contiguous.

    starts (B, T) as in `launch_flash_attention_fwd`.
    """
    batch, queries, num_heads, head_dim = q.shape
    sizes = (queries, k.shape[1], num_heads, k.shape[2], head_dim**-0.5)
    flash_attention_bwd_dq_kernel[(triton.cdiv(queries, tile.block_m) * batch * num_heads,)](
        *(q, k, v, gain, dy, lse, delta, dq, starts),
        *sizes,
        **launch_options(tile, "MN", **head_sizes(head_dim)),
    )
