"""Projections of attention: q, k, v from x in one launch, RMS-normed and rotated in its epilogue; and back.

RoPE turns channel j together with channel j + HALF. Both come out of one matrix product, and a program can
load the weight rows of a head in any order: they are loaded so that partners stand in neighboring columns of
the accumulator. One thread holds both (tensor cores hand out columns in pairs), so that splitting the tile in
its even and odd columns is free, and rotation costs no second product and no exchange. Channels that do not
turn are paired too, with the angle 0. In memory heads stand in their natural order.
"""

import triton
import triton.language as tl


@triton.jit
def _pair_channels(pairs, side: tl.constexpr, HEAD_DIM: tl.constexpr, HD: tl.constexpr, HALF: tl.constexpr):
    """Columns, within all heads side by side, of the first (side 0) or second members of numbered pairs.

    Pair p of a head is channels (p, p + HALF) where p turns, and (p + HALF, p + HD / 2) where it does not.
    Also says which of them exist: heads are padded from HEAD_DIM to HD channels, a power of two.
    """
    head, p = pairs // (HD // 2), pairs % (HD // 2)
    channel = tl.where(p < HALF, p + side * HALF, p + (1 - side) * HALF + side * (HD // 2))
    return head * HEAD_DIM + channel, channel < HEAD_DIM


@triton.jit
def _cos_sin(cos_ptr, sin_ptr, positions, pairs, inside, HD: tl.constexpr, HALF: tl.constexpr):
    """Cosines and sines of every pair at every position, 1 and 0 where nothing turns: [rows, pairs]."""
    p = pairs % (HD // 2)
    offsets = positions[:, None] * HALF + p[None, :]
    turning = inside[:, None] & (p < HALF)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=turning, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=turning, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def attention_projection_kernel(
    x_ptr,
    wq_ptr,
    wk_ptr,
    wv_ptr,
    value_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    q_rstd_ptr,
    k_rstd_ptr,
    rows,
    length,
    queries,
    dim,
    num_heads,
    num_kv_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    HD: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    HEADS: tl.constexpr = BLOCK_N // HD  # whole heads a tile
    q_tiles, kv_tiles = tl.cdiv(num_heads, HEADS), tl.cdiv(num_kv_heads, HEADS)
    tiles = q_tiles + 2 * kv_tiles
    pid = tl.program_id(0).to(tl.int64)
    tile, first_row = pid % tiles, pid // tiles * BLOCK_M  # tiles of the same rows of x run side by side
    is_q, is_v = tile < q_tiles, tile >= q_tiles + kv_tiles
    if is_q and first_row % length + BLOCK_M <= length - queries:
        return  # no row here is a query
    heads = tl.where(is_q, num_heads, num_kv_heads)
    tile_of_kind = tl.where(is_q, tile, tl.where(is_v, tile - q_tiles - kv_tiles, tile - q_tiles))
    first_head = (tile_of_kind * HEADS).to(tl.int32)
    if is_q:
        w_ptr = wq_ptr
    elif is_v:
        w_ptr = wv_ptr
    else:
        w_ptr = wk_ptr

    in_tile = tl.arange(0, BLOCK_M)
    row_inside = first_row + in_tile < rows
    column, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    pair = column // 2
    even, even_exists = _pair_channels(pair, 0, HEAD_DIM, HD, HALF)
    odd, odd_exists = _pair_channels(pair, 1, HEAD_DIM, HD, HALF)
    w_row = tl.where(column % 2 == 0, even, odd)
    w_inside = tl.where(column % 2 == 0, even_exists, odd_exists) & (first_head + column // HD < heads)
    x_ptrs = x_ptr + first_row * dim + in_tile[:, None] * dim + ks[None, :]
    w_ptrs = w_ptr + first_head.to(tl.int64) * HEAD_DIM * dim + w_row[None, :] * dim + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        k_inside = start + ks < dim
        x = tl.load(x_ptrs + start, mask=row_inside[:, None] & k_inside[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=k_inside[:, None] & w_inside[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")

    a, b = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))  # [BLOCK_M, BLOCK_N / 2] each
    pairs = tl.arange(0, BLOCK_N // 2)
    head_inside = first_head + pairs // (HD // 2) < heads
    a_column, a_exists = _pair_channels(pairs, 0, HEAD_DIM, HD, HALF)
    b_column, b_exists = _pair_channels(pairs, 1, HEAD_DIM, HD, HALF)
    a_exists, b_exists = a_exists & head_inside, b_exists & head_inside
    # runs of RUN channels are contiguous and aligned, which the compiler cannot see through the pairing
    a_column = tl.max_contiguous(tl.multiple_of(a_column, RUN), RUN)
    b_column = tl.max_contiguous(tl.multiple_of(b_column, RUN), RUN)
    row = first_row + in_tile
    position = (row % length).to(tl.int32)

    if is_v:
        base = (first_row * num_kv_heads + first_head) * HEAD_DIM
        offsets = base + in_tile[:, None] * (num_kv_heads * HEAD_DIM)
        a_offsets, b_offsets = offsets + a_column[None, :], offsets + b_column[None, :]
        a_mask, b_mask = row_inside[:, None] & a_exists[None, :], row_inside[:, None] & b_exists[None, :]
        if HAS_VALUE:
            a += tl.load(value_ptr + a_offsets, mask=a_mask, other=0.0).to(tl.float32)
            b += tl.load(value_ptr + b_offsets, mask=b_mask, other=0.0).to(tl.float32)
        tl.store(v_ptr + a_offsets, a.to(v_ptr.dtype.element_ty), mask=a_mask)
        tl.store(v_ptr + b_offsets, b.to(v_ptr.dtype.element_ty), mask=b_mask)
    else:
        squares = tl.reshape(a * a + b * b, (BLOCK_M, HEADS, HD // 2))
        rstd = tl.rsqrt(tl.sum(squares, axis=2) / HEAD_DIM + eps)  # [BLOCK_M, HEADS]
        spread = tl.broadcast_to(rstd[:, :, None], (BLOCK_M, HEADS, HD // 2))
        spread = tl.reshape(spread, (BLOCK_M, BLOCK_N // 2))
        if is_q:
            # a gain scales the softmax of its head; its sign goes into q, and the scale is never negative
            gain = tl.load(gain_ptr + first_head + pairs // (HD // 2), mask=head_inside, other=1.0)
            spread = spread * tl.where(gain.to(tl.float32) < 0, -1.0, 1.0)[None, :]
        a, b = a * spread, b * spread
        if HALF > 0:
            cos, sin = _cos_sin(cos_ptr, sin_ptr, position, pairs, row_inside, HD, HALF)
            a, b = a * cos + b * sin, b * cos - a * sin
        if is_q:
            out_ptr, rstd_ptr = q_ptr, q_rstd_ptr
            out_row = row // length * queries + position - (length - queries)
            inside = row_inside & (position >= length - queries)
        else:
            out_ptr, rstd_ptr = k_ptr, k_rstd_ptr
            out_row, inside = row, row_inside
        offsets = ((out_row * heads + first_head) * HEAD_DIM)[:, None]
        a_mask, b_mask = inside[:, None] & a_exists[None, :], inside[:, None] & b_exists[None, :]
        tl.store(out_ptr + offsets + a_column[None, :], a.to(q_ptr.dtype.element_ty), mask=a_mask)
        tl.store(out_ptr + offsets + b_column[None, :], b.to(q_ptr.dtype.element_ty), mask=b_mask)
        head = first_head + tl.arange(0, HEADS)
        rstd_mask = inside[:, None] & (head < heads)[None, :]
        tl.store(rstd_ptr + (out_row * heads)[:, None] + head[None, :], rstd, mask=rstd_mask)


@triton.jit
def attention_turn_back_kernel(
    grad_ptr,
    unit_ptr,
    rstd_ptr,
    gain_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    dgain_ptr,
    rows,
    length,
    queries,
    heads,
    out_stride,
    HEAD_DIM: tl.constexpr,
    HD: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """With u the unit head, R its rotation, d the gradient of gain * R u:
    dgain = d . R u;  du = gain R^T d;  dprojection = rstd (du - u mean(du * u)), where du . u = gain d . R u.
    """
    pid = tl.program_id(0).to(tl.int64)
    head, block = (pid % heads).to(tl.int32), pid // heads
    in_tile, pairs = tl.arange(0, BLOCK_M), tl.arange(0, HD // 2)
    row = block * BLOCK_M + in_tile
    inside = row < rows
    a_channel, a_exists = _pair_channels(pairs, 0, HEAD_DIM, HD, HALF)
    b_channel, b_exists = _pair_channels(pairs, 1, HEAD_DIM, HD, HALF)
    a_channel = tl.max_contiguous(tl.multiple_of(a_channel, RUN), RUN)
    b_channel = tl.max_contiguous(tl.multiple_of(b_channel, RUN), RUN)
    a_mask, b_mask = inside[:, None] & a_exists[None, :], inside[:, None] & b_exists[None, :]
    offsets = ((row * heads + head) * HEAD_DIM)[:, None]
    da = tl.load(grad_ptr + offsets + a_channel[None, :], mask=a_mask, other=0.0).to(tl.float32)
    db = tl.load(grad_ptr + offsets + b_channel[None, :], mask=b_mask, other=0.0).to(tl.float32)
    a = tl.load(unit_ptr + offsets + a_channel[None, :], mask=a_mask, other=0.0).to(tl.float32)
    b = tl.load(unit_ptr + offsets + b_channel[None, :], mask=b_mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row * heads + head, mask=inside, other=0.0)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + head).to(tl.float32)
        sign = tl.where(gain < 0, -1.0, 1.0)  # q is saved with its gain's sign
        a, b = a * sign, b * sign
    along = tl.sum(da * a + db * b, axis=1)  # d . R u
    if HAS_GAIN:
        tl.store(dgain_ptr + pid, tl.sum(along, axis=0))  # [blocks, heads]
        da, db, along = da * gain, db * gain, along * gain
    if HALF > 0:
        position = (row % queries + (length - queries)).to(tl.int32)
        cos, sin = _cos_sin(cos_ptr, sin_ptr, position, pairs, inside, HD, HALF)
        da, db = da * cos - db * sin, da * sin + db * cos
        shrink = cos * cos + sin * sin  # not quite 1 where the tables are rounded to bfloat16
        shrink = tl.where(shrink > 0, 1 / shrink, 0.0)
        a, b = (a * cos - b * sin) * shrink, (a * sin + b * cos) * shrink
    mean = (along / HEAD_DIM)[:, None]
    da, db = rstd[:, None] * (da - a * mean), rstd[:, None] * (db - b * mean)
    out = (row * out_stride)[:, None] + head * HEAD_DIM
    tl.store(out_ptr + out + a_channel[None, :], da.to(out_ptr.dtype.element_ty), mask=a_mask)
    tl.store(out_ptr + out + b_channel[None, :], db.to(out_ptr.dtype.element_ty), mask=b_mask)


def padded_head_dim(head_dim):
    """Channels of a head in a tile: the next power of two, at least 16 for tensor cores."""
    return max(16, triton.next_power_of_2(head_dim))


def _run_length(head_dim, half):
    """The longest power of two (at most 8) of channels that pairing keeps contiguous and aligned."""
    rest = padded_head_dim(head_dim) // 2 - half
    run = 8
    while head_dim % run or half % run or rest % run:
        run //= 2
    return run


def launch_attention_projection(
    x, wq, wk, wv, value_embed, gain, cos, sin, q, k, v, q_rstd, k_rstd, *, eps, launch
):
    """x (B, T, D) and weights (H*hd, D), (KV*hd, D) twice -> q (B, W, H, hd), k and v (B, T, KV, hd).

    q holds the last W positions: rotated unit heads times the sign of their gain. k: rotated unit heads.
    q_rstd (B, W, H, 1) and k_rstd (B, T, KV, 1) float32: 1 / rms. value_embed (B, T, KV*hd) or None;
    gain (H,); cos, sin (T, r/2). All contiguous.
    """
    batch, length, dim = x.shape
    num_heads, head_dim = q.shape[2:]
    num_kv_heads, half = k.shape[2], cos.shape[1]
    hd = padded_head_dim(head_dim)
    block_n = max(launch.block_n, hd)
    tiles = triton.cdiv(num_heads, block_n // hd) + 2 * triton.cdiv(num_kv_heads, block_n // hd)
    rows = batch * length
    attention_projection_kernel[(triton.cdiv(rows, launch.block_m) * tiles,)](
        x,
        wq,
        wk,
        wv,
        v if value_embed is None else value_embed,
        gain,
        cos,
        sin,
        q,
        k,
        v,
        q_rstd,
        k_rstd,
        rows,
        length,
        q.shape[1],
        dim,
        num_heads,
        num_kv_heads,
        eps,
        HEAD_DIM=head_dim,
        HD=hd,
        HALF=half,
        RUN=_run_length(head_dim, half),
        HAS_VALUE=value_embed is not None,
        BLOCK_M=launch.block_m,
        BLOCK_N=block_n,
        BLOCK_K=launch.block_k,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def launch_attention_turn_back(grad, unit, rstd, gain, cos, sin, out, dgain, *, launch):
    """Gradient of rotated heads (B, W, heads, hd) -> gradient of their projection, out (B * W, heads * hd).

    The rows of `out` may lie apart; the rest is contiguous. unit as saved by the forward launch; rstd
    (B, W, heads, 1). With `gain` (heads,), grad is that of gain * unit, and dgain (blocks, heads) receives
    sums over blocks of launch.block_m rows. cos, sin (T, r/2): rows stand for the last W positions of T.
    """
    batch, queries, heads, head_dim = grad.shape
    rows, half = batch * queries, cos.shape[1]
    attention_turn_back_kernel[(triton.cdiv(rows, launch.block_m) * heads,)](
        grad,
        unit,
        rstd,
        rstd if gain is None else gain,
        cos,
        sin,
        out,
        rstd if dgain is None else dgain,
        rows,
        cos.shape[0],
        queries,
        heads,
        out.stride(0),
        HEAD_DIM=head_dim,
        HD=padded_head_dim(head_dim),
        HALF=half,
        RUN=_run_length(head_dim, half),
        HAS_GAIN=gain is not None,
        BLOCK_M=launch.block_m,
        num_warps=launch.num_warps,
    )
