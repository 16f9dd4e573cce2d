"""Every op with its inputs at a preset's shapes, its FLOPs and its ideal bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from pgolf_fast import ops
from pgolf_fast.bench import formulas
from pgolf_fast.bench.case import Case, Contender, Formula, Outputs, Work
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import attention_backend, reference
from pgolf_fast.ops import muon_update as muon

LAYERS, LAYER = 2, 1  # slots of the banks that are built, and the one that is read
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Place:
    """Shapes, dtype and device that a case is built for."""

    config: RunConfig
    tokens: int
    dtype: torch.dtype
    device: torch.device

    @property
    def length(self) -> int:
        return min(self.config.train.seq_len, self.tokens)

    @property
    def batch(self) -> int:
        return self.tokens // self.length

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, dtype=dtype or self.dtype, device=self.device)

    def weight(self, *shape: int) -> Tensor:
        """Of the size that keeps activations near one."""
        return (self.randn(*shape) * shape[-1] ** -0.5).requires_grad_()

    def states(self) -> Tensor:
        return self.randn(self.batch, self.length, self.config.model.model_dim).requires_grad_()

    def shape(self, **more: int) -> dict[str, int]:
        return {"batch": self.batch, "length": self.length, **more}

    @property
    def size(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def rows_at_once(self) -> int:
        """Sequences of about 4096 tokens together."""
        return max(1, 4096 // self.length)


def bank_of(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A bank with each weight at its slot LAYER of its own group of LAYERS, and a float32 gradient bank."""
    bank = torch.stack([w.detach() for w in weights for _ in range(LAYERS)])
    return bank.requires_grad_(), torch.zeros_like(bank, dtype=torch.float32)


def mlp(place: Place, activation: str) -> Case:
    """Hidden width of the preset; two thirds of it for a gated MLP in an ungated preset, and back."""
    model = place.config.model
    gated = activation == "swiglu"
    hidden, d = model.mlp_hidden, model.model_dim
    if gated != (model.mlp_activation == "swiglu"):
        hidden = hidden * 2 // 3 if gated else hidden * 3 // 2
    rows = hidden * (2 if gated else 1)
    inputs = {"x": place.states(), "up": place.weight(rows, d), "down": place.weight(d, hidden)}
    (up, grad_up), (down, grad_down) = bank_of([inputs["up"]]), bank_of([inputs["down"]])
    leaves = {"x": inputs["x"], "up": up, "down": down}
    held = {"up": grad_up[LAYER], "down": grad_down[LAYER]}

    def ours() -> Outputs:
        x = inputs["x"]
        return (ops.mlp(x, up, down, LAYER, activation, grad_up=grad_up, grad_down=grad_down),)

    m, weights = place.batch * place.length, d * (rows + hidden)
    return Case(
        op=f"mlp-{activation}",
        kernel_op="mlp",
        tokens=m,
        shape=place.shape(dim=d, up_rows=rows, hidden=hidden),
        inputs=inputs,
        batched=("x",),
        trained=("x", "up", "down"),
        ours=Contender("ours", ours, leaves, held),
        formulas={"eager": Formula(lambda x, up, down: (formulas.mlp(x, up, down, activation),))},
        work=Work(
            2.0 * m * weights,
            place.size * (2 * m * d + weights),
            4.0 * m * weights,
            place.size * (3 * m * d + weights) + 8 * weights,
        ),
        chunk=place.rows_at_once,
    )


def gqa_attention(place: Place) -> Case:
    model = place.config.model
    d, kv, heads = model.model_dim, model.kv_dim, model.num_heads
    names = ("query", "key", "value", "out")
    query, key, value, out = (place.weight(n, d) for n in (d, kv, kv, d))
    gain = torch.full((heads,), model.qk_gain_init, device=place.device).requires_grad_()
    value_embed = place.randn(place.batch, place.length, kv).requires_grad_()
    cos, sin = rope_tables(model, place.length, place.device)
    inputs = {"x": place.states(), **dict(zip(names, (query, key, value, out), strict=True))}
    inputs |= {"q_gain": gain, "value_embed": value_embed, "cos": cos, "sin": sin}
    qo, grad_qo = bank_of([query, out])
    kvs, grad_kv = bank_of([key, value])
    shared = {"num_kv_heads": model.num_kv_heads, "xsa": model.xsa_last_n > 0}
    x = inputs["x"]

    def ours() -> Outputs:
        banks = {"grad_qo": grad_qo, "grad_kv": grad_kv}
        return (ops.gqa_attention(x, qo, kvs, gain, value_embed, cos, sin, LAYER, **shared, **banks),)  # type: ignore[arg-type]

    def definition(x, query, key, value, out, q_gain, value_embed, cos, sin) -> Outputs:
        qo_bank, kv_bank = torch.stack((query, out)), torch.stack((key, value))
        kv_heads, xsa = shared["num_kv_heads"], bool(shared["xsa"])
        return (
            reference.gqa_attention(x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, 0, kv_heads, xsa),
        )

    def sdpa(x, query, key, value, out, q_gain, value_embed, cos, sin) -> Outputs:
        tables = (q_gain, value_embed, cos, sin)
        return (formulas.sdpa_attention(x, query, key, value, out, *tables, **shared),)  # type: ignore[arg-type]

    contender = Contender(
        "ours",
        ours,
        # by input name; of two weights in one bank, one stands for the bank in autograd
        {"x": x, "query": qo, "key": kvs, "q_gain": gain, "value_embed": value_embed},
        {
            "query": grad_qo[LAYER],
            "out": grad_qo[LAYERS + LAYER],
            "key": grad_kv[LAYER],
            "value": grad_kv[LAYERS + LAYER],
        },
    )
    m, weights = place.batch * place.length, 2 * d * (d + kv)
    inner = 2.0 * heads * model.head_dim * (place.length + 1) * m  # causal QK^T and PV
    cuda = place.device.type == "cuda"
    return Case(
        op="gqa_attention",
        kernel_op="gqa_attention",
        tokens=m,
        shape=place.shape(dim=d, heads=heads, kv_heads=model.num_kv_heads, head_dim=model.head_dim),
        inputs=inputs,
        batched=("x", "value_embed"),
        trained=("x", *names, "q_gain", "value_embed"),
        ours=contender,
        variants=attention_variants(contender, place, model.head_dim),
        formulas={
            "eager": Formula(definition),
            "sdpa-flash": Formula(sdpa, SDPBackend.FLASH_ATTENTION if cuda else None),
            **({"sdpa-cudnn": Formula(sdpa, SDPBackend.CUDNN_ATTENTION)} if cuda else {}),
        },
        work=Work(
            2.0 * m * weights + inner,
            place.size * (m * (2 * d + kv) + weights),
            4.0 * m * weights + 2.5 * inner,
            place.size * (m * (3 * d + 2 * kv) + weights) + 8 * weights,
        ),
        chunk=place.rows_at_once,
    )


def attention_variants(ours: Contender, place: Place, head_dim: int) -> dict[str, Contender | str]:
    """`ours` with every inner attention that there is on a GPU."""
    if place.device.type != "cuda":
        return {}
    shape = attention_backend.Shape(place.device, place.dtype, head_dim)
    found: dict[str, Contender | str] = {}
    for name in attention_backend.NAMES:
        if name == "plain":  # holds all scores in memory
            continue
        why_not = attention_backend.why_not(name, shape)
        around = functools.partial(forced_attention, name)
        found[f"ours-{name}"] = why_not or replace(ours, name=f"ours-{name}", around=around)
    return found


@contextmanager
def forced_attention(name: str) -> Iterator[None]:
    """Within, attention uses that backend wherever it fits ("auto": the table's)."""
    attention_backend.choose(name)
    try:
        yield
    finally:
        attention_backend.choose("auto")


def ngram_hash_embed(place: Place) -> Case:
    model = place.config.model
    rows, dim = model.bigram_vocab_size, model.bigram_dim
    shape = (place.batch, place.length)
    inputs = {
        "tokens": torch.randint(model.vocab_size, shape, device=place.device),
        "table": place.randn(rows, dim).requires_grad_(),
        "has_leading_space": torch.arange(model.vocab_size, device=place.device) % 3 == 0,
        "scale": torch.tensor(0.05, device=place.device).requires_grad_(),
        "boost": torch.tensor(1.2, device=place.device).requires_grad_(),
    }
    flags = {"pos_conditional": model.pos_conditional, "trigram": model.trigram}
    ours = functools.partial(ops.ngram_hash_embed, *inputs.values(), **flags)  # type: ignore[arg-type]
    formula = functools.partial(formulas.ngram_hash_embed, **flags)  # type: ignore[arg-type]

    m, table = place.batch * place.length, rows * dim
    return Case(
        op="ngram_hash_embed",
        kernel_op="ngram_hash_embed",
        tokens=m,
        shape=place.shape(rows=rows, dim=dim),
        inputs=inputs,
        batched=("tokens",),
        trained=("table", "scale", "boost"),
        ours=Contender("ours", lambda: (ours(),), {n: inputs[n] for n in ("table", "scale", "boost")}),
        formulas={"eager": Formula(lambda **t: (formula(**t),))},
        work=Work(
            2.0 * m * dim,
            8 * m + place.size * (table + m * dim),
            4.0 * m * dim,
            8 * m + place.size * (m * dim + 2 * table),
        ),
        chunk=max(1, 65_536 // place.length),
    )


def residual_norm(place: Place) -> Case:
    d = place.config.model.model_dim
    x, branch = place.states(), place.states()
    x_scale, branch_scale = (place.randn(d, dtype=torch.float32).requires_grad_() for _ in range(2))
    inputs = {"x": x, "branch": branch, "x_scale": x_scale, "branch_scale": branch_scale}
    m = place.batch * place.length
    return Case(
        op="residual_norm",
        kernel_op="residual_norm",
        tokens=m,
        shape=place.shape(dim=d),
        inputs=inputs,
        batched=("x", "branch"),
        trained=tuple(inputs),
        ours=Contender("ours", lambda: ops.residual_norm(**inputs, layer_scale=0.5), inputs),
        formulas={"eager": Formula(functools.partial(reference.residual_norm, layer_scale=0.5))},
        work=Work(10.0 * m * d, 4 * m * d * place.size, 20.0 * m * d, 6 * m * d * place.size),
        chunk=place.rows_at_once,
    )


def smear_gate(place: Place) -> Case:
    d = place.config.model.model_dim
    inputs = {"x": place.states(), "gate": place.randn(d, dtype=torch.float32).requires_grad_()}
    m = place.batch * place.length
    return Case(
        op="smear_gate",
        kernel_op="smear_gate",
        tokens=m,
        shape=place.shape(dim=d),
        inputs=inputs,
        batched=("x",),
        trained=("x", "gate"),
        ours=Contender("ours", lambda: (ops.smear_gate(**inputs),), inputs),
        formulas={"eager": Formula(lambda x, gate: (reference.smear_gate(x, gate),))},
        work=Work(3.0 * m * d, 2 * m * d * place.size, 6.0 * m * d, 3 * m * d * place.size),
        chunk=place.rows_at_once,
    )


def softcap_cross_entropy(place: Place) -> Case:
    model = place.config.model
    d, vocab, softcap = model.model_dim, model.vocab_size, model.logit_softcap
    shape = (place.batch, place.length)
    targets = torch.randint(vocab, shape, device=place.device)
    inputs = {"x": place.states(), "weight": place.weight(vocab, d), "targets": targets}

    def formula(x, weight, targets) -> Outputs:
        return (formulas.softcap_cross_entropy(x, weight, targets, softcap),)

    m = place.batch * place.length
    return Case(
        op="softcap_cross_entropy",
        kernel_op="softcap_cross_entropy",
        tokens=m,
        shape=place.shape(dim=d, vocab=vocab),
        inputs=inputs,
        batched=("x", "targets"),
        trained=("x", "weight"),
        ours=Contender(
            "ours",
            lambda: (ops.softcap_cross_entropy(inputs["x"], inputs["weight"], targets, softcap),),
            {n: inputs[n] for n in ("x", "weight")},
        ),
        formulas={"eager": Formula(formula)},
        work=Work(
            2.0 * m * d * vocab,
            place.size * (m * d + vocab * d) + 12 * m,
            4.0 * m * d * vocab,
            place.size * (2 * m * d + 2 * vocab * d) + 12 * m,
        ),
        chunk=place.rows_at_once,
        constants={"softcap": softcap},
    )


def newton_schulz(place: Place, bank: str) -> Case:
    """The stack of matrices that Muon orthogonalises at once; tokens do not matter."""
    model = place.config.model
    n, d = model.num_layers, model.model_dim
    slots, rows, cols = (2 * n, d, d) if bank == "qo" else (n, model.mlp_up_rows, d)
    inputs = {"g": place.randn(slots, rows, cols)}
    small, large = min(rows, cols), max(rows, cols)
    flops = slots * NEWTON_SCHULZ_STEPS * (4.0 * small * small * large + 2.0 * small**3)
    return Case(
        op=f"newton_schulz-{bank}",
        kernel_op="newton_schulz",
        tokens=0,
        shape={"slots": slots, "rows": rows, "cols": cols},
        inputs=inputs,
        batched=("g",),
        trained=(),
        ours=Contender("ours", lambda: (ops.newton_schulz(inputs["g"], NEWTON_SCHULZ_STEPS),), {}),
        formulas={"eager": Formula(lambda g: (reference.newton_schulz(g, NEWTON_SCHULZ_STEPS),))},
        work=Work(flops, 2.0 * slots * rows * cols * place.size),
    )


def muon_momentum(place: Place) -> Case:
    """Of the largest bank. With half momentum and a buffer of twice the gradient, calls change nothing."""
    model = place.config.model
    shape = (model.num_layers, model.mlp_up_rows, model.model_dim)
    grad = place.randn(*shape, dtype=torch.float32)
    inputs = {"grad": grad, "buffer": 2 * grad.to(place.dtype)}

    def formula(grad, buffer) -> Outputs:
        low = grad.to(buffer.dtype)
        return (low + 0.5 * (0.5 * buffer + low),)

    return Case(
        op="muon_momentum",
        kernel_op="muon",
        tokens=0,
        shape=dict(zip(("slots", "rows", "cols"), shape, strict=True)),
        inputs=inputs,
        batched=("grad", "buffer"),
        trained=(),
        ours=Contender("ours", lambda: (muon.muon_momentum(grad, inputs["buffer"], 0.5),), {}),
        formulas={"eager": Formula(formula)},
        work=Work(4.0 * grad.numel(), (4.0 + 3 * place.size) * grad.numel()),
    )


def muon_apply(place: Place) -> Case:
    """On the largest bank. With these numbers calls leave the weights as they are; the shadow is new."""
    model = place.config.model
    shape = (model.num_layers, model.mlp_up_rows, model.model_dim)
    update = place.randn(*shape)
    inputs = {"master": -update.float(), "update": update}

    def ours() -> Outputs:
        shadow = torch.empty_like(update)
        muon.muon_apply(inputs["master"], update, 0.5, weight_decay=1.0, scale=1.0, shadow=shadow)
        return inputs["master"], shadow

    def formula(master, update) -> Outputs:
        new = 0.5 * master - 0.5 * update.to(master.dtype)
        return new, new.to(update.dtype)

    return Case(
        op="muon_apply",
        kernel_op="muon",
        tokens=0,
        shape=dict(zip(("slots", "rows", "cols"), shape, strict=True)),
        inputs=inputs,
        batched=("master", "update"),
        trained=(),
        ours=Contender("ours", ours, {}),
        formulas={"eager": Formula(formula)},
        work=Work(4.0 * update.numel(), (8.0 + 2 * place.size) * update.numel()),
    )


def int6_matmul(place: Place) -> Case:
    """The up-projection of the MLP with int6 weights; `tokens` is the number of rows of x."""
    model = place.config.model
    m, k, n = place.tokens, model.model_dim, model.mlp_up_rows
    codes = torch.randint(-31, 32, (n, k), dtype=torch.int8)
    packed = ops.int6_pack(codes).to(place.device)
    scale = torch.rand(n, device=place.device) / 256 + 1 / 256
    inputs = {"x": place.randn(m, k), "packed": packed, "scale": scale}
    dense = (codes.to(place.device).float() * scale[:, None]).to(place.dtype)
    return Case(
        op="int6_matmul",
        kernel_op="int6_matmul",
        tokens=m,
        shape={"m": m, "k": k, "n": n},
        inputs=inputs,
        batched=("x",),
        trained=(),
        ours=Contender("ours", lambda: (ops.int6_matmul(**inputs),), {}),
        formulas={
            "eager": Formula(lambda x, packed, scale: (formulas.int6_matmul(x, packed, scale),)),
            # what a user does who unpacks once and keeps 16-bit weights
            "dense": Formula(lambda x, packed, scale: (F.linear(x, dense.to(x.dtype)),)),
        },
        work=Work(2.0 * m * n * k, place.size * m * (k + n) + packed.numel() + 4 * n),
        chunk=4096,
    )


@dataclass(frozen=True)
class Entry:
    """How to build an op's cases, and the token counts it insists on (None: whatever is asked for)."""

    make: Callable[[Place], Case]
    tokens: tuple[int, ...] | None = None


OPS: dict[str, Entry] = {
    "mlp-leaky_relu_squared": Entry(functools.partial(mlp, activation="leaky_relu_squared")),
    "gqa_attention": Entry(gqa_attention),
    "residual_norm": Entry(residual_norm),
    "softcap_cross_entropy": Entry(softcap_cross_entropy),
    "ngram_hash_embed": Entry(ngram_hash_embed),
    "smear_gate": Entry(smear_gate),
    "mlp-swiglu": Entry(functools.partial(mlp, activation="swiglu")),
    "mlp-relu_squared": Entry(functools.partial(mlp, activation="relu_squared")),
    "newton_schulz-qo": Entry(functools.partial(newton_schulz, bank="qo"), (1,)),
    "newton_schulz-mlp": Entry(functools.partial(newton_schulz, bank="mlp"), (1,)),
    "muon_momentum": Entry(muon_momentum, (1,)),
    "muon_apply": Entry(muon_apply, (1,)),
    "int6_matmul": Entry(int6_matmul, (1, 8, 64, 4096)),
}


def select(words: Sequence[str]) -> list[str]:
    """Entries that begin with one of `words`; all for none. Raises PgolfError for an unknown word."""
    for word in words:
        if not any(name.startswith(word) for name in OPS):
            raise PgolfError(f"no op {word!r} to measure: ops are {', '.join(OPS)}")
    return [name for name in OPS if not words or any(name.startswith(word) for word in words)]


def make_case(name: str, place: Place) -> Case:
    """The case of one entry. Raises PgolfError when the tokens are not whole sequences."""
    if OPS[name].tokens is None and place.tokens % place.length:
        raise PgolfError(
            f"{place.tokens} tokens are not whole sequences of {place.length}: change --tokens or the preset"
        )
    torch.manual_seed(0)
    return OPS[name].make(place)
