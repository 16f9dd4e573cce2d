"""Low-rank changes of a model for many documents at once (Hu et al. 2021), learned while they are scored.

Every document has a change of every matrix: Q, K, V, output, MLP up and down of each layer, and the head. Of
a matrix W (out, in) it is B A with A (rank, in) and B (out, rank). B starts at zero, so a document starts
with the model as it is. The documents of a batch are one dimension of A and B; none depends on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.config.schema import ModelConfig, TTTConfig
from pgolf_fast.evaluation.adapt import ADAM_EPS, Scored
from pgolf_fast.model.bank import Banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import reference

# Factors A (documents, layers, rank, in) and B (documents, layers, out, rank) of each matrix, by its name
Factors = dict[str, tuple[Tensor, Tensor]]
_SEED = 1337


def matrices(config: ModelConfig) -> dict[str, tuple[int, int, int]]:
    """How many there are of each matrix that changes, and its size (out, in)."""
    n, d, kv = config.num_layers, config.model_dim, config.kv_dim
    return {
        "q": (n, d, d),
        "k": (n, kv, d),
        "v": (n, kv, d),
        "o": (n, d, d),
        "up": (n, config.mlp_up_rows, d),
        "down": (n, d, config.mlp_hidden),
        "head": (1, config.vocab_size, d),
    }


def fresh_factors(config: ModelConfig, rank: int, documents: int, device: torch.device) -> Factors:
    """Changes of zero: A normal with variance 1 / in, the same for each document, B zero; float32."""
    sampler, found = torch.Generator().manual_seed(_SEED), {}
    for name, (count, rows, columns) in matrices(config).items():
        a = torch.randn(count, rank, columns, generator=sampler) * columns**-0.5
        b = torch.zeros(documents, count, rows, rank, device=device)
        found[name] = a.to(device).expand(documents, -1, -1, -1).clone(), b
    return found


def changed_losses(
    model: GPT, banks: Banks, factors: Factors, tokens: Tensor, targets: Tensor, context: int | None = None
) -> Tensor:
    """`GPT.token_losses` where row i of tokens (B, T) meets the model changed by factors (B, ...)."""
    config, last = model.config, targets.shape[1]
    cast = {name: (a.to(model.compute_dtype), b.to(model.compute_dtype)) for name, (a, b) in factors.items()}
    cos, sin = rope_tables(config, tokens.shape[1], tokens.device, context)

    def linear(x: Tensor, weight: Tensor, name: str, layer: int = 0) -> Tensor:
        a, b = cast[name]
        return torch.baddbmm(F.linear(x, weight), x @ a[:, layer].mT, b[:, layer].mT)

    def attend(layer: int, x: Tensor, value_embed: Tensor | None) -> Tensor:
        n, gain = config.num_layers, model.block(layer).attn.q_gain
        queries = x[:, -last:] if layer == n - 1 else x
        q = linear(queries, banks.qo[layer], "q", layer).unflatten(-1, (config.num_heads, -1))
        k = linear(x, banks.kv[layer], "k", layer).unflatten(-1, (config.num_kv_heads, -1))
        v = linear(x, banks.kv[n + layer], "v", layer)
        v = (v if value_embed is None else v + value_embed).unflatten(-1, (config.num_kv_heads, -1))
        first = x.shape[1] - queries.shape[1]
        wide = torch.promote_types(x.dtype, torch.float32)
        q = reference.rotate(ops.rms_norm(q).to(wide), cos[first:], sin[first:]) * gain.to(wide)[:, None]
        k = reference.rotate(ops.rms_norm(k).to(wide), cos, sin)
        y = _causal(q, k, v.to(wide) if x.device.type == "cpu" else v).to(x.dtype)
        y = reference.exclusive(y, v[:, first:]) if model.uses_xsa(layer) else y
        return linear(y.flatten(2), banks.qo[n + layer], "o", layer)

    def feed(layer: int, x: Tensor) -> Tensor:
        hidden = reference.activation(linear(x, banks.up[layer], "up", layer), config.mlp_activation)
        return linear(hidden, banks.down[layer], "down", layer)

    x = model.smear(model.embed(tokens))
    x = model.trunk(x, model.value_embeddings(tokens), banks, attend, last=last, feed=feed)
    raw = linear(x, model.tok_emb.weight.to(model.compute_dtype), "head")
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    logits = config.logit_softcap * torch.tanh(raw / config.logit_softcap)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last positions, q (B, W, H, hd), k and v (B, T, KV, hd) -> (B, W, H, hd).

    In the dtype of v: float32 on a CPU, which is quicker there than bfloat16.
    """
    groups, (queries, keys) = q.shape[2] // k.shape[2], (q.shape[1], k.shape[1])
    heads = (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2))
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in heads)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


class Lora:
    """The `DocumentAdapter` that learns low-rank changes by AdamW, with the model itself as it stands.

    A document learns from each segment after it is scored, with up to `seq_len` of its tokens as inputs of
    which the segment's are targets; gradients are clipped document by document.
    """

    def __init__(self, model: GPT, config: TTTConfig, seq_len: int, banks: Callable[[], Banks]):
        """`banks` gives what forward reads at the time; the model's parameters must need no gradient."""
        self.model, self.config, self.seq_len, self._banks = model, config, seq_len, banks
        self.trainable = sum(n * (r + c) for n, r, c in matrices(model.config).values()) * config.lora.rank
        self.updates = 0
        self.begin(0)

    def begin(self, documents: int) -> None:
        device = self.model.qo_bank.device
        self._factors = fresh_factors(self.model.config, self.config.lora.rank, documents, device)
        self._tensors = [t for pair in self._factors.values() for t in pair]
        self._means = [torch.zeros_like(t) for t in self._tensors]
        self._squares = [torch.zeros_like(t) for t in self._tensors]
        self._steps = torch.zeros((), device=device)
        self._text = torch.zeros(documents, 0, dtype=torch.int64, device=device)

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        if rows is None:
            raise ValueError("low-rank changes belong to documents: windows need rows")
        factors = {name: (a[rows], b[rows]) for name, (a, b) in self._factors.items()}
        with torch.no_grad():
            return changed_losses(self.model, self._banks(), factors, tokens, targets, context)

    def adapt(self, scored: Scored) -> None:
        documents, length = scored.tokens.shape[0], scored.tokens.shape[1] - 1
        tokens = scored.tokens if self._text.shape[1] == 0 else scored.tokens[:, 1:]
        self._text = torch.cat((self._text[:documents], tokens), dim=1)[:, -max(self.seq_len, length) - 1 :]
        x, y = self._text[:, :-1], scored.tokens[:, 1:]
        for _ in range(self.config.lora.epochs):
            self._update(x, y)
            self.updates += 1

    def _update(self, x: Tensor, y: Tensor) -> None:
        """One step of the first len(x) documents."""
        own = [[t[: len(x)] for t in tensors] for tensors in (self._tensors, self._means, self._squares)]
        leaves = [t.detach().requires_grad_() for t in own[0]]
        factors = dict(zip(self._factors, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        losses = changed_losses(self.model, self._banks(), factors, x, y, self.seq_len)
        grads = torch.autograd.grad(losses.mean(1).sum(), leaves)
        with torch.no_grad():
            norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads])
            norm = torch.linalg.vector_norm(norms, dim=0)
            scale = ((self.config.grad_clip or math.inf) / (norm + 1e-6)).clamp_(max=1.0)
            self._steps += 1
            torch._fused_adamw_(
                own[0],
                [g * scale[:, None, None, None] for g in grads],
                own[1],
                own[2],
                [],
                [self._steps] * len(grads),
                lr=self.config.lora.lr,
                beta1=self.config.momentum,
                beta2=self.config.beta2,
                weight_decay=self.config.weight_decay,
                eps=ADAM_EPS,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        kinds = {"factor": self._tensors, "mean": self._means, "square": self._squares}
        named = {f"{kind}.{i}": t for kind, tensors in kinds.items() for i, t in enumerate(tensors)}
        return {**named, "text": self._text, "steps": self._steps, "updates": torch.tensor(self.updates)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.begin(len(state["factor.0"]))
        for kind, tensors in (
            ("factor", self._tensors),
            ("mean", self._means),
            ("square", self._squares),
        ):
            for i, tensor in enumerate(tensors):
                tensor.copy_(state[f"{kind}.{i}"])
        self._text = state["text"].to(self._text.device, copy=True)
        self._steps.copy_(state["steps"])
        self.updates = int(state["updates"])
