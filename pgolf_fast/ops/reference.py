"""Definitions of the ops in plain PyTorch, against which every other implementation is judged.

Each is the bare formula, differentiable by autograd, accumulating in at least float32 (float64 stays
float64). Sources: PR 1501 for the network, Keller Jordan's Muon for `newton_schulz`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = torch.finfo(torch.float32).eps  # eps of F.rms_norm(eps=None) on float32 statistics
XSA_EPS = 1e-12
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# The same of each of five steps in turn: Polar Express (Amsel et al. 2025), as PR 1855 used it
POLAR_EXPRESS = (
    *(8.156554524902461, -22.48329292557795, 15.878769915207462),
    *(4.042929935166739, -2.808917465908714, 0.5000178451051316),
    *(3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    *(3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    *(2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Multipliers of the current and the two previous tokens in the hash n-gram key (PR 1501).
HASH_CURRENT, HASH_PREVIOUS, HASH_BEFORE = 36313, 27191, 51497


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, eps: float = RMS_EPS) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension, without a gain."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def residual_norm(
    x: Tensor, branch: Tensor, x_scale: Tensor | None, branch_scale: Tensor, layer_scale: float
) -> tuple[Tensor, Tensor]:
    """Return mixed = x_scale * x + branch_scale * branch, and layer_scale * rms_norm(mixed)."""
    scaled_x = _wide(x) if x_scale is None else _wide(x) * _wide(x_scale)
    mixed = (scaled_x + _wide(branch) * _wide(branch_scale)).to(x.dtype)
    return mixed, (layer_scale * _wide(rms_norm(_wide(mixed)))).to(x.dtype)


def smear_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Return (1 - s) x_t + s x_{t-1} with s = sigmoid(gate) per channel and x_{-1} = 0; x is (B, T, D)."""
    s = torch.sigmoid(_wide(gate))
    previous = F.pad(_wide(x)[:, :-1], (0, 0, 1, 0))
    return ((1 - s) * _wide(x) + s * previous).to(x.dtype)


def activation(pre: Tensor, kind: str) -> Tensor:
    """Return the MLP's hidden layer from its up-projection; `swiglu` halves the last dimension.

    Rows of a `swiglu` up-projection alternate: row 2j gates hidden channel j, row 2j+1 carries it.
    """
    wide = _wide(pre)
    if kind == "leaky_relu_squared":
        hidden = F.leaky_relu(wide, 0.5).square()
    elif kind == "relu_squared":
        hidden = F.relu(wide).square()
    elif kind == "swiglu":
        hidden = F.silu(wide[..., 0::2]) * wide[..., 1::2]
    else:
        why = f"pgolf::mlp: activation is {kind!r}; use leaky_relu_squared, relu_squared or swiglu"
        raise ValueError(why)
    return hidden.to(pre.dtype)


def mlp(x: Tensor, up_bank: Tensor, down_bank: Tensor, slot: int, kind: str) -> Tensor:
    """Return act(x W_up^T) W_down^T with W_up = up_bank[slot], W_down = down_bank[slot]."""
    return activation(x @ up_bank[slot].T, kind) @ down_bank[slot].T


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply partial RoPE, half-split: x (B, T, H, hd); cos and sin (T, r/2) rotate the first r channels."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def exclusive(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its component along the token's own value (XSA).

    y (B, T, H, hd), v (B, T, KV, hd); query head h belongs to KV head h // (H / KV).
    """
    groups = _wide(y).unflatten(2, (v.shape[2], -1))
    unit = F.normalize(_wide(v), dim=-1, eps=XSA_EPS).unsqueeze(3)
    return (groups - (groups * unit).sum(-1, keepdim=True) * unit).flatten(2, 3).to(y.dtype)


def causal(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return causal attention of the last W of T positions; q (B, W, H, hd), k and v (B, T, KV, hd).

    With boundaries `cu_seqlens` among the B * T positions, each attends only to its own segment.
    """
    first, groups = k.shape[1] - q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, *(t.repeat_interleave(groups, 2) for t in (k, v))))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + first)
    if cu_seqlens is not None:
        flat = torch.arange(k.shape[0] * k.shape[2], device=q.device)
        segment = torch.searchsorted(cu_seqlens.long().contiguous(), flat, right=True)
        segment = segment.view(k.shape[0], 1, k.shape[2])
        future = future | (segment[..., first:, None] != segment[:, :, None])
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def projected_attention(
    q: Tensor, k, v, q_gain, cos, sin, num_kv_heads: int, xsa, gate=None, *, inner=causal, dtype=None
) -> Tensor:
    """Return `ops.projected_attention`; normalized heads are rotated in `dtype` and given to `inner`."""
    wide, first = dtype or torch.promote_types(q.dtype, torch.float32), k.shape[1] - q.shape[1]
    q = rms_norm(q.unflatten(-1, (len(q_gain), -1)))
    k, v = (t.unflatten(-1, (num_kv_heads, -1)) for t in (k, v))
    queries = rotate(q.to(wide), cos[first:], sin[first:]) * q_gain.to(wide)[:, None]
    y = inner(queries, rotate(rms_norm(k).to(wide), cos, sin), v).to(q.dtype)
    y = exclusive(y, v[:, first:]) if xsa else y
    return (y if gate is None else (_wide(y) * _wide(gate).unsqueeze(-1)).to(y.dtype)).flatten(2)


def gqa_attention(
    x: Tensor,
    qo_bank: Tensor,
    kv_bank: Tensor,
    q_gain: Tensor,
    value_embed: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    slot: int,
    num_kv_heads: int,
    xsa: bool,
    gate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return causal attention (B, T, D) of one block from x (B, T, D), as `ops.gqa_attention` defines it."""
    layers = qo_bank.shape[0] // 2
    q, k, v = (x @ weight.T for weight in (qo_bank[slot], kv_bank[slot], kv_bank[layers + slot]))
    q, k, v = (_wide(t) for t in (q, k, v if value_embed is None else v + value_embed))
    settings = {"gate": gate, "inner": lambda q, k, v: causal(q, k, v, cu_seqlens)}
    context = projected_attention(q, k, v, q_gain, cos, sin, num_kv_heads, xsa, **settings)
    return context.to(x.dtype) @ qo_bank[layers + slot].T


def ngram_rows(
    tokens: Tensor, num_rows: int, has_leading_space: Tensor | None, trigram: bool
) -> tuple[Tensor, Tensor | None]:
    """Return table rows of the bigram and trigram (or None) ending at each token; tokens (B, T) integers.

    The key is the XOR of products of the last tokens, in int64 and never negative (ids are below 2^31).
    Row num_rows - 1 means "no n-gram here". With `has_leading_space` (vocab,), the other rows are split into
    two halves of (num_rows - 1) // 2: the first for word starts, the second for other tokens.
    """
    usable = num_rows - 1
    current = tokens.long()
    previous, before = F.pad(current, (1, 0))[:, :-1], F.pad(current, (2, 0))[:, :-2]
    bigram_key = (HASH_CURRENT * current) ^ (HASH_PREVIOUS * previous)
    keys = [bigram_key, bigram_key ^ (HASH_BEFORE * before)] if trigram else [bigram_key]
    rows = []
    for order, key in enumerate(keys, start=1):
        if has_leading_space is None:
            row = key % usable
        else:
            row = key % (usable // 2) + torch.where(has_leading_space[current], 0, usable // 2)
        row[:, :order] = usable
        rows.append(row)
    return rows[0], rows[1] if trigram else None


def ngram_hash_embed(
    tokens: Tensor,
    table: Tensor,
    has_leading_space: Tensor | None,
    scale: Tensor,
    boost: Tensor,
    pos_conditional: bool,
    trigram: bool,
) -> Tensor:
    """Return scale * gate * (table[bigram row] [+ table[trigram row]]), gate = boost at word starts."""
    split = has_leading_space if pos_conditional else None
    bigram, third = ngram_rows(tokens, table.shape[0], split, trigram)
    rows = _wide(table[bigram])
    if third is not None:
        rows = rows + _wide(table[third])
    gate = _wide(scale)
    if has_leading_space is not None:
        gate = gate * torch.where(has_leading_space[tokens], _wide(boost), 1.0).unsqueeze(-1)
    return rows * gate


def softcap_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, z_loss: float = 0.0
) -> Tensor:
    """Return -log softmax(softcap * tanh(x W^T / softcap))[target] + z_loss * log(Z)^2 of each token.

    Z is the denominator of the softmax; x (..., D), weight (V, D), targets (...).
    """
    logits = softcap * torch.tanh(_wide(x @ weight.T) / softcap)
    flat = F.cross_entropy(logits.flatten(0, -2), targets.long().flatten(), reduction="none")
    loss = flat.view(targets.shape)
    # benchmarks time this, so without z-loss nothing is computed for it
    return loss + z_loss * logits.logsumexp(-1).square() if z_loss else loss


def polynomials(steps: int, coefficients: Sequence[float] | None) -> list[tuple[float, float, float]]:
    """Return a, b and c of each Newton-Schulz step, from a flat list of all of them or the constant ones."""
    if coefficients is None:
        return [NS_COEFFICIENTS] * steps
    return list(zip(*(coefficients[i::3] for i in range(3)), strict=True))


def newton_schulz(g: Tensor, steps: int, coefficients: Sequence[float] | None = None) -> Tensor:
    """Approximate U V^T of each matrix g = U S V^T of a (slots, rows, cols) stack, in g's dtype."""
    x = g.mT if g.shape[-2] > g.shape[-1] else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in polynomials(steps, coefficients):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x
