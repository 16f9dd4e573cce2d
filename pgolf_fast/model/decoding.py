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
WINDOW = NGRAM_REACH + 1  # tokens behind the newest input: SmearGate looks one position back
WARM_UP_RUNS = 3  # what PyTorch's documentation asks for before a capture


class Decoder:
    """Logits of a batch of growing texts, one position a `step`: those of `model.logits` of the whole prefix.

    `context` (default: max_length) sets the RoPE base, as in `rope_tables`. The model's weights must not
    change between steps. Memory: 2 * layers * batch * max_length * KV*hd values in the model's compute dtype.

    `static` (default: on a GPU) makes every step from the fourth on the same operations on the same memory:
    attention goes over all max_length places, those not written yet masked. On a GPU such a step is captured
    once as a CUDA graph, which costs the host one launch instead of hundreds; elsewhere it is slower.
    Raises PgolfError for sizes below 1.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        max_length: int,
        *,
        context: int | None = None,
        static: bool | None = None,
    ):
        if batch_size < 1 or max_length < 1:
            raise PgolfError(f"decoding {batch_size} texts of {max_length} tokens: both must be at least 1")
        config, device = model.config, model.tok_emb.weight.device
        self.model, self.batch_size, self.max_length, self.length = model, batch_size, max_length, 0
        self.static = device.type == "cuda" if static is None else static
        self._cos, self._sin = rope_tables(config, max_length, device, context=context)
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        with torch.no_grad(), torch.inference_mode(False):
            # zeros only where masked places are read; else memory is taken as texts grow
            new = torch.zeros if self.static else torch.empty
            self._keys = new(shape, dtype=model.compute_dtype, device=device)
            self._values = new(shape, dtype=model.compute_dtype, device=device)
            self._tokens = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
            self._position = torch.zeros(1, dtype=torch.long, device=device)  # of the newest token
            self._places = torch.arange(max_length, device=device)
            self._banks = model.banks()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._graph_logits: Tensor | None = None

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
        self._tokens[:, self.length] = tokens
        self._position.fill_(self.length)
        self.length += 1
        if not self.static or self.length < WINDOW:
            return self._growing_step()
        return self._replay() if self._keys.is_cuda else self._static_step()

    def _growing_step(self) -> Tensor:
        window = self._tokens[:, max(0, self.length - WINDOW) : self.length]
        return self._logits(window, self._keys[:, :, :, : self.length], self._values[:, :, :, : self.length])

    def _static_step(self) -> Tensor:
        """What `_growing_step` computes, with no shape or address that depends on the position."""
        window = self._tokens.index_select(1, self._position - WINDOW + 1 + self._places[:WINDOW])
        written = (self._places <= self._position)[None, None, None]
        return self._logits(window, self._keys, self._values, written)

    def _replay(self) -> Tensor:
        if self._graph is None:
            # runs before the capture load and choose kernels; writing a position again changes nothing
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_RUNS):
                    self._static_step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self._graph_logits = self._static_step()
            self._graph = graph
        self._graph.replay()
        assert self._graph_logits is not None
        return self._graph_logits.clone()

    def _logits(self, window: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, V) after the last token of window (B, up to WINDOW), which is at `_position`.

        keys and values (layers, B, KV, places, hd) are what attention reads where `mask` (1, 1, 1, places) is
        true; those of this position are written here.
        """
        x = self.model.smear(self.model.embed(window))[:, -1:]
        embeds = self.model.value_embeddings(window[:, -1:])
        cos, sin = self._cos.index_select(0, self._position), self._sin.index_select(0, self._position)

        def attend(layer: int, x: Tensor, value_embed: Tensor | None) -> Tensor:
            return self._attend(layer, x, value_embed, cos, sin, keys[layer], values[layer], mask)

        return self.model.head(self.model.trunk(x, embeds, self._banks, attend)[:, -1])

    def _attend(
        self,
        layer: int,
        x: Tensor,
        value_embed: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """`ops.gqa_attention` of the newest position, x (B, 1, D), keys and values (B, KV, places, hd)."""
        config, banks, n = self.model.config, self._banks, self.model.config.num_layers
        q = F.linear(x, banks.qo[layer]).unflatten(-1, (config.num_heads, -1))
        k = F.linear(x, banks.kv[layer]).unflatten(-1, (config.num_kv_heads, -1))
        v = F.linear(x, banks.kv[n + layer])
        v = (v if value_embed is None else v + value_embed).unflatten(-1, (config.num_kv_heads, -1))
        gain = self.model.block(layer).attn.q_gain
        keys.index_copy_(2, self._position, _turn(k, cos, sin).transpose(1, 2))
        values.index_copy_(2, self._position, v.transpose(1, 2))
        # the query heads of one KV head stand where queries of one head would: no key is repeated
        groups = _turn(q, cos, sin, gain).squeeze(1).unflatten(1, (config.num_kv_heads, -1))
        y = F.scaled_dot_product_attention(groups, keys, values, mask)
        y = y.flatten(1, 2).unsqueeze(1)  # (B, 1, H, hd)
        context = reference.exclusive(y, v) if self.model.uses_xsa(layer) else y
        return F.linear(context.flatten(2), banks.qo[n + layer])


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None) -> Tensor:
    """RMS norm, RoPE of one position, gain: (B, 1, heads, hd)."""
    unit = reference.rms_norm(heads)
    wide = unit.to(torch.promote_types(unit.dtype, torch.float32))
    turned = reference.rotate(wide, cos, sin)
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
