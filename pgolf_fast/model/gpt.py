"""The network of PR 1501: a U-Net transformer over weight banks, with the community's state-dict names."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.model.bank import (
    BANK_NAMES,
    Banks,
    PackedBanks,
    Shadow,
    Transform,
    make_banks,
    slot_rows,
    transformed,
)
from pgolf_fast.model.block import Block
from pgolf_fast.model.embeddings import NgramHash, SmearGate, ValueEmbedding, gated_smear
from pgolf_fast.model.plan import Visit, visit_plan
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.model.segments import Segments

AnyBanks = Banks | PackedBanks
# (visit, normalized input, value embedding or None) -> attention output, all (B, T, ...)
AttentionFunction = Callable[[Visit, Tensor, Tensor | None], Tensor]
# (visit, normalized input) -> MLP output, all (B, T, ...)
MLPFunction = Callable[[Visit, Tensor], Tensor]


class Observer(Protocol):
    """Hooks on the normalized input of every attention and MLP, at every visit of a block."""

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None: ...

    def mlp_input(self, layer: int, x: Tensor) -> None: ...


class GPT(nn.Module):
    """The network: `loss`, `token_losses` and `logits` of token batches, with weights read from `banks`.

    Activations and matmuls run in `compute_dtype`; parameters keep their dtype and are cast at use.
    """

    has_leading_space: Tensor
    word_start_boost: Tensor
    looping: bool
    """Whether a forward makes the extra passes of the loop; training begins without them."""

    def __init__(
        self,
        config: ModelConfig,
        has_leading_space: Tensor | None = None,
        *,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config, self.compute_dtype, self.looping = config, compute_dtype, True
        self._plans = visit_plan(config, looping=False), visit_plan(config)
        n, d = config.num_layers, config.model_dim
        self.qo_bank = nn.Parameter(torch.zeros(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.zeros(2 * n, config.kv_dim, d))
        self.mlp_up_bank = nn.Parameter(torch.zeros(n, config.mlp_up_rows, d))
        self.mlp_down_bank = nn.Parameter(torch.zeros(n, d, config.mlp_hidden))
        self.tok_emb = nn.Embedding(config.vocab_size, d)
        self.smear = SmearGate(d) if config.smear and not config.smear_gated else nn.Identity()
        if config.smear_gated:
            self.smear_gate = nn.Linear(config.gate_window, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.blocks = nn.ModuleList(Block(config, i) for i in range(n))
        self.skip_weights = nn.Parameter(torch.ones(config.num_skips, d))
        if config.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(config.num_skips, d))
        if config.lanes_from is not None:
            # by layer and lane: of attention and MLP output, and of the lane itself
            self.parallel_post_lambdas = nn.Parameter(torch.ones(n, 2, 2))
            self.parallel_resid_lambdas = nn.Parameter(torch.full((n, 2), 1.1))
        self.bigram = NgramHash(config) if config.bigram_vocab_size else None
        self.ve_shared = ValueEmbedding(config) if config.ve_enabled else None
        if config.ve_enabled:
            self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in config.ve_layers)
        vocab = config.vocab_size
        spaces = torch.zeros(vocab, dtype=torch.bool) if has_leading_space is None else has_leading_space
        problem = f"has_leading_space has {spaces.numel()} entries but model.vocab_size is {vocab}"
        need(spaces.shape == (vocab,), f"{problem}: use the tokenizer the model was made for")
        self.register_buffer("has_leading_space", spaces.bool(), persistent=False)
        boost = torch.ones((), device=spaces.device)
        if config.bigram_vocab_size and config.word_start_boost:
            self.word_start_boost = nn.Parameter(boost)
        else:
            self.register_buffer("word_start_boost", boost, persistent=False)
        self._shadow = Shadow()
        self.packed: PackedBanks | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial values of PR 1501, rounded to bfloat16 as there. A no-op on the meta device."""
        if self.qo_bank.is_meta:
            return
        n = self.config.num_layers
        nn.init.normal_(self.tok_emb.weight, std=self.config.tied_embed_init_std)
        for i in range(n):
            for matrix in (self.qo_bank[i], self.kv_bank[i], self.kv_bank[n + i], self.mlp_up_bank[i]):
                nn.init.orthogonal_(matrix)
        self.skip_weights[len(self.skip_weights) - self.config.frozen_skips :] = 0
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.embed.weight)
            nn.init.orthogonal_(self.bigram.proj.weight)
        if self.ve_shared is not None:
            nn.init.normal_(self.ve_shared.embed.weight, std=0.01)
            nn.init.orthogonal_(self.ve_shared.proj.weight)
        if self.config.smear_gated:
            nn.init.zeros_(self.smear_gate.weight)
        if self.config.head_gate == "dense":
            for i in range(n):
                nn.init.normal_(self.block(i).attn.attn_gate_w, std=0.01)
        for parameter in self.parameters():
            parameter.copy_(parameter.bfloat16())

    def tables(self) -> list[Tensor]:
        """Return the embedding tables: token, hash n-gram, value."""
        modules = [module for module in (self.bigram, self.ve_shared) if module is not None]
        return [self.tok_emb.weight, *(module.embed.weight for module in modules)]

    def bank_parameters(self) -> list[nn.Parameter]:
        """Return the four master banks in the order of BANK_NAMES."""
        return [getattr(self, name) for name in BANK_NAMES]

    def allocate_gradient_banks(self) -> None:
        """Let backward add bank gradients in place; clear them with `zero_grad(set_to_none=False)`."""
        for bank in self.bank_parameters():
            if bank.grad is None:
                bank.grad = torch.zeros_like(bank)

    def use_packed(self, packed: PackedBanks) -> None:
        """Read the banks from packed codes from now on; the master banks become empty."""
        packed.dtype, self.packed = self.compute_dtype, packed
        for name in BANK_NAMES:
            empty = torch.empty(0, device=self.tok_emb.weight.device)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[None]:
        """Give a packed model float32 master banks, which may be trained; they are dropped on exit."""
        if (packed := self.packed) is None:
            yield
            return
        for name, bank in zip(BANK_NAMES, packed.unpacked(), strict=True):
            setattr(self, name, nn.Parameter(bank))
        self.packed = None
        try:
            yield
        finally:
            self._shadow = Shadow()
            self.use_packed(packed)

    def reading_banks(self, transform: Transform = None) -> AnyBanks:
        """Return the banks for inference: packed ones, or `banks(transform)`."""
        return self.packed if self.packed and transform is None else self.banks(transform)

    def banks(self, transform: Transform = None) -> Banks:
        """Return the banks for one forward: masters after `transform`, in compute dtype.

        With gradient banks allocated, backward adds to them, straight through `transform`. Otherwise, with
        gradients enabled, autograd reaches the masters through `transform` and the cast. Raises PgolfError
        for a packed model, whose masters are empty.
        """
        need(self.packed is None, "packed banks decode and score only: load the model with float ones")
        masters = self.bank_parameters()
        grads = [m.grad for m in masters if m.grad is not None]
        if torch.is_grad_enabled() and masters[0].requires_grad and not grads:
            return make_banks([w.to(self.compute_dtype) for w in transformed(masters, transform)])
        weights = self._shadow.get(list(masters), self.compute_dtype, transform)
        return make_banks(weights, grads if grads and torch.is_grad_enabled() else None)

    def current_shadows(self) -> list[Tensor] | None:
        """Return the compute-dtype copies of the banks if an optimizer may write them with the masters."""
        return self._shadow.current(list(self.bank_parameters()), self.compute_dtype)

    def shadows_written(self) -> None:
        """Record that an optimizer has written masters and copies together."""
        self._shadow.written(list(self.bank_parameters()), self.compute_dtype)

    def embed(
        self, tokens: Tensor, projection: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        """Return normalized token plus n-gram embeddings, (B, T, D); `projection` replaces the n-grams'.

        The gated SmearGate acts on the token embeddings; n-grams stay inside `segments`.
        """
        x = F.embedding(tokens, self.tok_emb.weight).to(self.compute_dtype)
        if self.config.smear_gated:
            x = gated_smear(x, self.smear_gate.weight, self.smear_lambda, tokens == self.config.bos_id)
        if self.bigram is not None:
            weight = self.bigram.proj.weight if projection is None else projection
            space, boost, weight = self.has_leading_space, self.word_start_boost, weight.to(x.dtype)
            ngrams = partial(self.bigram, has_leading_space=space, boost=boost, projection=weight)
            x = x + (segments.apart(ngrams, tokens) if segments else ngrams(tokens))
        return ops.rms_norm(x)

    def value_embeddings(self, tokens: Tensor, projection: Tensor | None = None) -> dict[int, Tensor]:
        """Return the value embedding of each layer that has one, (B, T, KV*hd), by `projection` if given."""
        if self.ve_shared is None:
            return {}
        weight = self.ve_shared.proj.weight if projection is None else projection
        shared = self.ve_shared(tokens, weight.to(self.compute_dtype))
        scales = zip(self.config.ve_layers, self.ve_layer_scales, strict=True)
        return {layer: shared * scale.to(shared.dtype) for layer, scale in scales}

    def trunk(
        self,
        x: Tensor,
        value_embeds: dict[int, Tensor],
        banks: AnyBanks,
        attention: AttentionFunction,
        observer: Observer | None = None,
        last: int | None = None,
        mlp: MLPFunction | None = None,
    ) -> Tensor:
        """Run the blocks as `plan` says and the final norm, (B, T, D) -> (B, T, D).

        The second half adds outputs of the first in reverse order. With `last`, only so many positions leave
        the last visit, whose `attention` must return only those. `mlp` replaces the blocks' own MLP.
        """
        mlp = mlp or partial(self._mlp, banks)
        skips: list[Tensor] = []
        x0, lane = x, None  # x is the lane of attention, once there are two
        for visit in self.plan:
            layer, block, value_embed = visit.layer, self.block(visit.layer), value_embeds.get(visit.layer)
            if visit.lanes and lane is None:
                lane = x
            if visit.skip is not None:
                x = self.join(x, skips.pop(), visit.skip)
            mix = block.resid_mix
            mixed, normed = ops.residual_norm(x, x0, mix[0], mix[1], block.layer_scale)
            x = mixed if lane is None else x  # a lane does not keep what it has read of x0
            if observer is not None:
                observer.attention_input(layer, normed, value_embed)
            if last is not None and visit.last:
                # keys and values need every position, the rest of the block does not
                x = x[:, x.shape[1] - last :].contiguous()
                lane = lane if lane is None else lane[:, lane.shape[1] - last :].contiguous()
            out = attention(visit, normed, value_embed)
            if lane is None:
                x, normed = ops.residual_norm(x, out, None, block.attn_scale, block.layer_scale)
            else:
                normed = block.layer_scale * ops.rms_norm(lane)
            if observer is not None:
                observer.mlp_input(layer, normed)
            hidden, scale = mlp(visit, normed), block.mlp_scale.to(x.dtype)
            if lane is None:
                x = torch.addcmul(x, hidden, scale)
            else:
                x, lane = self._lanes(layer, x, lane, out * block.attn_scale.to(x.dtype), hidden * scale)
            if visit.push:
                skips.append(x)
        if lane is not None:
            x = {"mean": (x + lane) / 2, "attention": x, "mlp": lane}[self.config.lanes_end]
        return ops.rms_norm(x)

    def _lanes(self, layer: int, a: Tensor, b: Tensor, attended: Tensor, hidden: Tensor) -> list[Tensor]:
        """Return both lanes after a block: each is scaled and gets a share of both outputs (PR 1529)."""
        post, kept = self.parallel_post_lambdas[layer].to(a), self.parallel_resid_lambdas[layer].to(a)
        return [kept[i] * x + post[0, i] * attended + post[1, i] * hidden for i, x in enumerate((a, b))]

    @property
    def plan(self) -> tuple[Visit, ...]:
        return self._plans[self.looping]

    def join(self, x: Tensor, skip: Tensor, row: int) -> Tensor:
        """Return x with a U-Net skip, (B, T, D), weighed by a row of skip_weights, or mixed by its gate."""
        weight = self.skip_weights[row].to(x.dtype)
        if not self.config.skip_gates:
            return torch.addcmul(x, skip, weight)
        return torch.lerp(weight * skip, x, torch.sigmoid(self.skip_gates[row]).to(x.dtype))

    def _mlp(self, banks: AnyBanks, visit: Visit, x: Tensor) -> Tensor:
        kind, (up, down, slot) = self.config.mlp_activation, banks.mlp_of(visit.layer)
        return ops.mlp(x, up, down, slot, kind, grad_up=banks.grad_up, grad_down=banks.grad_down)

    def block(self, layer: int) -> Block:
        return self.blocks[layer]  # type: ignore[return-value]

    def uses_xsa(self, layer: int) -> bool:
        """Return whether a block's attention is exclusive (XSA), as in the last xsa_last_n blocks."""
        return layer >= self.config.num_layers - self.config.xsa_last_n

    def hidden(
        self,
        tokens: Tensor,
        banks: AnyBanks | None = None,
        observer: Observer | None = None,
        *,
        last: int | None = None,
        context: int | None = None,
        mlp: MLPFunction | None = None,
        segments: Segments | None = None,
    ) -> Tensor:
        """Return final normalized states, (B, T) -> (B, T, D); with `last`, those of the last positions only.

        `context` is the length that the position encoding assumes (default: that of a row, or the most of a
        segment); `mlp` is as in `trunk`. With `segments`, B is 1, and a position sees its segment only.
        """
        banks, config = banks or self.reading_banks(), self.config
        if segments is not None:
            context = context or segments.max_seqlen
        cos, sin = rope_tables(config, tokens.shape[1], tokens.device, context)

        def attention(visit: Visit, x: Tensor, value_embed: Tensor | None) -> Tensor:
            layer, window = visit.layer, last if visit.last else None
            own, (qo, kv, slot) = self.block(layer).attn, banks.attention_of(layer)
            seen = x if window is None else x[:, x.shape[1] - window :]
            gate = own.gate(seen, lambda n: F.linear(seen, slot_rows(qo, slot, n, banks.grad_qo)))
            heads: dict[str, Any] = {"num_kv_heads": config.num_kv_heads, "xsa": self.uses_xsa(layer)}
            heads |= {"window": window, "grad_qo": banks.grad_qo, "grad_kv": banks.grad_kv, "gate": gate}
            heads |= segments._asdict() if segments else {}
            return ops.gqa_attention(x, qo, kv, own.q_gain, value_embed, cos, sin, slot, **heads)

        x = self.embed(tokens, banks.ngram_projection, segments)
        if isinstance(self.smear, SmearGate):
            x = segments.apart(self.smear, x) if segments else self.smear(x)
        values = self.value_embeddings(tokens, banks.value_projection)
        return self.trunk(x, values, banks, attention, observer, last, mlp)

    def token_losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        banks: AnyBanks | None = None,
        *,
        z_loss: float = 0.0,
        **options: Any,
    ) -> Tensor:
        """Return the cross-entropy in nats of the last W positions, (B, T) and (B, W) -> (B, W) float32.

        Queries, output projection and MLP of the last block, and logits, are computed for these only.
        `options` are `context`, `mlp` and `segments` of `hidden`. `z_loss` times the squared log-partition
        function is added.
        """
        last = None if targets.shape[1] == tokens.shape[1] else targets.shape[1]
        hidden = self.hidden(tokens, banks, last=last, **options)
        head = self.tok_emb.weight.to(self.compute_dtype)
        return ops.softcap_cross_entropy(hidden, head, targets, self.config.logit_softcap, z_loss)

    def loss(self, tokens: Tensor, targets: Tensor, banks: AnyBanks | None = None, **options: Any) -> Tensor:
        """Return the mean cross-entropy of the batch in nats; `options` are those of `token_losses`."""
        return self.token_losses(tokens, targets, banks, **options).mean()

    forward = loss

    def logits(self, tokens: Tensor) -> Tensor:
        """Return softcapped logits, (B, T, V) in at least float32."""
        return self.head(self.hidden(tokens))

    def head(self, hidden: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """Return softcapped logits of final states, (..., D) -> (..., V)."""
        raw = linear(hidden, self.tok_emb.weight.to(self.compute_dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.config.logit_softcap * torch.tanh(raw / self.config.logit_softcap)
