"""The catalog of ops: inputs, the op, its reference, FLOPs and ideal bytes.

Tests and `pgolf doctor` run each case at `SMALL` sizes; `pgolf bench`, `pgolf tune` and `pgolf aot` at those
of a preset. Not imported by `pgolf_fast.ops`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.ops import reference, reference_bytes
from pgolf_fast.ops.case import Case, Inputs, Outputs, Sizes, Work

LAYERS, LAYER = 3, 1  # layers of the banks that are built, and the one that is read
NEWTON_SCHULZ_STEPS = 5
SMALL = Sizes()


@dataclass(frozen=True)
class Builder:
    """Random inputs of given sizes, dtype and device."""

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def scale(self, size: int) -> Tensor:
        """Per-channel float32 numbers, as in the network."""
        return self.randn(size, dtype=torch.float32).requires_grad_()

    def bank(self, slots: int, rows: int, columns: int) -> Tensor:
        """Weights of the size that keeps activations near one."""
        return (self.randn(slots, rows, columns) * max(1, columns) ** -0.5).requires_grad_()

    def states(self, *, width: int = 0) -> Tensor:
        return self.randn(self.sizes.batch, self.sizes.length, width or self.sizes.dim).requires_grad_()

    def heads(self) -> Inputs:
        """Gains of the heads, and RoPE tables."""
        angle = 6 * torch.rand(self.sizes.length, self.sizes.rotary // 2, device=self.device)
        gain = (1 + torch.rand(self.sizes.heads, device=self.device)).requires_grad_()
        return {"q_gain": gain, "cos": angle.cos(), "sin": angle.sin()}

    def case(self, **fields: Any) -> Case:
        """A case of tokens, which is evaluated in chunks of about 4096."""
        return Case(tokens=self.sizes.tokens, chunk=max(1, 4096 // max(1, self.sizes.length)), **fields)

    @property
    def size(self) -> int:
        """Bytes per element."""
        return self.dtype.itemsize


def _one(function: Callable[..., Tensor], **settings: Any) -> Callable[..., Outputs]:
    """Return `function` with these settings, called by name, and its result as a tuple."""
    return lambda **t: (function(**t, **settings),)


def _mlp(b: Builder, activation: str) -> Case:
    gated, d, m = activation == "swiglu", b.sizes.dim, b.sizes.tokens
    hidden = b.sizes.gated_hidden if gated else b.sizes.hidden
    rows = hidden * (2 if gated else 1)
    weights, flops = d * (rows + hidden), 2.0 * m * d * (rows + hidden)
    forward, backward = b.size * (2 * m * d + weights), b.size * (3 * m * d + weights) + 8 * weights
    return b.case(
        inputs={"x": b.states(), "up_bank": b.bank(LAYERS, rows, d), "down_bank": b.bank(LAYERS, d, hidden)},
        op=_one(ops.mlp, slot=LAYER, activation=activation),
        reference=_one(reference.mlp, slot=LAYER, kind=activation),
        batched=("x",),
        trained=("x", "up_bank", "down_bank"),
        grad_banks={"grad_up": "up_bank", "grad_down": "down_bank"},
        weights={"up": ("up_bank", LAYER), "down": ("down_bank", LAYER)},
        work=Work(flops, forward, 2 * flops, backward),
    )


def _gqa_attention(
    b: Builder, xsa: bool = True, value: bool = True, window: bool = False, packed: bool = False
) -> Case:
    """Build attention; `window` makes the last third of the positions the only queries.

    `packed` adds a head gate, and segments that cut every row in three.
    """
    s = b.sizes
    d, kv, m, queries = s.dim, s.kv_dim, s.tokens, max(1, s.length // 3) if window else s.length
    inputs: Inputs = {
        "x": b.states(),
        "qo_bank": b.bank(2 * LAYERS, d, d),
        "kv_bank": b.bank(2 * LAYERS, kv, d),
        **b.heads(),
        "value_embed": b.states(width=kv) if value else None,
    }
    if packed:
        inputs["gate"] = torch.rand(s.batch, s.length, s.heads, device=b.device).to(b.dtype).requires_grad_()
    optional = [name for name in ("value_embed", "gate") if inputs.get(name) is not None]
    options: dict[str, Any] = {"num_kv_heads": s.kv_heads, "xsa": xsa}

    def segments(x: Tensor) -> dict[str, Any]:
        if not packed:
            return {}
        cuts = (0, s.length // 3, s.length // 3 + 1)
        bounds = [*(row * s.length + cut for row in range(len(x)) for cut in cuts), len(x) * s.length]
        return {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=x.device)}

    def op(**t: Any) -> Outputs:
        last = queries if window else None
        return (ops.gqa_attention(**t, **segments(t["x"]), slot=LAYER, window=last, **options),)

    def formula(**t: Any) -> Outputs:
        full = reference.gqa_attention(**t, **segments(t["x"]), slot=LAYER, **options)
        return (full[:, s.length - queries :],)

    weights = 2 * d * (d + kv)
    inner = 2.0 * s.heads * s.head_dim * (s.length + 1) * m  # causal QK^T and PV
    forward = b.size * (m * (2 * d + kv) + weights)
    backward = b.size * (m * (3 * d + 2 * kv) + weights) + 8 * weights
    return b.case(
        inputs=inputs,
        op=op,
        reference=formula,
        batched=("x", *optional),
        trained=("x", "qo_bank", "kv_bank", "q_gain", *optional),
        grad_banks={"grad_qo": "qo_bank", "grad_kv": "kv_bank"},
        weights={
            "query": ("qo_bank", LAYER),
            "key": ("kv_bank", LAYER),
            "value": ("kv_bank", LAYERS + LAYER),
            "out": ("qo_bank", LAYERS + LAYER),
        },
        work=Work(2.0 * m * weights + inner, forward, 4.0 * m * weights + 2.5 * inner, backward),
        options=options,
    )


def _projected_attention(b: Builder) -> Case:
    settings = {"num_kv_heads": b.sizes.kv_heads, "xsa": True}
    return b.case(
        inputs={"q": b.states(), **{name: b.states(width=b.sizes.kv_dim) for name in "kv"}, **b.heads()},
        op=_one(ops.projected_attention, **settings),
        reference=_one(reference.projected_attention, **settings),
        batched=("q", "k", "v"),
        trained=("q", "k", "v", "q_gain"),
    )


def _ngram_hash_embed(b: Builder) -> Case:
    s, m, table = b.sizes, b.sizes.tokens, b.sizes.bigram_rows * b.sizes.bigram_dim
    flags: dict[str, Any] = {"pos_conditional": s.pos_conditional, "trigram": s.trigram}
    flops, written = 2.0 * m * s.bigram_dim, b.size * m * s.bigram_dim
    return Case(
        inputs={
            "tokens": torch.randint(s.vocab, (s.batch, s.length), device=b.device),
            "table": b.randn(s.bigram_rows, s.bigram_dim).requires_grad_(),
            "has_leading_space": torch.arange(s.vocab, device=b.device) % 3 == 0,
            "scale": torch.tensor(0.7, device=b.device).requires_grad_(),
            "boost": torch.tensor(1.3, device=b.device).requires_grad_(),
        },
        op=_one(ops.ngram_hash_embed, **flags),
        reference=lambda **t: (reference.ngram_hash_embed(**t, **flags).to(t["table"].dtype),),
        batched=("tokens",),
        trained=("table", "scale", "boost"),
        work=Work(flops, 8 * m + b.size * table + written, 2 * flops, 8 * m + 2 * b.size * table + written),
        tokens=m,
        chunk=max(1, 65_536 // max(1, s.length)),
    )


def _residual_norm(b: Builder, scaled: bool = True, wider: int = 1) -> Case:
    """Build the norm; `wider` multiplies the width, for rows that do not fit a tile."""
    d, m = wider * b.sizes.dim, b.sizes.tokens
    return b.case(
        inputs={
            "x": b.states(width=d),
            "branch": b.states(width=d),
            "x_scale": b.scale(d) if scaled else None,
            "branch_scale": b.scale(d),
        },
        op=partial(ops.residual_norm, layer_scale=0.5),
        reference=partial(reference.residual_norm, layer_scale=0.5),
        batched=("x", "branch"),
        trained=("x", "branch", *(("x_scale",) if scaled else ()), "branch_scale"),
        work=Work(10.0 * m * d, 4 * m * d * b.size, 20.0 * m * d, 6 * m * d * b.size),
    )


def _rms_norm(b: Builder) -> Case:
    d, m = b.sizes.dim, b.sizes.tokens
    return b.case(
        inputs={"x": b.states()},
        op=_one(ops.rms_norm),
        reference=_one(reference.rms_norm),
        batched=("x",),
        trained=("x",),
        work=Work(4.0 * m * d, 2 * m * d * b.size, 8.0 * m * d, 3 * m * d * b.size),
    )


def _smear_gate(b: Builder) -> Case:
    d, m = b.sizes.dim, b.sizes.tokens
    return b.case(
        inputs={"x": b.states(), "gate": b.scale(d)},
        op=_one(ops.smear_gate),
        reference=_one(reference.smear_gate),
        batched=("x",),
        trained=("x", "gate"),
        work=Work(3.0 * m * d, 2 * m * d * b.size, 6.0 * m * d, 3 * m * d * b.size),
    )


def _softcap_cross_entropy(b: Builder, z_loss: float = 0.0) -> Case:
    s, d, m, vocab = b.sizes, b.sizes.dim, b.sizes.tokens, b.sizes.vocab
    settings: dict[str, Any] = {"softcap": s.softcap, "z_loss": z_loss}
    flops, read = 2.0 * m * d * vocab, b.size * (m * d + vocab * d)
    return b.case(
        inputs={
            "x": b.states(),
            "weight": b.bank(1, vocab, d)[0].detach().requires_grad_(),
            "targets": torch.randint(vocab, (s.batch, s.length), device=b.device),
        },
        op=_one(ops.softcap_cross_entropy, **settings),
        reference=_one(reference.softcap_cross_entropy, **settings),
        batched=("x", "targets"),
        trained=("x", "weight"),
        work=Work(flops, read + 12 * m, 2 * flops, 2 * read + 12 * m),
    )


def _newton_schulz(b: Builder, bank: str) -> Case:
    """Build the stack of matrices that Muon orthogonalizes at once."""
    s = b.sizes
    slots, rows, cols = (2 * s.layers, s.dim, s.dim) if bank == "qo" else (s.layers, s.up_rows, s.dim)
    small, large = min(rows, cols), max(rows, cols)
    flops = slots * NEWTON_SCHULZ_STEPS * (4.0 * small * small * large + 2.0 * small**3)
    return Case(
        inputs={"g": b.randn(slots, rows, cols)},
        op=_one(ops.newton_schulz, steps=NEWTON_SCHULZ_STEPS),
        reference=_one(reference.newton_schulz, steps=NEWTON_SCHULZ_STEPS),
        batched=("g",),
        work=Work(flops, 2.0 * slots * rows * cols * b.size),
    )


def _muon_momentum(b: Builder) -> Case:
    """Build momentum of the largest bank; the gradient is exact in the buffer's dtype."""
    shape = (b.sizes.layers, b.sizes.up_rows, b.sizes.dim)
    grad = b.randn(*shape).float()

    def formula(grad: Tensor, buffer: Tensor) -> Outputs:
        low = grad.to(buffer.dtype)
        new = 0.95 * buffer + low
        return low + 0.95 * new, new

    return Case(
        inputs={"buffer": b.randn(*shape), "grad": grad},
        op=lambda grad, buffer: (ops.muon_momentum(grad, buffer, 0.95), buffer),
        reference=formula,
        batched=("grad", "buffer"),
        mutated=("buffer",),
        work=Work(4.0 * grad.numel(), (4.0 + 3 * b.size) * grad.numel()),
    )


def _muon_apply(b: Builder, shadowed: bool = True) -> Case:
    shape = (b.sizes.layers, b.sizes.up_rows, b.sizes.dim)
    update = b.randn(*shape)

    def op(master: Tensor, update: Tensor) -> Outputs:
        shadow = torch.empty_like(update) if shadowed else None
        ops.muon_apply(master, update, 0.02, weight_decay=0.04, scale=1.5, shadow=shadow)
        return (master,) if shadow is None else (master, shadow)

    def formula(master: Tensor, update: Tensor) -> Outputs:
        new = (1 - 0.02 * 0.04) * master - 0.02 * 1.5 * update.to(master.dtype)
        return (new, new.to(update.dtype)) if shadowed else (new,)

    return Case(
        inputs={"update": update, "master": b.randn(*shape, dtype=torch.float32)},
        op=op,
        reference=formula,
        batched=("master", "update"),
        mutated=("master",),
        work=Work(4.0 * update.numel(), (8.0 + 2 * b.size) * update.numel()),
    )


def _int6_matmul(b: Builder, one_token: bool = False) -> Case:
    """Build an up-projection with int6 weights; `one_token` is one row per sequence, as in decoding."""
    m, k, n = b.sizes.batch if one_token else b.sizes.tokens, b.sizes.dim, b.sizes.up_rows
    codes = torch.randint(-32, 32, (n, k), dtype=torch.int8)
    packed = ops.int6_pack(codes).to(b.device)

    def formula(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        return reference_bytes.scaled_matmul(x, reference_bytes.unpack_bits(packed, k, 6), scale)

    return Case(
        inputs={"x": b.randn(m, k), "packed": packed, "scale": torch.rand(n, device=b.device) / 16},
        op=_one(ops.int6_matmul),
        reference=_one(formula),
        batched=("x",),
        work=Work(2.0 * m * n * k, b.size * m * (k + n) + packed.numel() + 4 * n),
        tokens=m,
        chunk=4096,
    )


def _bits(b: Builder, bits: int) -> Case:
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (7, 37), dtype=torch.int8, device=b.device)

    def op(codes: Tensor, scale: Tensor) -> Outputs:
        packed = ops.pack_bits(codes, bits)
        return ops.unpack_bits(packed, 37, bits), ops.dequantize_bits(packed, scale, 37, bits, torch.float32)

    return Case(
        inputs={"codes": codes, "scale": torch.rand(7, device=b.device)},
        op=op,
        reference=lambda codes, scale: (codes, codes * scale[:, None]),
        batched=("codes", "scale"),
    )


def _lzma(b: Builder) -> Case:
    def op(data: Tensor) -> Tensor:
        return ops.lzma_decompress(ops.lzma_compress(data.cpu()), data.numel()).to(data.device)

    return Case(
        inputs={"data": torch.arange(5000, device=b.device).remainder(251).to(torch.uint8)},
        op=_one(op),
        reference=lambda data: (data,),
        batched=("data",),
    )


@dataclass(frozen=True)
class Entry:
    """A case of the catalog."""

    kernels: str | None  # The op's name in `tiles.DEFAULTS`; None for ops without Triton kernels
    make: Callable[[Builder], Case]
    rows: tuple[int, ...] | None = None  # Token counts to use at a preset's shapes; None: any
    timed: bool = True  # Part of `pgolf bench`; the others are variants for correctness and compilation
    covers: tuple[str, ...] = ()  # Torch ops that the case runs; empty: the op named like `kernels`

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the torch ops that the case runs."""
        return self.covers or (str(self.kernels),)


_BITS, _LZMA = ("pack_bits", "unpack_bits", "dequantize_bits"), ("lzma_compress", "lzma_decompress")
_variant = partial(Entry, timed=False)

CASES: dict[str, Entry] = {
    "mlp-leaky_relu_squared": Entry("mlp", partial(_mlp, activation="leaky_relu_squared")),
    "gqa_attention": Entry("gqa_attention", _gqa_attention),
    "residual_norm": Entry("residual_norm", _residual_norm),
    "softcap_cross_entropy": Entry("softcap_cross_entropy", _softcap_cross_entropy),
    "ngram_hash_embed": Entry("ngram_hash_embed", _ngram_hash_embed),
    "smear_gate": Entry("smear_gate", _smear_gate),
    "mlp-swiglu": Entry("mlp", partial(_mlp, activation="swiglu")),
    "mlp-relu_squared": Entry("mlp", partial(_mlp, activation="relu_squared")),
    "newton_schulz-qo": Entry("newton_schulz", partial(_newton_schulz, bank="qo"), (1,)),
    "newton_schulz-mlp": Entry("newton_schulz", partial(_newton_schulz, bank="mlp"), (1,)),
    "muon_momentum": Entry("muon", _muon_momentum, (1,), covers=("muon_momentum",)),
    "muon_apply": Entry("muon", _muon_apply, (1,), covers=("muon_apply",)),
    "int6_matmul": Entry("int6_matmul", _int6_matmul, (1, 8, 64, 4096)),
    "gqa_attention-plain": _variant("gqa_attention", partial(_gqa_attention, xsa=False, value=False)),
    "gqa_attention-window": _variant("gqa_attention", partial(_gqa_attention, window=True)),
    "gqa_attention-packed": _variant("gqa_attention", partial(_gqa_attention, packed=True)),
    "projected_attention": _variant(None, _projected_attention, covers=("projected_attention",)),
    "residual_norm-unscaled": _variant("residual_norm", partial(_residual_norm, scaled=False)),
    "rms_norm": _variant(None, _rms_norm, covers=("rms_norm",)),
    "residual_norm-wide": _variant("residual_norm", partial(_residual_norm, wider=16)),
    "softcap_cross_entropy-z_loss": _variant(
        "softcap_cross_entropy", partial(_softcap_cross_entropy, z_loss=0.1)
    ),
    "muon_apply-unshadowed": _variant(
        "muon", partial(_muon_apply, shadowed=False), (1,), covers=("muon_apply",)
    ),
    "int6_matmul-decode": _variant("int6_matmul", partial(_int6_matmul, one_token=True), (1,)),
    **{f"bits-{n}": _variant(None, partial(_bits, bits=n), (1,), covers=_BITS) for n in (6, 8)},
    "lzma": _variant(None, _lzma, (1,), covers=_LZMA),
}


def make(
    name: str,
    sizes: Sizes = SMALL,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Case:
    """Build a case of the catalog; the same arguments give the same inputs."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        case = CASES[name].make(Builder(sizes, dtype, device))
    return replace(case, name=name, kernels=CASES[name].kernels, sizes=sizes)
