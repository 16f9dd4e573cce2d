"""The network of PR 1501, built from an artifact's tensors."""

import math
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.artifact.standalone.lora import Changed
from pgolf_fast.artifact.standalone.parts import (
    Attention,
    CrossEntropy,
    Mlp,
    Ngrams,
    Residual,
    Smear,
    int6,
    rms_norm,
    rounded,
)
from pgolf_fast.artifact.standalone.reader import banked, dequantized


class Model:
    """The network of PR 1501 with float32 parameters and activations in `dtype`."""

    def __init__(self, config: SimpleNamespace, arrays: dict, space: Tensor, dtype: torch.dtype):
        self.config, self.space, self.dtype = config.run.model, space, dtype
        trees = [{n: t.to(space.device) for n, t in tree.items()} for tree in dequantized(arrays)]
        layers = self.config.num_layers
        self.masters, self.steps = (banked(tree, layers) for tree in trees[:2])
        self.shifts = banked(trees[2], layers) if trees[2] else [torch.zeros((), device=space.device)] * 4
        self.state = trees[0]
        self.clip = 2 ** (config.bits.codes - 1) - 1

    def banks(self, on_grid: bool) -> list[tuple[Tensor, ...]]:
        """Return the matrices of each bank; `on_grid` rounds them to the artifact's steps first."""
        masters = self.masters
        if on_grid:
            parts = zip(masters, self.steps, self.shifts, strict=True)
            masters = [rounded(w - at, s, -self.clip, self.clip) + at for w, s, at in parts]
        return [bank.to(self.dtype).unbind() for bank in masters]

    def rope(self, length: int) -> list[Tensor]:
        """Return the RoPE tables cos and sin, each (length, 1, r/2)."""
        c, arange = self.config, partial(torch.arange, dtype=torch.float32, device=self.space.device)
        dims = c.rope_dims or c.model_dim // c.num_heads
        base, long = c.rope_base, length > c.rope_train_seq_len
        if long and dims > 2:
            base *= (length / c.rope_train_seq_len) ** (dims / (dims - 2))
        frequencies, positions = base ** -(arange(0, dims, 2) / dims), arange(length)
        if c.rope_bf16_tables and not long:
            frequencies, positions = frequencies.bfloat16(), positions.bfloat16()
        angles = torch.outer(positions, frequencies)
        tables = angles.cos(), angles.sin()
        return [(t.bfloat16() if c.rope_bf16_tables else t).float()[:, None] for t in tables]

    def ngrams(self, tokens: Tensor) -> Tensor:
        """Look up scaled and gated rows of the hash n-gram table, (B, T, width)."""
        c, table, starts = self.config, self.state["bigram.embed.weight"], self.space[tokens]
        before, second = (F.pad(tokens, (n, 0))[:, :-n] for n in (1, 2))
        key = (36313 * tokens) ^ (27191 * before)
        indices, last = [key, key ^ (51497 * second)][: 1 + c.trigram], len(table) - 1
        for i, index in enumerate(indices):
            indices[i] = index % (last // 2) + ~starts * (last // 2) if c.pos_conditional else index % last
            indices[i][:, : i + 1] = last
        boost = self.state.get("word_start_boost", torch.ones((), device=table.device))
        return Ngrams.apply(table, self.state["bigram.scale"], boost, starts, indices, self.dtype)

    def losses(
        self, tokens: Tensor, targets: Tensor, banks: list, fake: bool = False, changes: list | None = None
    ) -> Tensor:
        """Return the cross-entropy of every target in nats, (B, T) float32.

        `fake` rounds the embeddings' projections to 6 bits. With low-rank `changes` per row, targets may be
        those of the last positions only.
        """
        c, s, dtype, (qo, kv, up, down) = self.config, self.state, self.dtype, banks
        project = int6 if fake else Tensor.float
        x = F.embedding(tokens, s["tok_emb.weight"]).to(dtype)
        if c.bigram_vocab_size:
            x = x + F.linear(self.ngrams(tokens), project(s["bigram.proj.weight"]).to(dtype))
        x = rms_norm(x)
        x0 = x = Smear.apply(x, s["smear.gate"]) if "smear.gate" in s else x
        extra: dict[int, Tensor] = {}
        if c.ve_enabled:
            rows = F.embedding(tokens, s["ve_shared.embed.weight"]).to(dtype)
            rows = F.linear(rows, project(s["ve_shared.proj.weight"]).to(dtype))
            shared = rows * s["ve_shared.scale"].to(dtype)
            for i, layer in enumerate(c.ve_layers):
                extra[layer] = shared * s[f"ve_layer_scales.{i}"].to(dtype)
        changed = changes and Changed(changes, dtype)
        (cos, sin), n, first_xsa = self.rope(tokens.shape[1]), c.num_layers, c.num_layers - c.xsa_last_n
        skips: list[Tensor] = []
        for i in range(n):
            if i >= n // 2 and skips:
                x = torch.addcmul(x, skips.pop(), s["skip_weights"][i - n // 2].to(dtype))
            parts = ("resid_mix", "attn.q_gain", "attn_scale", "mlp_scale")
            mix, gain, attn_scale, mlp_scale = (s[f"blocks.{i}.{part}"] for part in parts)
            scale = 1 / math.sqrt(i + 1) if c.ln_scale else 1.0
            u, normed = Residual.apply(x, x0, mix[0], mix[1], scale)
            weights = (qo[i], kv[i], kv[n + i], qo[n + i])
            inputs = normed, *weights, gain, extra.get(i), cos, sin, c.num_kv_heads, i >= first_xsa
            last = targets.shape[1] if i == n - 1 else None
            y = changed.attend(i, last, *inputs) if changed else Attention.apply(*inputs)
            if last:
                u = u[:, -last:].contiguous()
            h, normed = Residual.apply(u, y, None, attn_scale, scale)
            mlp = normed, up[i], down[i], c.mlp_activation
            out = changed.mlp(i, *mlp) if changed else Mlp.apply(*mlp)
            x = torch.addcmul(h, out, mlp_scale.to(dtype))
            if i < n // 2:
                skips.append(x)
        x, head = rms_norm(x), s["tok_emb.weight"].to(dtype)
        if changed:
            return changed.losses(x, head, targets, c.logit_softcap)
        losses = CrossEntropy.apply(x.flatten(0, 1), head, targets.flatten(), c.logit_softcap)
        return losses.view_as(targets)
