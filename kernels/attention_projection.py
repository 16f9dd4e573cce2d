"""q, k and v from x in one launch, with RMS norm and RoPE in its epilogue; and the backward of norm and RoPE.

RoPE rotates channel j together with channel j + r / 2, if r channels of a head rotate. Both come out of one
matrix product, and a program can load the weight rows of a head in any order, so partners are loaded into
neighboring columns of the accumulator. One thread holds both (tensor cores hand out columns in pairs):
splitting the tile into its even and odd columns is free, and the rotation costs no second product and no
exchange between threads. Channels that do not rotate are paired too, with angle 0. In memory heads keep their
natural order.

Constants: HEAD_DIM channels per head, padded to PADDED_DIM, a power of two; ROPE_PAIRS = r / 2 pairs rotate;
VECTOR is the longest run of channels that stays contiguous and aligned in this order.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, launch_options
from torch import Tensor


@triton.jit
def _pair_channels(
    pairs, side: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROPE_PAIRS: tl.constexpr
):
    """Columns, within all heads side by side, of the first (side 0) or second members of numbered pairs.

    Pair p of a head is channels (p, p + ROPE_PAIRS) if it rotates, else (p + ROPE_PAIRS, p + PADDED_DIM / 2).
    Also returns which of them exist, because heads are padded.
    """
    head, p = pairs // (PADDED_DIM // 2), pairs % (PADDED_DIM // 2)
    still = p + (1 - side) * ROPE_PAIRS + side * (PADDED_DIM // 2)
    channel = tl.where(p < ROPE_PAIRS, p + side * ROPE_PAIRS, still)
    return head * HEAD_DIM + channel, channel < HEAD_DIM


@triton.jit
def _pair_columns(
    pairs, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROPE_PAIRS: tl.constexpr, VECTOR: tl.constexpr
):
    """Columns of both members of numbered pairs, for loads and stores, and which of them exist."""
    a, a_exists = _pair_channels(pairs, 0, HEAD_DIM, PADDED_DIM, ROPE_PAIRS)
    b, b_exists = _pair_channels(pairs, 1, HEAD_DIM, PADDED_DIM, ROPE_PAIRS)
    # The compiler cannot see through the pairing that runs of VECTOR channels are contiguous and aligned.
    a = tl.max_contiguous(tl.multiple_of(a, VECTOR), VECTOR)
    b = tl.max_contiguous(tl.multiple_of(b, VECTOR), VECTOR)
    return a, a_exists, b, b_exists


@triton.jit
def _cos_sin(cos_ptr, sin_ptr, positions, pairs, inside, PADDED_DIM: tl.constexpr, ROPE_PAIRS: tl.constexpr):
    """Cosines and sines of every pair at every position, 1 and 0 where nothing rotates: [rows, pairs]."""
    p = pairs % (PADDED_DIM // 2)
    offsets = positions[:, None] * ROPE_PAIRS + p[None, :]
    rotates = inside[:, None] & (p < ROPE_PAIRS)[None, :]
    cos = tl.load(cos_ptr + offsets, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + offsets, mask=rotates, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _project(
    x_rows,
    w_ptr,
    first_head,
    row_inside,
    heads,
    dim,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROPE_PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x W^T for some rows and whole heads: first and second members of pairs, [BLOCK_M, BLOCK_N / 2] each."""
    BLOCK_M: tl.constexpr = x_rows.shape[0]
    column, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    even, even_exists = _pair_channels(column // 2, 0, HEAD_DIM, PADDED_DIM, ROPE_PAIRS)
    odd, odd_exists = _pair_channels(column // 2, 1, HEAD_DIM, PADDED_DIM, ROPE_PAIRS)
    w_row = tl.where(column % 2 == 0, even, odd)
    w_inside = tl.where(column % 2 == 0, even_exists, odd_exists)
    w_inside &= first_head + column // PADDED_DIM < heads
    x_ptrs = x_rows + ks[None, :]
    w_ptrs = w_ptr + first_head.to(tl.int64) * HEAD_DIM * dim + w_row[None, :] * dim + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, dim, BLOCK_K):
        k_inside = start + ks < dim
        x = tl.load(x_ptrs + start, mask=row_inside[:, None] & k_inside[None, :], other=0.0)
        w = tl.load(w_ptrs + start, mask=k_inside[:, None] & w_inside[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))


@triton.jit
def _head_rstd(a, b, eps, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """1 / RMS of every head, [BLOCK_M, heads], and the same repeated for its pairs, like `a` and `b`."""
    BLOCK_M: tl.constexpr = a.shape[0]
    PAIRS: tl.constexpr = PADDED_DIM // 2
    HEADS: tl.constexpr = a.shape[1] // PAIRS
    squares = tl.reshape(a * a + b * b, (BLOCK_M, HEADS, PAIRS))
    rstd = tl.rsqrt(tl.sum(squares, axis=2) / HEAD_DIM + eps)
    spread = tl.broadcast_to(rstd[:, :, None], (BLOCK_M, HEADS, PAIRS))
    return rstd, tl.reshape(spread, (BLOCK_M, HEADS * PAIRS))


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
    PADDED_DIM: tl.constexpr,
    ROPE_PAIRS: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of BLOCK_M rows (batch * length) and BLOCK_N / PADDED_DIM whole heads of q, k or v.

    q and k heads are divided by their RMS and rotated, and 1 / RMS is stored; q heads also take the sign of
    their gain. The value embedding is added to v. Only the last `queries` positions of q are computed.
    """
    HEADS: tl.constexpr = BLOCK_N // PADDED_DIM
    q_tiles, kv_tiles = tl.cdiv(num_heads, HEADS), tl.cdiv(num_kv_heads, HEADS)
    tiles = q_tiles + 2 * kv_tiles
    pid = tl.program_id(0).to(tl.int64)
    tile, first_row = pid % tiles, pid // tiles * BLOCK_M  # neighboring programs share rows of x in L2
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
    in_tile, pairs = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N // 2)
    row_inside = first_row + in_tile < rows
    x_rows = x_ptr + first_row * dim + in_tile[:, None] * dim
    a, b = _project(
        x_rows, w_ptr, first_head, row_inside, heads, dim, HEAD_DIM, PADDED_DIM, ROPE_PAIRS, BLOCK_N, BLOCK_K
    )
    a_column, a_exists, b_column, b_exists = _pair_columns(pairs, HEAD_DIM, PADDED_DIM, ROPE_PAIRS, VECTOR)
    head_inside = first_head + pairs // (PADDED_DIM // 2) < heads
    a_exists, b_exists = a_exists & head_inside, b_exists & head_inside
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
        rstd, spread = _head_rstd(a, b, eps, HEAD_DIM, PADDED_DIM)
        if is_q:
            # The gain scales its head's softmax. Its sign goes into q, so that the scale is not negative.
            gain = tl.load(gain_ptr + first_head + pairs // (PADDED_DIM // 2), mask=head_inside, other=1.0)
            spread = spread * tl.where(gain.to(tl.float32) < 0, -1.0, 1.0)[None, :]
        a, b = a * spread, b * spread
        if ROPE_PAIRS > 0:
            cos, sin = _cos_sin(cos_ptr, sin_ptr, position, pairs, row_inside, PADDED_DIM, ROPE_PAIRS)
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
def rope_norm_bwd_kernel(
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
    PADDED_DIM: tl.constexpr,
    ROPE_PAIRS: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Backward of norm, RoPE and gain for BLOCK_M rows of one head: the gradient of the projection.

    u: the unit head; R u: its rotation, saved as `unit`; d: the gradient of gain * R u, [rows, HEAD_DIM].
    dgain = d . R u;  du = gain R^T d;  dprojection = rstd (du - u mean(du * u)), where du . u = gain d . R u.
    """
    pid = tl.program_id(0).to(tl.int64)
    head, block = (pid % heads).to(tl.int32), pid // heads
    in_tile, pairs = tl.arange(0, BLOCK_M), tl.arange(0, PADDED_DIM // 2)
    row = block * BLOCK_M + in_tile
    inside = row < rows
    a_channel, a_exists, b_channel, b_exists = _pair_columns(pairs, HEAD_DIM, PADDED_DIM, ROPE_PAIRS, VECTOR)
    a_mask, b_mask = inside[:, None] & a_exists[None, :], inside[:, None] & b_exists[None, :]
    offsets = ((row * heads + head) * HEAD_DIM)[:, None]
    da = tl.load(grad_ptr + offsets + a_channel[None, :], mask=a_mask, other=0.0).to(tl.float32)
    db = tl.load(grad_ptr + offsets + b_channel[None, :], mask=b_mask, other=0.0).to(tl.float32)
    a = tl.load(unit_ptr + offsets + a_channel[None, :], mask=a_mask, other=0.0).to(tl.float32)
    b = tl.load(unit_ptr + offsets + b_channel[None, :], mask=b_mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row * heads + head, mask=inside, other=0.0)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + head).to(tl.float32)
        sign = tl.where(gain < 0, -1.0, 1.0)  # q was saved with its gain's sign
        a, b = a * sign, b * sign
    along = tl.sum(da * a + db * b, axis=1)  # d . R u
    if HAS_GAIN:
        tl.store(dgain_ptr + pid, tl.sum(along, axis=0))  # [blocks, heads]
        da, db, along = da * gain, db * gain, along * gain
    if ROPE_PAIRS > 0:
        position = (row % queries + (length - queries)).to(tl.int32)
        cos, sin = _cos_sin(cos_ptr, sin_ptr, position, pairs, inside, PADDED_DIM, ROPE_PAIRS)
        da, db = da * cos - db * sin, da * sin + db * cos
        shrink = cos * cos + sin * sin  # not exactly 1: the tables may be rounded to bfloat16
        shrink = tl.where(shrink > 0, 1 / shrink, 0.0)
        a, b = (a * cos - b * sin) * shrink, (a * sin + b * cos) * shrink
    mean = (along / HEAD_DIM)[:, None]
    da, db = rstd[:, None] * (da - a * mean), rstd[:, None] * (db - b * mean)
    out = (row * out_stride)[:, None] + head * HEAD_DIM
    tl.store(out_ptr + out + a_channel[None, :], da.to(out_ptr.dtype.element_ty), mask=a_mask)
    tl.store(out_ptr + out + b_channel[None, :], db.to(out_ptr.dtype.element_ty), mask=b_mask)


def padded_head_dim(head_dim: int) -> int:
    """Return the channels of a head in a tile: the next power of two, at least 16 for tensor cores."""
    return max(16, triton.next_power_of_2(head_dim))


def head_sizes(head_dim: int) -> dict[str, int]:
    """Return the channels of a head, and in a tile, as constants of a launch."""
    return {"HEAD_DIM": head_dim, "PADDED_DIM": padded_head_dim(head_dim)}


def _head_constants(head_dim: int, rope_pairs: int) -> dict[str, int]:
    padded, vector = padded_head_dim(head_dim), 8
    while head_dim % vector or rope_pairs % vector or (padded // 2 - rope_pairs) % vector:
        vector //= 2
    return {**head_sizes(head_dim), "ROPE_PAIRS": rope_pairs, "VECTOR": vector}


def launch_attention_projection(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    value_embed: Tensor | None,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    *,
    eps: float,
    tile: Tile,
) -> None:
    """Project x (B, T, D) by wq (H * hd, D), wk, wv (KV * hd, D) to q (B, W, H, hd), k and v (B, T, KV, hd).

    q holds the last W positions: rotated unit heads times the sign of their gain. k: rotated unit heads.
    q_rstd (B, W, H, 1) and k_rstd (B, T, KV, 1) float32: 1 / RMS. value_embed (B, T, KV * hd) or None;
    gain (H,); cos, sin (T, r / 2). All contiguous.
    """
    (batch, length, dim), (queries, num_heads, head_dim) = x.shape, q.shape[1:]
    num_kv_heads, padded = k.shape[2], padded_head_dim(head_dim)
    block_n = max(tile.block_n, padded)
    tiles = triton.cdiv(num_heads, block_n // padded) + 2 * triton.cdiv(num_kv_heads, block_n // padded)
    rows, value = batch * length, v if value_embed is None else value_embed
    sizes = (rows, length, queries, dim, num_heads, num_kv_heads, eps)
    constants = {**_head_constants(head_dim, cos.shape[1]), "HAS_VALUE": value_embed is not None}
    attention_projection_kernel[(triton.cdiv(rows, tile.block_m) * tiles,)](
        *(x, wq, wk, wv, value, gain, cos, sin, q, k, v, q_rstd, k_rstd),
        *sizes,
        **launch_options(tile, "MK", BLOCK_N=block_n, **constants),
    )


def launch_rope_norm_bwd(
    grad: Tensor,
    unit: Tensor,
    rstd: Tensor,
    gain: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    dgain: Tensor | None,
    *,
    tile: Tile,
) -> None:
    """Write the gradient of the projection to out (B * W, heads * hd).

    grad (B, W, heads, hd) is the gradient of the rotated heads, unit these heads as the forward saved them;
    rstd (B, W, heads, 1). With `gain` (heads,), grad is that of gain * unit, and dgain (blocks, heads)
    receives sums over blocks of tile.block_m rows. cos, sin (T, r / 2): the rows are the last W positions.
    `out` may have any row stride; the rest is contiguous.
    """
    (batch, queries, heads, head_dim), (length, rope_pairs) = grad.shape, cos.shape
    rows, has_gain = batch * queries, gain is not None
    sizes = (rows, length, queries, heads, out.stride(0))
    constants = {**_head_constants(head_dim, rope_pairs), "HAS_GAIN": has_gain}
    rope_norm_bwd_kernel[(triton.cdiv(rows, tile.block_m) * heads,)](
        *(grad, unit, rstd, gain if has_gain else rstd, cos, sin, out, dgain if has_gain else rstd),
        *sizes,
        **launch_options(tile, "M", **constants),
    )
