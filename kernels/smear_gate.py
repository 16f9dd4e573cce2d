"""SmearGate: each position mixed with the previous one in its sequence.

Row n of the flattened (B, T, D) input is position n % T of sequence n // T.
"""

import triton
import triton.language as tl
from pgolf_fast.kernels._common import Tile, column_block, launch_options, store_tile
from torch import Tensor


@triton.jit
def smear_gate_fwd_kernel(
    x_ptr,
    gate_ptr,
    out_ptr,
    batch_stride,
    time_stride,
    rows,
    length,
    width,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of out_t = (1 - s) x_t + s x_{t-1} with s = sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, time = row // length, row % length
    mask = (row < rows)[:, None] & (column < width)[None, :]
    before = mask & (time > 0)[:, None]
    address = x_ptr + (batch * batch_stride + time * time_stride)[:, None] + column[None, :]
    s = tl.sigmoid(tl.load(gate_ptr + column, mask=column < width, other=0.0).to(tl.float32))[None, :]
    x = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    previous = tl.load(address - time_stride, mask=before, other=0.0).to(tl.float32)
    out = (1 - s) * x + s * previous
    store_tile(out_ptr, row, width, column, out, mask)


@triton.jit
def smear_gate_bwd_kernel(
    dout_ptr,
    x_ptr,
    gate_ptr,
    dx_ptr,
    partial_ptr,
    dout_batch_stride,
    dout_time_stride,
    batch_stride,
    time_stride,
    rows,
    length,
    width,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`tiles` tiles of rows in sequence, with the gate's gradient summed in registers."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    s = tl.sigmoid(tl.load(gate_ptr + column, mask=inside, other=0.0).to(tl.float32))
    dgate = tl.zeros((BLOCK_N,), tl.float32)
    for tile in range(tiles):
        row = (program * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        batch, time = row // length, row % length
        mask = (row < rows)[:, None] & inside[None, :]
        before, after = mask & (time > 0)[:, None], mask & (time + 1 < length)[:, None]
        address = x_ptr + (batch * batch_stride + time * time_stride)[:, None] + column[None, :]
        x = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        previous = tl.load(address - time_stride, mask=before, other=0.0).to(tl.float32)
        address = dout_ptr + (batch * dout_batch_stride + time * dout_time_stride)[:, None] + column[None, :]
        dout = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        following = tl.load(address + dout_time_stride, mask=after, other=0.0).to(tl.float32)
        # x_t enters position t with weight 1 - s and position t + 1 with weight s
        dx = (1 - s)[None, :] * dout + s[None, :] * following
        store_tile(dx_ptr, row, width, column, dx, mask)
        dgate += tl.sum(dout * (previous - x), 0)
    tl.store(partial_ptr + program * width + column, dgate * s * (1 - s), mask=inside)


def launch_smear_gate_fwd(x: Tensor, gate: Tensor, out: Tensor, tile: Tile) -> None:
    """Write out (B, T, D) from x (B, T, D) with unit inner stride and gate (D,)."""
    batch, length, width = x.shape
    columns = column_block(width, tile)
    grid = (triton.cdiv(batch * length, tile.block_m), triton.cdiv(width, columns))
    sizes = (*x.stride()[:2], batch * length, length, width)
    smear_gate_fwd_kernel[grid](x, gate, out, *sizes, **launch_options(tile, "M", BLOCK_N=columns))


def launch_smear_gate_bwd(
    dout: Tensor, x: Tensor, gate: Tensor, dx: Tensor, partial: Tensor, tile: Tile
) -> None:
    """Write dx (B, T, D) and partial (programs, D), which sums to dgate; dout, x have unit inner stride."""
    batch, length, width = x.shape
    columns = column_block(width, tile)
    tiles = triton.cdiv(triton.cdiv(batch * length, tile.block_m), partial.shape[0])
    sizes = (*dout.stride()[:2], *x.stride()[:2], batch * length, length, width, tiles)
    smear_gate_bwd_kernel[(partial.shape[0], triton.cdiv(width, columns))](
        dout, x, gate, dx, partial, *sizes, **launch_options(tile, "M", BLOCK_N=columns)
    )
