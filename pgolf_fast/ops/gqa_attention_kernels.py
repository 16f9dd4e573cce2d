"""`gqa_attention` on Triton kernels: its forward and backward if `supports` is True.

One launch projects, normalizes and rotates. Attention is ours or a library's (`attention_backend`). The
output projection and dx are cuBLAS products; weight gradients go through `bank_grad.add_matmul`.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.ops import attention_backend, reference, tiles
from pgolf_fast.ops.bank_grad import add_matmul, product
from pgolf_fast.ops.checks import dense
from pgolf_fast.ops.segments import Segments
from pgolf_fast.ops.tiles import Tile

Factors = list[tuple[Tensor, Tensor]]  # weight gradients as left @ right: q, k, v, out; or q|k|v, out
Gradients = tuple[Tensor, Factors, Tensor, Tensor, Tensor]  # dx, factors, dgain, dvalue, dgate


def _rows(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Tile:
    return Tile(block_m, block_n, num_warps=num_warps, num_stages=num_stages)


# Rows named _128 are for heads of more than 64 channels. Not measured. On sm_90, several blocks share a
# multiprocessor if registers allow it: nothing else overlaps with softmax and epilogues. With tiles of
# 128 x 128, only one block of projection (188 registers) or forward (221) fit; for dk and dv it is still one.
tiles.declare("attention_projection", Tile(64, 128, 64, 4, 3), Tile(128, 128, 32, 8, 3), blocks=2)
tiles.declare("flash_attention_fwd", sm90=_rows(128, 64, 8, 3), blocks=2)
tiles.declare("flash_attention_fwd_128", sm90=_rows(128, 64, 8, 2), sm80=_rows(128, 32, 8, 2))
tiles.declare("flash_attention_bwd_dkdv", sm90=_rows(64, 128, 8, 2), sm80=_rows(32, 128, 8, 2))
tiles.declare("flash_attention_bwd_dkdv_128", sm90=_rows(32, 64, 8, 2))
tiles.declare("flash_attention_bwd_dq", sm90=_rows(64, 64, 4, 3), sm80=_rows(128, 32, 8, 2), blocks=3)
tiles.declare("flash_attention_bwd_dq_128", sm90=_rows(64, 64, 4, 2), sm80=_rows(64, 32, 4, 1))
# XSA and norms, forward and backward; bound by memory.
tiles.declare("attention_rows", sm90=Tile(32, num_warps=4))
tiles.declare("attention_rows_128", sm90=Tile(16, num_warps=4))


class Saved(NamedTuple):
    """Tensors saved for backward, as the forward op returns them; W queries (T without a window):

    | field  | shape          | PyTorch                        | kernels                          |
    | q      | (B, W, H, hd)  | RMS-normed heads               | the same, rotated, * sign(gain)  |
    | k      | (B, T, KV, hd) | RMS-normed heads               | the same, rotated                |
    | v      | (B, T, KV, hd) | including the value embedding  | the same                         |
    | q_rstd, k_rstd | q or k with 1 channel  | 1 / rms        | the same                         |
    | y      | (B, W, H, hd)  | attention output before XSA    | after XSA, before the gate       |
    | lse    | (B, H, W)      | natural logsumexp of scores    | the same                         |
    | along  | (B, H, W) if XSA, else (0,) | zeros             | y.u, the part that XSA removed   |

    u is the unit vector of the token's own value. The kernels save y after XSA, because the gradient of the
    output projection needs it; y before XSA is y + along u.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_rstd: Tensor
    k_rstd: Tensor
    y: Tensor
    lse: Tensor
    along: Tensor


class Weights(NamedTuple):
    """The four matrices of a layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


def weights_of(qo_bank: Tensor, kv_bank: Tensor, slot: int) -> Weights:
    """Return the matrices of layer `slot`."""
    layers = qo_bank.shape[0] // 2
    return Weights(qo_bank[slot], kv_bank[slot], kv_bank[layers + slot], qo_bank[layers + slot])


class Call(NamedTuple):
    """Arguments that forward and backward share."""

    x: Tensor
    weights: Weights
    q_gain: Tensor
    cos: Tensor
    sin: Tensor
    xsa: bool
    gate: Tensor | None = None
    segments: Segments | None = None


def supports(x: Tensor, head_dim: int) -> bool:
    """True if the kernels run this call; PyTorch runs wider heads and empty batches."""
    fits = 0 < head_dim <= attention_backend.LARGEST_HEAD_DIM and x.numel() > 0
    return fits and tiles.uses_kernels("gqa_attention", x)


def tile_for(kernel: str, heads: Tensor) -> Tile:
    """Look up the tile for heads (B, T, H, hd); float32 scores fit into registers in small tiles only."""
    wide = heads.shape[-1] > 64
    tile = tiles.lookup(f"{kernel}_128" if wide else kernel, heads)
    if heads.element_size() > 2 and kernel != "attention_rows":
        tile = replace(tile, block_m=16 if wide else 32, block_n=32, num_warps=8, num_stages=1)
    return tile


def _backend(q: Tensor, k: Tensor, segments: Segments | None) -> str:
    return attention_backend.backend(attention_backend.shape_of(q, k, segments))


def _gained(q: Tensor, gain: Tensor) -> Tensor:
    """Return saved q times |gain|, rounded once: the q that a library expects."""
    return torch.mul(q, gain.abs()[:, None], out=torch.empty_like(q))


def forward(call: Call, value_embed: Tensor | None, num_kv_heads: int, queries: int) -> tuple[Tensor, Saved]:
    """Return the output (B, W, D) and the tensors saved for backward; `queries` is W."""
    with tiles.on_device_of(call.x):
        q, k, v, q_rstd, k_rstd = _project(call, value_embed, num_kv_heads, queries)
        context, along, lse, gated = _attend(q, k, v, call)
    out = F.linear(gated.flatten(2), call.weights.out)
    return out, Saved(q, k, v, q_rstd, k_rstd, context, lse, along)


def _project(call: Call, value_embed: Tensor | None, num_kv_heads: int, queries: int) -> tuple[Tensor, ...]:
    from pgolf_fast.kernels.attention_projection import launch_attention_projection

    x, weights, q_gain, cos, sin, *_ = call
    (batch, length, dim), num_heads = x.shape, q_gain.shape[0]
    q = x.new_empty(batch, queries, num_heads, dim // num_heads)
    k = x.new_empty(batch, length, num_kv_heads, dim // num_heads)
    v = torch.empty_like(k)
    q_rstd = x.new_empty(*q.shape[:3], 1, dtype=torch.float32)
    k_rstd = x.new_empty(*k.shape[:3], 1, dtype=torch.float32)
    inputs = (dense(t) for t in (x, *weights[:3], value_embed, q_gain, cos, sin))
    outputs = (q, k, v, q_rstd, k_rstd)
    tile = tiles.lookup("attention_projection", x)
    launch_attention_projection(*inputs, *outputs, eps=reference.RMS_EPS, tile=tile)
    return outputs


def _attend(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the context, y.u, the logsumexp, and the context after the gate."""
    from pgolf_fast.kernels.flash_attention import launch_flash_attention_fwd, launch_xsa_fwd

    xsa, gate, segments = call.xsa, dense(call.gate), call.segments
    context, per_row = torch.empty_like(q), (q.shape[0], q.shape[2], q.shape[1])
    gated = context if gate is None else torch.empty_like(q)
    along = q.new_empty(per_row if xsa else 0, dtype=torch.float32)
    name = _backend(q, k, segments)
    if name == "triton":
        lse, tile = q.new_empty(per_row, dtype=torch.float32), tile_for("flash_attention_fwd", q)
        options = {"gate": gate, "gated": gated, "starts": None if segments is None else segments.starts}
        gain = call.q_gain.contiguous()
        launch_flash_attention_fwd(q, k, v, gain, context, along, lse, xsa=xsa, tile=tile, **options)
        return context, along, lse, gated
    y, lse = attention_backend.forward(name, _gained(q, call.q_gain), k, v, segments)
    y = y.contiguous()
    if xsa:
        launch_xsa_fwd(y, v, context, along, tile=tile_for("attention_rows", q), gate=gate, gated=gated)
    elif gate is None:
        context = gated = y
    else:
        context, gated = y, (y * gate.unsqueeze(-1)).to(y.dtype)
    return context, along, lse.contiguous(), gated


def backward(dout: Tensor, call: Call, s: Saved, has_value_embed: bool) -> Gradients:
    """Return dx, factors of the weight gradients, dgain, and dvalue and dgate (empty without one)."""
    x, weights = call.x, call.weights
    (batch, length, dim), queries = x.shape, s.q.shape[1]
    kv_dim, x_rows, x_tail = weights.k.shape[0], x.reshape(-1, dim), x[:, length - queries :]
    outer = dout.reshape(-1, dim)
    with tiles.on_device_of(x):
        dcontext = (outer @ weights.out).view(s.y.shape)
        if queries == length:  # in one matrix, so that dx is one product
            merged = x.new_empty(batch * length, dim + 2 * kv_dim)
            dq, dk, dv = merged.split((dim, kv_dim, kv_dim), dim=1)
        else:
            merged = x.new_empty(batch * length, 2 * kv_dim)
            dq, (dk, dv) = x.new_empty(batch * queries, dim), merged.split(kv_dim, dim=1)
        dgain, dgate, gated = _attend_backward(dcontext, call, s, dq, dk, dv)
    context = gated.view(-1, dim)
    if queries == length:
        dx, factors = merged @ torch.cat(weights[:3]), [(merged.T, x_rows), (outer.T, context)]
    else:
        dx = merged @ torch.cat(weights[1:3])
        dx.view(x.shape)[:, length - queries :] += (dq @ weights.q).view(batch, queries, dim)
        factors = [(dq.T, x_tail.reshape(-1, dim)), (dk.T, x_rows), (dv.T, x_rows), (outer.T, context)]
    dvalue = x.new_empty(0)
    if has_value_embed:
        dvalue = dv.reshape(batch, length, kv_dim).clone(memory_format=torch.contiguous_format)
    return dx.view(x.shape), factors, dgain, dvalue, dgate


def add_factors(factors: Factors, grad_qo: Tensor, grad_kv: Tensor, slot: int) -> None:
    """Add the products of `factors` to their slots of the gradient banks."""
    layers = grad_qo.shape[0] // 2
    places = [(grad_qo, slot), (grad_kv, slot), (grad_kv, layers + slot), (grad_qo, layers + slot)]
    if len(factors) == 2 and not tiles.uses_kernels("weight_grad", factors[0][0]):
        # x is read once, and 1,024 rows of gradients fill a GPU better than 512 and twice 256
        merged = product(*factors[0]).split([bank.shape[1] for bank, _ in places[:3]])
        for (bank, place), grad in zip(places, merged, strict=False):
            bank[place].add_(grad)
        places, factors = places[3:], factors[1:]
    for (bank, place), (left, right) in zip(places, apart(factors), strict=True):
        add_matmul(bank, place, left, right)


def apart(factors: Factors) -> Factors:
    """Return a pair of factors for each of q, k, v and out, splitting a merged pair."""
    if len(factors) != 2:
        return factors
    (merged, x), out = factors
    dim = out[0].shape[0]
    kv_dim = (merged.shape[0] - dim) // 2
    return [*((rows, x) for rows in merged.split((dim, kv_dim, kv_dim))), out]


def _attend_backward(
    dcontext: Tensor, call: Call, s: Saved, dq: Tensor, dk: Tensor, dv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the projections' gradients to dq, dk and dv (rows may be strided).

    Returns the gradients of gain and gate (empty without one), and the gated context. Overwrites dcontext.
    """
    from pgolf_fast.kernels import flash_attention_backward as kernels
    from pgolf_fast.kernels.attention_projection import launch_rope_norm_bwd

    gain, cos, sin = (t.contiguous() for t in (call.q_gain, call.cos, call.sin))
    tile, xsa, gate, segments = tile_for("attention_rows", s.q), call.xsa, dense(call.gate), call.segments
    dgate = s.lse.new_empty(0 if gate is None else gate.shape)
    gated = s.y if gate is None else torch.empty_like(s.y)
    delta, own = torch.empty_like(s.lse), None
    if xsa:  # in float32: it may cancel most of the rest of dv
        own = s.v.new_empty(*s.q.shape[:2], *s.v.shape[2:], dtype=torch.float32)
    name, dy = _backend(s.q, s.k, segments), dcontext
    y = s.y if name == "triton" or not xsa else torch.empty_like(s.y)  # libraries compute delta from it
    before_xsa = None if y is s.y else y
    rows = (dcontext, s.y, s.along, s.v, dy, delta, own, before_xsa)
    gates = {"gate": gate, "dgate": dgate, "gated": gated}
    kernels.launch_flash_attention_bwd_delta(*rows, xsa=xsa, tile=tile, **gates)
    if name == "triton":
        dq_heads, dk_heads = torch.empty_like(s.q), torch.empty_like(s.k)
        inputs = (s.q, s.k, s.v, gain, dy, s.lse, delta)
        dkdv_tile, dq_tile = (tile_for(f"flash_attention_bwd_{which}", s.q) for which in ("dkdv", "dq"))
        starts, ends = (None, None) if segments is None else segments[:2]
        kernels.launch_flash_attention_bwd_dkdv(*inputs, own, dk_heads, dv, tile=dkdv_tile, ends=ends)
        kernels.launch_flash_attention_bwd_dq(*inputs, dq_heads, tile=dq_tile, starts=starts)
    else:
        heads = (dy, _gained(s.q, gain), s.k, s.v, y, s.lse)
        dq_heads, dk_heads, dv_heads = attention_backend.backward(name, *heads, segments)
        if own is not None:  # rounded like dv, so that the two can cancel
            dv_heads[:, -own.shape[1] :] += own.to(dv_heads.dtype)
        dv.copy_(dv_heads.reshape(dv.shape))
    blocks = -(-s.q.shape[0] * s.q.shape[1] // tile.block_m)
    dgain = s.lse.new_empty(blocks, gain.shape[0])
    launch_rope_norm_bwd(dq_heads.contiguous(), s.q, s.q_rstd, gain, cos, sin, dq, dgain, tile=tile)
    launch_rope_norm_bwd(dk_heads.contiguous(), s.k, s.k_rstd, None, cos, sin, dk, None, tile=tile)
    return dgain.sum(0), dgate, gated
