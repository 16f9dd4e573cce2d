"""Writing text token by token: keys and values of earlier positions are kept, not computed again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import reference

NGRAM_REACH = 3  # tokens that the longest hash n-gram sees


class Decoder:
    """Logits of a batch of growing texts, one position a `step`: those of `model.logits` of the whole prefix.

    `context` (default: max_length) sets the RoPE base, as in `rope_tables`. The model's weights must not
    change between steps. Memory: 2 * layers * batch * max_length * KV*hd values in the model's compute dtype.
    Raises PgolfError for sizes below 1.
    """

    def __init__(self, model: GPT, batch_size: int, max_length: int, *, context: int | None = None):
        if batch_size < 1 or max_length < 1:
            raise PgolfError(f"decoding {batch_size} texts of {max_length} tokens: both must be at least 1")
        config, device = model.config, model.tok_emb.weight.device
        self.model, self.batch_size, self.max_length, self.length = model, batch_size, max_length, 0
        self._cos, self._sin = rope_tables(config, max_length, device, context=context)
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        with torch.no_grad(), torch.inference_mode(False):
            self._keys = torch.empty(shape, dtype=model.compute_dtype, device=device)
            self._values = torch.empty_like(self._keys)
            self._banks = model.banks()
        self._recent: list[Tensor] = []  # the last tokens, oldest first, for the hash n-grams
        self._previous: Tensor | None = None  # embedding of the last position, before SmearGate

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B,) and return the logits of what comes next, (B, V) in at least float32.

        Raises PgolfError when the texts already have max_length tokens, or for another batch size.
        """
        if self.length == self.max_length:
            raise PgolfError(
                f"the texts already have {self.max_length} tokens, for which the decoder was made"
            )
        if tokens.shape != (self.batch_size,):
            raise PgolfError(
                f"a step of shape {tuple(tokens.shape)} was given; it must be ({self.batch_size},)"
            )
        self._recent = [*self._recent[1 - NGRAM_REACH :], tokens]
        embedded = self.model.embed(torch.stack(self._recent, dim=1))[:, -1:]
        pair = embedded if self._previous is None else torch.cat((self._previous, embedded), dim=1)
        x = self.model.smear(pair)[:, -1:]
        values = self.model.value_embeddings(tokens[:, None])
        hidden = self.model.trunk(x, values, self._banks, self._attend)
        self._previous, self.length = embedded, self.length + 1
        return self.model.head(hidden[:, -1])

    def _attend(self, layer: int, x: Tensor, value_embed: Tensor | None) -> Tensor:
        """`ops.gqa_attention` of the newest position, x (B, 1, D), over all positions so far."""
        config, banks, n = self.model.config, self._banks, self.model.config.num_layers
        q = F.linear(x, banks.qo[layer]).unflatten(-1, (config.num_heads, -1))
        k = F.linear(x, banks.kv[layer]).unflatten(-1, (config.num_kv_heads, -1))
        v = F.linear(x, banks.kv[n + layer])
        v = (v if value_embed is None else v + value_embed).unflatten(-1, (config.num_kv_heads, -1))
        gain = self.model.blocks[layer].get_parameter("attn.q_gain")
        end = self.length + 1
        self._keys[layer, :, :, self.length] = self._turn(k).squeeze(1)
        self._values[layer, :, :, self.length] = v.squeeze(1)
        # the query heads of one KV head stand where queries of one head would: no key is repeated
        groups = self._turn(q, gain).squeeze(1).unflatten(1, (config.num_kv_heads, -1))
        y = F.scaled_dot_product_attention(
            groups, self._keys[layer, :, :, :end], self._values[layer, :, :, :end]
        )
        y = y.flatten(1, 2).unsqueeze(1)  # (B, 1, H, hd)
        context = reference.exclusive(y, v) if self.model.uses_xsa(layer) else y
        return F.linear(context.flatten(2), banks.qo[n + layer])

    def _turn(self, heads: Tensor, gain: Tensor | None = None) -> Tensor:
        """RMS norm, RoPE of the newest position, gain: (B, 1, heads, hd)."""
        unit = reference.rms_norm(heads)
        here = slice(self.length, self.length + 1)
        wide = unit.to(torch.promote_types(unit.dtype, torch.float32))
        turned = reference.rotate(wide, self._cos[here], self._sin[here])
        return (turned if gain is None else turned * gain.to(turned.dtype)[:, None]).to(heads.dtype)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id (B,) per row of logits (B, V), from softmax(logits / temperature) over the best top_k.

    Temperature 0 takes the most likely token. Raises PgolfError for a negative temperature or top_k below 1.
    """
    if temperature < 0:
        raise PgolfError(f"temperature is {temperature}; it must not be negative")
    if top_k is not None and top_k < 1:
        raise PgolfError(f"top_k is {top_k}; it must be at least 1, or None for all tokens")
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    weights = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(
    model: GPT,
    prompt_ids: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Prompts with num_tokens more tokens each, int64 (B, P + num_tokens).

    prompt_ids: (B, P) with P at least 1, or start tokens (B,). RoPE has the base of the final length.
    Raises PgolfError for an empty prompt or ids outside the vocabulary.
    """
    prompt = prompt_ids[:, None] if prompt_ids.ndim == 1 else prompt_ids
    vocab = model.config.vocab_size
    if prompt.ndim != 2 or prompt.numel() == 0 or num_tokens < 0:
        raise PgolfError(f"cannot continue prompts of shape {tuple(prompt_ids.shape)} by {num_tokens} tokens")
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        raise PgolfError(
            f"the prompt holds ids outside 0 to {vocab - 1}: use the tokenizer the model was made for"
        )
    prompt = prompt.long().to(model.tok_emb.weight.device)
    length = prompt.shape[1] + num_tokens
    decoder = Decoder(model, prompt.shape[0], length)
    text = prompt.new_empty(prompt.shape[0], length)
    text[:, : prompt.shape[1]] = prompt
    for position in range(length - 1):
        logits = decoder.step(text[:, position])
        if position + 1 >= prompt.shape[1]:
            text[:, position + 1] = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
    return text
