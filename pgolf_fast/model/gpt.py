"""The network of PR 1501: a U-Net transformer over weight banks, with the community's state-dict names."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.model.bank import BANK_NAMES, Banks, PackedBanks, Shadow, Transform, make_banks, transformed

AnyBanks = Banks | PackedBanks
# (layer, normalized input, value embedding or None) -> attention output, all (B, T, ...)
AttentionFunction = Callable[[int, Tensor, Tensor | None], Tensor]
# (layer, normalized input) -> MLP output, all (B, T, ...)
MLPFunction = Callable[[int, Tensor], Tensor]


class Observer(Protocol):
    """Hooks on the normalized input of every attention and MLP, for Hessians and analyses."""

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None: ...

    def mlp_input(self, layer: int, x: Tensor) -> None: ...


def rope_base(config: ModelConfig, context: int) -> float:
    """Return the base for `context` tokens: base * (context / trained)^(r / (r - 2)) beyond `trained`."""
    dims = config.rotary_dims
    if context <= config.rope_train_seq_len or dims <= 2:
        return config.rope_base
    return config.rope_base * (context / config.rope_train_seq_len) ** (dims / (dims - 2))


@cache  # never evicted: captured CUDA graphs keep reading them
def _tables(config: ModelConfig, length: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    dims = config.rotary_dims
    with torch.inference_mode(False), torch.no_grad():
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
        frequencies = rope_base(config, context) ** -exponents
        positions = torch.arange(length, dtype=torch.float32, device=device)
        if config.rope_bf16_tables and context <= config.rope_train_seq_len:
            frequencies, positions = frequencies.bfloat16(), positions.bfloat16()
        angles = torch.outer(positions, frequencies)
        stored = torch.bfloat16 if config.rope_bf16_tables else angles.dtype
        return angles.cos().to(stored).float(), angles.sin().to(stored).float()


def rope_tables(
    config: ModelConfig, length: int, device: torch.device, context: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (length, r/2) float32, for positions 0 .. length-1.

    `context` (default: length) sets only the base: text that grows token by token uses its final length.
    """
    # a compiled graph keeps the tables; a cached function would only warn
    tables = _tables.__wrapped__ if torch.compiler.is_compiling() else _tables
    return tables(config, length, context or length, device)


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))


class Block(nn.Module):
    """The parameters of one block that are not in a bank."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        dim = config.model_dim
        self.attn = _Attention(config)
        self.attn_scale = nn.Parameter(torch.full((dim,), 0.1 if layer == 0 else 1.0))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.ones(2, dim))
        self.resid_mix.data[1] = 0
        self.layer_scale = 1 / math.sqrt(layer + 1) if config.ln_scale else 1.0


class GPT(nn.Module):
    """The network: `loss`, `token_losses` and `logits` of token batches, with weights read from `banks`.

    Activations and matmuls run in `compute_dtype`; parameters keep their dtype and are cast at use.
    """

    has_leading_space: Tensor
    word_start_boost: Tensor

    def __init__(
        self,
        config: ModelConfig,
        has_leading_space: Tensor | None = None,
        *,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        n, d = config.num_layers, config.model_dim
        self.qo_bank = nn.Parameter(torch.zeros(2 * n, d, d))
        self.kv_bank = nn.Parameter(torch.zeros(2 * n, config.kv_dim, d))
        self.mlp_up_bank = nn.Parameter(torch.zeros(n, config.mlp_up_rows, d))
        self.mlp_down_bank = nn.Parameter(torch.zeros(n, d, config.mlp_hidden))
        self.tok_emb = nn.Embedding(config.vocab_size, d)
        self.smear = SmearGate(d) if config.smear else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(n))
        self.skip_weights = nn.Parameter(torch.ones(config.num_skips, d))
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

    def embed(self, tokens: Tensor, projection: Tensor | None = None) -> Tensor:
        """Return normalized token plus n-gram embeddings, (B, T, D); `projection` replaces the n-grams'."""
        x = F.embedding(tokens, self.tok_emb.weight).to(self.compute_dtype)
        if self.bigram is not None:
            weight = self.bigram.proj.weight if projection is None else projection
            weight = weight.to(self.compute_dtype)
            x = x + self.bigram(tokens, self.has_leading_space, self.word_start_boost, weight)
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
        """Run all blocks and the final norm, (B, T, D) -> (B, T, D).

        The second half adds outputs of the first in reverse order. With `last`, only so many positions leave
        the last block, whose `attention` must return only those. `mlp` replaces the blocks' own MLP.
        """
        mlp = mlp or partial(self._mlp, banks)
        x0, n, encoders = x, self.config.num_layers, self.config.num_layers // 2
        skips: list[Tensor] = []
        for i in range(n):
            block, value_embed = self.block(i), value_embeds.get(i)
            if i >= encoders and skips:
                x = torch.addcmul(x, skips.pop(), self.skip_weights[i - encoders].to(x.dtype))
            x, normed = ops.residual_norm(x, x0, block.resid_mix[0], block.resid_mix[1], block.layer_scale)
            if observer is not None:
                observer.attention_input(i, normed, value_embed)
            if last is not None and i == n - 1:
                # keys and values need every position, the rest of the block does not
                x = x[:, x.shape[1] - last :].contiguous()
            out = attention(i, normed, value_embed)
            x, normed = ops.residual_norm(x, out, None, block.attn_scale, block.layer_scale)
            if observer is not None:
                observer.mlp_input(i, normed)
            x = torch.addcmul(x, mlp(i, normed), block.mlp_scale.to(x.dtype))
            if i < encoders:
                skips.append(x)
        return ops.rms_norm(x)

    def _mlp(self, banks: AnyBanks, layer: int, x: Tensor) -> Tensor:
        kind, (up, down, slot) = self.config.mlp_activation, banks.mlp_of(layer)
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
    ) -> Tensor:
        """Return final normalized states, (B, T) -> (B, T, D); with `last`, those of the last positions only.

        `context` is the length that the position encoding assumes (default T); `mlp` is as in `trunk`.
        """
        banks, config = banks or self.reading_banks(), self.config
        cos, sin = rope_tables(config, tokens.shape[1], tokens.device, context)

        def attention(layer: int, x: Tensor, value_embed: Tensor | None) -> Tensor:
            gain, window = self.block(layer).attn.q_gain, last if layer == config.num_layers - 1 else None
            heads: dict[str, Any] = {"num_kv_heads": config.num_kv_heads, "xsa": self.uses_xsa(layer)}
            heads |= {"window": window, "grad_qo": banks.grad_qo, "grad_kv": banks.grad_kv}
            qo, kv, slot = banks.attention_of(layer)
            return ops.gqa_attention(x, qo, kv, gain, value_embed, cos, sin, slot, **heads)

        x = self.smear(self.embed(tokens, banks.ngram_projection))
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
        `options`: `context`, `mlp` of `hidden`. `z_loss` times the squared log-partition function is added.
        """
        last = None if targets.shape[1] == tokens.shape[1] else targets.shape[1]
        hidden = self.hidden(tokens, banks, last=last, **options)
        head = self.tok_emb.weight.to(self.compute_dtype)
        return ops.softcap_cross_entropy(hidden, head, targets, self.config.logit_softcap, z_loss)

    def loss(
        self, tokens: Tensor, targets: Tensor, banks: AnyBanks | None = None, *, z_loss: float = 0.0
    ) -> Tensor:
        """Return the mean cross-entropy of the batch in nats; `z_loss` is as in `token_losses`."""
        return self.token_losses(tokens, targets, banks, z_loss=z_loss).mean()

    forward = loss

    def logits(self, tokens: Tensor) -> Tensor:
        """Return softcapped logits, (B, T, V) in at least float32."""
        return self.head(self.hidden(tokens))

    def head(self, hidden: Tensor, linear: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
        """Return softcapped logits of final states, (..., D) -> (..., V)."""
        raw = linear(hidden, self.tok_emb.weight.to(self.compute_dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.config.logit_softcap * torch.tanh(raw / self.config.logit_softcap)


class NgramHash(nn.Module):
    """Hash n-gram embedding: table rows by bigram (and trigram), projected to the model width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.bigram_vocab_size, config.bigram_dim)
        self.proj = nn.Linear(config.bigram_dim, config.model_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.pos_conditional, self.trigram = config.pos_conditional, config.trigram

    def forward(self, tokens: Tensor, has_leading_space: Tensor, boost: Tensor, projection: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, D) in the projection's dtype.

        Scale and word-start gate act on the table rows, which are narrower: the projection is linear.
        """
        given = (tokens, self.embed.weight, has_leading_space, self.scale, boost)
        kind: dict[str, Any] = {"pos_conditional": self.pos_conditional, "trigram": self.trigram}
        return F.linear(ops.ngram_hash_embed(*given, **kind, out_dtype=projection.dtype), projection)


class SmearGate(nn.Module):
    """Mix of each position with the one before it, by a learned gate per channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.smear_gate(x, self.gate)


class ValueEmbedding(nn.Module):
    """A token table projected to the width of the attention values."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.ve_dim)
        self.proj = nn.Linear(config.ve_dim, config.kv_dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, tokens: Tensor, projection: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, KV*hd) in the projection's dtype."""
        rows = F.embedding(tokens, self.embed.weight).to(projection.dtype)
        return F.linear(rows, projection) * self.scale.to(projection.dtype)
