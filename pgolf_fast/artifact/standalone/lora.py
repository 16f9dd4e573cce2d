"""LoRA: low-rank changes of the network's matrices, separate for each document of a batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.artifact.standalone.parts import activated, rms_norm, rotate


def fresh_changes(banks: list, head: Tensor, rank: int, documents: int) -> list[Tensor]:
    """Initialize A (documents, layers, rank, in), normal, and B (documents, layers, out, rank), zero.

    B A is added to each matrix: Q, K, V, output, MLP up and down, and the head.
    """
    qo, kv, up, down = banks
    sampler = torch.Generator().manual_seed(1337)
    tensors: list[Tensor] = []
    for weight in (qo[0], kv[0], kv[0], qo[0], up[0], down[0], head):
        (rows, columns), count = weight.shape, 1 if weight is head else len(up)
        a = torch.randn(count, rank, columns, generator=sampler) * columns**-0.5
        a, b = a.expand(documents, -1, -1, -1), torch.zeros(documents, count, rows, rank)
        tensors += a.to(weight.device, copy=True).contiguous(), b.to(weight.device)
    return tensors


class Changed:
    """Layers of the network with separate `changes` for each row of a batch."""

    def __init__(self, changes: list[Tensor], dtype: torch.dtype):
        self.changes = [t.to(dtype) for t in changes]

    def linear(self, x: Tensor, weight: Tensor, which: int, layer: int = 0) -> Tensor:
        a, b = self.changes[2 * which : 2 * which + 2]
        return torch.baddbmm(F.linear(x, weight), x @ a[:, layer].mT, b[:, layer].mT)

    def attend(self, layer, last, x, wq, wk, wv, wo, gain, extra, cos, sin, kv_heads, xsa) -> Tensor:
        queries = x if last is None else x[:, -last:]
        first, groups = x.shape[1] - queries.shape[1], len(gain) // kv_heads
        q = self.linear(queries, wq, 0, layer).unflatten(-1, (len(gain), -1))
        k = self.linear(x, wk, 1, layer).unflatten(-1, (kv_heads, -1))
        v = self.linear(x, wv, 2, layer)
        v = (v if extra is None else v + extra).unflatten(-1, (kv_heads, -1))
        q = rotate(rms_norm(q).float(), cos[first:], sin[first:]) * gain[:, None]
        k = rotate(rms_norm(k).float(), cos, sin)
        dtype = v.dtype if v.is_cuda else torch.float32
        heads = (t.repeat_interleave(n, 2) for t, n in ((q, 1), (k, groups), (v.to(dtype), groups)))
        q, k, values = (t.to(dtype).transpose(1, 2) for t in heads)
        seen = None
        if first:
            seen = torch.ones(last, x.shape[1], dtype=torch.bool, device=x.device).tril(first)
        y = F.scaled_dot_product_attention(q, k, values, seen, is_causal=not first)
        y = y.transpose(1, 2).to(x.dtype)
        if xsa:
            unit = F.normalize(v[:, first:].float(), dim=-1, eps=1e-12).unsqueeze(3)
            parts = y.float().unflatten(2, (kv_heads, -1))
            y = (parts - (parts * unit).sum(-1, keepdim=True) * unit).to(x.dtype)
        return self.linear(y.reshape(*y.shape[:2], -1), wo, 3, layer)

    def mlp(self, layer: int, x: Tensor, up: Tensor, down: Tensor, kind: str) -> Tensor:
        hidden = activated(self.linear(x, up, 4, layer).float(), kind)
        return self.linear(hidden.to(x.dtype), down, 5, layer)

    def losses(self, x: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
        logits = cap * torch.tanh(self.linear(x, head, 6).float() / cap)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class Learner:
    """AdamW on the changes of a batch of documents that start together."""

    def __init__(self, model, config, documents: int):
        self.model, self.config = model, config
        head, self.banks = model.state["tok_emb.weight"], model.banks(config.ttt.quantize_forward == "banks")
        self.tensors = fresh_changes(self.banks, head, config.ttt.lora.rank, documents)
        self.means, self.squares = ([torch.zeros_like(t) for t in self.tensors] for _ in range(2))
        self.steps = torch.zeros((), device=head.device)
        self.text = torch.zeros(documents, 0, dtype=torch.int64, device=head.device)

    def learn(self, tokens: Tensor) -> None:
        """Train on the last n targets of the first m documents, tokens (m, n + 1)."""
        c, many, size = self.config.ttt, len(tokens), tokens.shape[1] - 1
        length = max(self.config.eval.seq_len or self.config.train.seq_len, size)
        self.text = torch.cat((self.text[:many], tokens[:, bool(self.text.shape[1]) :]), 1)[:, -length - 1 :]
        for _ in range(c.lora.epochs):
            kinds = (self.tensors, self.means, self.squares)
            own, means, squares = ([t[:many] for t in tensors] for tensors in kinds)
            leaves = [t.detach().requires_grad_() for t in own]
            losses = self.model.losses(self.text[:, :-1], tokens[:, 1:], self.banks, changes=leaves)
            grads = torch.autograd.grad(losses.mean(1).sum(), leaves)
            norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads])
            limit = c.grad_clip or math.inf
            scale = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp_(max=1.0)
            clipped = [g * scale[:, None, None, None] for g in grads]
            self.steps += 1
            counts = [self.steps] * len(grads)
            rule = {"lr": c.lora.lr, "beta1": c.momentum, "beta2": c.beta2, "weight_decay": c.weight_decay}
            torch._fused_adamw_(
                own, clipped, means, squares, [], counts, **rule, eps=1e-8, amsgrad=False, maximize=False
            )
