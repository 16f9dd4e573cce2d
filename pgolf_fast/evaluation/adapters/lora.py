"""Low-rank changes of a model for many documents in parallel (Hu et al. 2021), learned while they are scored.

Every document has a change of every matrix at every visit of its layer: Q, K, V, output, MLP up and down, and
the head. For a matrix W (out, in) it is B A with A (rank, in) and B (out, rank). B starts at zero, so a
document starts from the unchanged model. Documents are the first dimension of A and B; none depends on
another.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.config.schema import ModelConfig, TTTConfig
from pgolf_fast.evaluation.adapters.base import Learner, Scored, Tensors, adamw_, freeze
from pgolf_fast.evaluation.adapters.descent import AdamW
from pgolf_fast.model.bank import Banks, Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.plan import Visit
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import reference
from pgolf_fast.quant.grid import fake_int6

# Factors A (documents, visits, rank, in) and B (documents, visits, out, rank) of each matrix by name
Factors = dict[str, tuple[Tensor, Tensor]]
Sizes = dict[str, tuple[int, int, int]]  # count, out and in of each kind of matrix
_SEED = 1337


def matrices(config: ModelConfig) -> Sizes:
    """Return the count and size (out, in) of each kind of matrix that changes."""
    n, d, kv = config.num_visits, config.model_dim, config.kv_dim
    attention = {"q": (n, d, d), "k": (n, kv, d), "v": (n, kv, d), "o": (n, d, d)}
    mlp = {"up": (n, config.mlp_up_rows, d), "down": (n, d, config.mlp_hidden)}
    return {**attention, **mlp, "head": (1, config.vocab_size, d)}


def fresh_factors(sizes: Sizes, rank: int, documents: int, device: torch.device) -> Factors:
    """Return changes of zero: A normal with variance 1 / in, equal for all documents, B zero; float32."""
    sampler, factors = torch.Generator().manual_seed(_SEED), {}
    for name, (count, rows, columns) in sizes.items():
        a = torch.randn(count, rank, columns, generator=sampler) * columns**-0.5
        b = torch.zeros(documents, count, rows, rank, device=device)
        factors[name] = a.to(device).expand(documents, -1, -1, -1).clone(), b
    return factors


def changed_losses(
    model: GPT, banks: Banks, factors: Factors, tokens: Tensor, targets: Tensor, context: int | None = None
) -> Tensor:
    """Return `GPT.token_losses` with row i of tokens (B, T) under the model changed by row i of factors."""
    config, last = model.config, targets.shape[1]
    cast = {name: (a.to(model.compute_dtype), b.to(model.compute_dtype)) for name, (a, b) in factors.items()}
    cos, sin = rope_tables(config, tokens.shape[1], tokens.device, context)

    def linear(x: Tensor, weight: Tensor, name: str, slot: int = 0) -> Tensor:
        a, b = cast[name]
        return torch.baddbmm(F.linear(x, weight), x @ a[:, slot].mT, b[:, slot].mT)

    def attention(visit: Visit, x: Tensor, value_embed: Tensor | None) -> Tensor:
        i, layer, n = visit.number, visit.layer, config.num_layers
        own = model.block(layer).attn
        seen = x[:, -last:] if visit.last else x
        q = linear(seen, banks.qo[layer], "q", i)
        k, v = linear(x, banks.kv[layer], "k", i), linear(x, banks.kv[n + layer], "v", i)
        v = v if value_embed is None else v + value_embed
        heads = (q, k, v, own.q_gain, cos, sin, config.num_kv_heads, model.uses_xsa(layer))
        context = ops.projected_attention(*heads, own.gate(seen, lambda n: q[..., :n]))
        return linear(context, banks.qo[n + layer], "o", i)

    def mlp(visit: Visit, x: Tensor) -> Tensor:
        i, layer = visit.number, visit.layer
        hidden = reference.activation(linear(x, banks.up[layer], "up", i), config.mlp_activation)
        return linear(hidden, banks.down[layer], "down", i)

    x = model.smear(model.embed(tokens))
    x = model.trunk(x, model.value_embeddings(tokens), banks, attention, last=last, mlp=mlp)
    logits = model.head(x, partial(linear, name="head"))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


class Lora(Learner):
    """Low-rank changes of each document, trained by AdamW; the model itself stays as it is.

    A document learns from each of its segments after it is scored. Inputs reach back up to `seq_len` tokens,
    targets are the segment's; gradients are clipped document by document.
    """

    def __init__(
        self,
        model: GPT,
        config: TTTConfig,
        seq_len: int,
        grid: Transform = fake_int6,
        *,
        banks: Callable[[], Banks] | None = None,
        **unused: bool,
    ):
        """Round banks to `grid` if `config.quantize_forward` says so, or read those that `banks` returns.

        With `banks`, the caller owns the model's parameters. `unused` is for other adapters.
        """
        if banks is None:
            freeze(model)
            frozen = model.banks(grid if config.quantize_forward == "banks" else None)
        self._banks = banks or (lambda: frozen)
        self.model, self.config, self.seq_len = model, config, seq_len
        self._sizes = matrices(model.config)
        self.trainable = sum(n * (r + c) for n, r, c in self._sizes.values()) * config.lora.rank
        self.begin(0)

    def begin(self, documents: int) -> None:
        device = self.model.qo_bank.device
        self._factors = fresh_factors(self._sizes, self.config.lora.rank, documents, device)
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
        """Take one step on the first len(x) documents."""
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
            clipped = [g * scale[:, None, None, None] for g in grads]
            adamw_((own[0], clipped, *own[1:]), self._steps, self.config, self.config.lora.lr, None)

    def _lists(self) -> dict[str, Tensors]:
        moments = {"mean": self._means, "square": self._squares}
        return {"factor": self._tensors, **moments, "text": [self._text], "steps": [self._steps]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.begin(len(state["factor.0"]))
        self._text = torch.empty_like(state["text.0"], device=self._text.device)
        super().load_state(state)


class Phased(Lora):
    """`Lora` on segments of documents, on top of `AdamW` on the model itself for chunks of the stream."""

    def __init__(
        self, model: GPT, config: TTTConfig, seq_len: int, grid: Transform = fake_int6, **options: bool
    ):
        """Take the arguments of `Descent`, with which the stream's own is built."""
        self._stream = AdamW(model, config, seq_len, grid, **options)
        super().__init__(model, config, seq_len, banks=self._stream.banks)
        self.trainable += self._stream.trainable

    def adapt(self, scored: Scored) -> None:
        if scored.by_document:
            return super().adapt(scored)
        before = self._stream.updates
        self._stream.adapt(scored)
        self.updates += self._stream.updates - before

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), **{f"stream.{name}": t for name, t in self._stream.state().items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self._stream.load_state({name.removeprefix("stream."): t for name, t in state.items() if "." in name})
