"""The network of PR 1501: a U-Net transformer over weight banks, with the community's state-dict names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf_fast import ops
from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import BANK_NAMES, Banks, Shadow, Transform, make_banks, transformed
from pgolf_fast.model.embeddings import NgramHash, SmearGate, ValueEmbedding
from pgolf_fast.model.rope import rope_tables

# (layer, normalised input, value embedding or None) -> attention output, all (B, T, ...)
Attend = Callable[[int, Tensor, Tensor | None], Tensor]
# (layer, normalised input) -> MLP output, all (B, T, ...)
Feed = Callable[[int, Tensor], Tensor]


class Observer(Protocol):
    """Sees the normalised input of every attention and MLP (for Hessians and analyses)."""

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None: ...

    def mlp_input(self, layer: int, x: Tensor) -> None: ...


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))


class Block(nn.Module):
    """The un-banked parameters of one block."""

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
    """`loss`, `token_losses` and `logits` of token batches; `banks` supplies the weights they read.

    Activations and matmuls run in `compute_dtype`; parameters are kept as they are and cast at use.
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
        self.bigram: NgramHash | None = None
        if config.bigram_vocab_size:
            self.bigram = NgramHash(
                config.bigram_vocab_size,
                config.bigram_dim,
                d,
                pos_conditional=config.pos_conditional,
                trigram=config.trigram,
            )
        self.ve_shared: ValueEmbedding | None = None
        if config.ve_enabled:
            self.ve_shared = ValueEmbedding(config.vocab_size, config.ve_dim, config.kv_dim)
            self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in config.ve_layers)
        if has_leading_space is None:
            has_leading_space = torch.zeros(config.vocab_size, dtype=torch.bool)
        if has_leading_space.shape != (config.vocab_size,):
            raise PgolfError(
                f"has_leading_space has {has_leading_space.numel()} entries but model.vocab_size is "
                f"{config.vocab_size}: use the tokenizer the model was made for"
            )
        self.register_buffer("has_leading_space", has_leading_space.bool(), persistent=False)
        boost = torch.ones((), device=has_leading_space.device)
        if config.bigram_vocab_size and config.word_start_boost:
            self.word_start_boost = nn.Parameter(boost)
        else:
            self.register_buffer("word_start_boost", boost, persistent=False)
        self._shadow = Shadow()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values of PR 1501; like the original's, every one is rounded to bfloat16. None on meta."""
        if self.qo_bank.is_meta:
            return
        n = self.config.num_layers
        nn.init.normal_(self.tok_emb.weight, std=self.config.tied_embed_init_std)
        for i in range(n):
            nn.init.orthogonal_(self.qo_bank[i])
            nn.init.orthogonal_(self.kv_bank[i])
            nn.init.orthogonal_(self.kv_bank[n + i])
            nn.init.orthogonal_(self.mlp_up_bank[i])
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
        """The embedding tables: token, hash n-gram, value."""
        modules = [module for module in (self.bigram, self.ve_shared) if module is not None]
        return [self.tok_emb.weight, *(module.embed.weight for module in modules)]

    def bank_parameters(self) -> list[nn.Parameter]:
        """The four master banks in the order of BANK_NAMES."""
        return [getattr(self, name) for name in BANK_NAMES]

    def allocate_gradient_banks(self) -> None:
        """From now on backward adds bank gradients in place; clear with `zero_grad(set_to_none=False)`."""
        for bank in self.bank_parameters():
            if bank.grad is None:
                bank.grad = torch.zeros_like(bank)

    def banks(self, transform: Transform = None) -> Banks:
        """The banks for one forward: masters after `transform` (say, fake quantisation), in compute dtype.

        With gradient banks allocated, backward adds to them, straight through `transform`. Without, and with
        gradients enabled, autograd reaches the masters through `transform` and the cast.
        """
        masters = self.bank_parameters()
        grads = [m.grad for m in masters if m.grad is not None]
        if torch.is_grad_enabled() and masters[0].requires_grad and not grads:
            return make_banks([w.to(self.compute_dtype) for w in transformed(masters, transform)])
        weights = self._shadow.get(list(masters), self.compute_dtype, transform)
        return make_banks(weights, grads if grads and torch.is_grad_enabled() else None)

    def current_shadows(self) -> list[Tensor] | None:
        """The compute-dtype copies of the banks, if an optimiser may write them along with the masters."""
        return self._shadow.current(list(self.bank_parameters()), self.compute_dtype)

    def shadows_written(self) -> None:
        """An optimiser has written masters and copies together."""
        self._shadow.written(list(self.bank_parameters()), self.compute_dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Normalised sum of token and hash n-gram embeddings, (B, T) -> (B, T, D), before SmearGate."""
        x = F.embedding(tokens, self.tok_emb.weight).to(self.compute_dtype)
        if self.bigram is not None:
            projection = self._projection(self.bigram.proj.weight)
            x = x + self.bigram(tokens, self.has_leading_space, self.word_start_boost, projection)
        return ops.rms_norm(x)

    def value_embeddings(self, tokens: Tensor) -> dict[int, Tensor]:
        """The value embedding of each layer that has one, (B, T, KV*hd)."""
        if self.ve_shared is None:
            return {}
        shared = self.ve_shared(tokens, self._projection(self.ve_shared.proj.weight))
        scales = zip(self.config.ve_layers, self.ve_layer_scales, strict=True)
        return {layer: shared * scale.to(shared.dtype) for layer, scale in scales}

    projection_transform: Callable[[Tensor], Tensor] | None = None
    """Applied to the two small projections at use (the original fake-quantised them in TTT)."""

    def _projection(self, weight: Tensor) -> Tensor:
        if self.projection_transform is not None:
            weight = self.projection_transform(weight)
        return weight.to(self.compute_dtype)

    def trunk(
        self,
        x: Tensor,
        value_embeds: dict[int, Tensor],
        banks: Banks,
        attend: Attend,
        observer: Observer | None = None,
        last: int | None = None,
        feed: Feed | None = None,
    ) -> Tensor:
        """All blocks and the final norm, (B, T, D) -> (B, T, D). The first half of the blocks encode.

        With `last`, only that many last positions leave the last block, whose `attend` must give only these.
        `feed` stands in for the blocks' own MLP.
        """
        x0 = x
        skips: list[Tensor] = []
        encoders = self.config.num_layers // 2
        for i in range(self.config.num_layers):
            if i >= encoders and skips:
                x = torch.addcmul(x, skips.pop(), self.skip_weights[i - encoders].to(x.dtype))
            cut = last if i == self.config.num_layers - 1 else None
            x = self._block(i, x, x0, value_embeds.get(i), banks, attend, observer, cut, feed)
            if i < encoders:
                skips.append(x)
        return ops.rms_norm(x)

    def _block(
        self,
        layer: int,
        x: Tensor,
        x0: Tensor,
        value_embed: Tensor | None,
        banks: Banks,
        attend: Attend,
        observer: Observer | None,
        last: int | None,
        feed: Feed | None,
    ) -> Tensor:
        block = self.block(layer)
        scale = block.layer_scale
        u, normed = ops.residual_norm(x, x0, block.resid_mix[0], block.resid_mix[1], scale)
        if observer is not None:
            observer.attention_input(layer, normed, value_embed)
        if last is not None:  # keys and values need every position, the rest of the block does not
            u = u[:, u.shape[1] - last :].contiguous()
        h, normed = ops.residual_norm(u, attend(layer, normed, value_embed), None, block.attn_scale, scale)
        if observer is not None:
            observer.mlp_input(layer, normed)
        out = self._mlp(layer, normed, banks) if feed is None else feed(layer, normed)
        return torch.addcmul(h, out, block.mlp_scale.to(h.dtype))

    def _mlp(self, layer: int, x: Tensor, banks: Banks) -> Tensor:
        return ops.mlp(
            x,
            banks.up,
            banks.down,
            layer,
            self.config.mlp_activation,
            grad_up=banks.grad_up,
            grad_down=banks.grad_down,
        )

    def block(self, layer: int) -> Block:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block

    def uses_xsa(self, layer: int) -> bool:
        """Whether that block's attention is exclusive: the last xsa_last_n blocks are."""
        return layer >= self.config.num_layers - self.config.xsa_last_n

    def hidden(
        self,
        tokens: Tensor,
        banks: Banks | None = None,
        observer: Observer | None = None,
        *,
        last: int | None = None,
        context: int | None = None,
        feed: Feed | None = None,
    ) -> Tensor:
        """Final normalised states, (B, T) -> (B, T, D), or with `last` of the last positions, (B, last, D).

        `context` is the length for which positions are encoded (default T), as if tokens followed up to it.
        `feed` stands in for the blocks' own MLP.
        """
        banks = banks or self.banks()
        cos, sin = rope_tables(self.config, tokens.shape[1], tokens.device, context)

        def attend(layer: int, x: Tensor, value_embed: Tensor | None) -> Tensor:
            return ops.gqa_attention(
                x,
                banks.qo,
                banks.kv,
                self.block(layer).attn.q_gain,
                value_embed,
                cos,
                sin,
                layer,
                num_kv_heads=self.config.num_kv_heads,
                xsa=self.uses_xsa(layer),
                grad_qo=banks.grad_qo,
                grad_kv=banks.grad_kv,
                window=last if layer == self.config.num_layers - 1 else None,
            )

        x = self.smear(self.embed(tokens))
        return self.trunk(x, self.value_embeddings(tokens), banks, attend, observer, last, feed)

    def token_losses(
        self,
        tokens: Tensor,
        targets: Tensor,
        banks: Banks | None = None,
        *,
        context: int | None = None,
        feed: Feed | None = None,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Cross-entropy in nats of the targets of the last W positions, (B, T) and (B, W) -> (B, W) float32.

        Nothing is computed that only other positions need: in the last block their queries, output projection
        and MLP, and their logits. `context` and `feed` are as in `hidden`. `z_loss` times the squared
        log-partition function is added to each.
        """
        last = None if targets.shape[1] == tokens.shape[1] else targets.shape[1]
        hidden = self.hidden(tokens, banks, last=last, context=context, feed=feed)
        head = self.tok_emb.weight.to(self.compute_dtype)
        return ops.softcap_cross_entropy(hidden, head, targets, self.config.logit_softcap, z_loss)

    def loss(
        self, tokens: Tensor, targets: Tensor, banks: Banks | None = None, *, z_loss: float = 0.0
    ) -> Tensor:
        """Mean cross-entropy of the batch in nats, and `z_loss` as in `token_losses`."""
        return self.token_losses(tokens, targets, banks, z_loss=z_loss).mean()

    forward = loss

    def logits(self, tokens: Tensor, banks: Banks | None = None) -> Tensor:
        """Softcapped logits, (B, T, V) in at least float32."""
        return self.head(self.hidden(tokens, banks))

    def head(self, hidden: Tensor) -> Tensor:
        """Softcapped logits of final states, (..., D) -> (..., V)."""
        raw = F.linear(hidden, self.tok_emb.weight.to(self.compute_dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.config.logit_softcap * torch.tanh(raw / self.config.logit_softcap)
