"""Token-by-token decoding with cached keys and values."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.config.checks import need
from pgolf_fast.model.bank import PackedBanks
from pgolf_fast.model.compiled import CapturedStep
from pgolf_fast.model.gpt import GPT, AnyBanks
from pgolf_fast.model.plan import Visit
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import native, reference
from pgolf_fast.ops.mlp import ACTIVATIONS

WINDOW = 3 + 1  # tokens that the newest input depends on: the longest n-gram, and one more for SmearGate
NATIVE_TEXTS = 64  # the most texts for which whole blocks run in C++


class Decoder:
    """Logits of a batch of growing texts, one position per `step`: `model.logits` of the whole prefix.

    `max_length` sets the RoPE base, as in `rope_tables`; `banks` replace the model's own. Weights must not
    change between steps. Memory: 2 * visits * batch * max_length * KV*hd elements of the compute dtype.

    `static` (default: on a GPU) runs the same operations on the same memory at every step from the fourth:
    attention covers all max_length positions and masks those not written yet. On a GPU the step is captured
    once as a CUDA graph; on a CPU static steps are slower. Raises PgolfError for sizes below 1.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int,
        max_length: int,
        *,
        static: bool | None = None,
        banks: AnyBanks | None = None,
    ):
        what = f"decoding {batch_size} texts of {max_length} tokens"
        need(batch_size >= 1 and max_length >= 1, f"{what}: both must be at least 1")
        config, device = model.config, model.tok_emb.weight.device
        self.model, self.batch_size, self.max_length, self.length = model, batch_size, max_length, 0
        self.static = device.type == "cuda" if static is None else static
        self._cos, self._sin = rope_tables(config, max_length, device)
        shape = (config.num_visits, batch_size, config.num_kv_heads, max_length, config.head_dim)
        with torch.no_grad(), torch.inference_mode(False):
            # static steps read masked positions, which must not be NaN; otherwise pages are touched on demand
            new = torch.zeros if self.static else torch.empty
            self._keys = new(shape, dtype=model.compute_dtype, device=device)
            self._values = new(shape, dtype=model.compute_dtype, device=device)
            self._tokens = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
            self._position = torch.zeros(1, dtype=torch.long, device=device)  # of the newest token
            self._positions = torch.arange(max_length, device=device)
            self._banks = banks or model.reading_banks()
        self._graph: CapturedStep[Tensor] | None = None
        self._blocks = self._native_blocks()

    @torch.no_grad()
    def _native_blocks(self) -> list[Any]:
        """Return the blocks as C++ objects where these are faster than PyTorch's operations, else [].

        They need packed banks, float32, a CPU and few texts: there, calling PyTorch takes most of the time.
        """
        extension, model, banks, config = native.extension(), self.model, self._banks, self.model.config
        cpu = self._keys.device.type == "cpu" and self._keys.dtype == torch.float32
        if config.head_gate is not None or config.lanes_from is not None:
            return []  # they know neither
        if extension is None or not isinstance(banks, PackedBanks) or self.static or not cpu:
            return []
        if self.batch_size > (NATIVE_TEXTS if extension.int6_simd() else 4):
            return []
        names = {"dim": config.model_dim, "heads": config.num_heads, "kv_heads": config.num_kv_heads}
        names |= {"up_rows": config.mlp_up_rows, "hidden": config.mlp_hidden, "batch": self.batch_size}
        names |= {"half": self._cos.shape[1], "positions": self.max_length}
        blocks = []
        for number, i, *_ in model.plan:
            block, parts = model.block(i), (banks.attention, banks.up, banks.down)
            x_mix, x0_mix = block.resid_mix.float().unbind(0)
            arrays = {"x_mix": x_mix, "x0_mix": x0_mix, "attention_scale": block.attn_scale}
            arrays |= {"mlp_scale": block.mlp_scale, "gain": block.attn.q_gain, "keys": self._keys[number]}
            arrays |= {"values": self._values[number], "cos": self._cos, "sin": self._sin}
            steps = zip(("attention_steps", "up_steps", "down_steps"), parts, strict=True)
            arrays |= {name: part.scale[i] for name, part in steps}
            floats = {name: t.detach().float().contiguous().numpy() for name, t in arrays.items()}
            codes = (part.codes[i].numpy() for part in parts)
            kind = ACTIVATIONS.index(config.mlp_activation)
            settings = (block.layer_scale, model.uses_xsa(i), kind)
            blocks.append(extension.DecodeBlock(names, floats, *codes, *settings))
        return blocks

    def _native_logits(self, window: Tensor) -> Tensor:
        """Compute `_logits` with the blocks in C++."""
        model, position = self.model, self.length - 1
        x = model.smear(model.embed(window))[:, -1].clone()
        values = {i: v[:, 0].numpy() for i, v in model.value_embeddings(window[:, -1:]).items()}
        skips: list[Tensor] = []
        array, x0, threads = x.numpy(), x.clone().numpy(), torch.get_num_threads()
        for visit, block in zip(model.plan, self._blocks, strict=True):
            if visit.skip is not None:
                x.copy_(model.join(x, skips.pop(), visit.skip))
            block.step(array, x0, values.get(visit.layer), position, threads)
            if visit.push:
                skips.append(x.clone())
        return model.head(ops.rms_norm(x))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B,) and return the logits of the next ones, (B, V) in at least float32.

        Raises PgolfError when the texts already have max_length tokens, or if the batch size differs.
        """
        problem = f"the texts already have {self.max_length} tokens, the max_length of this decoder"
        need(self.length < self.max_length, problem)
        problem = f"tokens has shape {tuple(tokens.shape)}; it must be ({self.batch_size},)"
        need(tokens.shape == (self.batch_size,), problem)
        self._tokens[:, self.length] = tokens
        self._position.fill_(self.length)
        self.length += 1
        if not self.static or self.length < WINDOW:
            window = self._tokens[:, max(0, self.length - WINDOW) : self.length]
            if self._blocks:
                return self._native_logits(window)
            keys, values = (t[..., : self.length, :] for t in (self._keys, self._values))
            return self._logits(window, keys, values)
        if not self._keys.is_cuda:
            return self._static_step()
        # the warm-up runs of the capture write this position again with the same values
        self._graph = self._graph or CapturedStep(self._static_step)
        return self._graph().clone()

    def _static_step(self) -> Tensor:
        """Compute a step in which no shape or address depends on the position."""
        window = self._tokens.index_select(1, self._position - WINDOW + 1 + self._positions[:WINDOW])
        written = (self._positions <= self._position)[None, None, None]
        return self._logits(window, self._keys, self._values, written)

    def _logits(self, window: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, V) after the last token of window (B, up to WINDOW), which is at `_position`.

        Attention reads keys and values (visits, B, KV, positions, hd) where `mask` (1, 1, 1, positions) is
        true, after those of this position are written to them.
        """
        model, config, banks = self.model, self.model.config, self._banks
        cos, sin = self._cos.index_select(0, self._position), self._sin.index_select(0, self._position)

        def attention(visit: Visit, x: Tensor, value_embed: Tensor | None) -> Tensor:
            layer = visit.layer

            def cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                own_keys, own_values = keys[visit.number], values[visit.number]
                own_keys.index_copy_(2, self._position, k.to(keys.dtype).transpose(1, 2))
                own_values.index_copy_(2, self._position, v.transpose(1, 2))
                # query heads that share a KV head become queries of one head: no key is repeated
                groups = q.to(keys.dtype).squeeze(1).unflatten(1, (config.num_kv_heads, -1))
                y = F.scaled_dot_product_attention(groups, own_keys, own_values, mask)
                return y.flatten(1, 2).unsqueeze(1)

            (q, k, v), own = banks.project_in(layer, x), model.block(layer).attn
            v = v if value_embed is None else v + value_embed
            heads = (q, k, v, own.q_gain, cos, sin, config.num_kv_heads, model.uses_xsa(layer))
            gate = own.gate(x, lambda n: q[..., :n])
            return banks.project_out(layer, reference.projected_attention(*heads, gate, inner=cached))

        x = model.smear(model.embed(window))[:, -1:]
        packed = banks if isinstance(banks, PackedBanks) else None

        def mlp(visit: Visit, x: Tensor) -> Tensor:
            assert packed is not None
            return packed.mlp(visit.layer, x, config.mlp_activation)

        x = model.trunk(
            x, model.value_embeddings(window[:, -1:]), banks, attention, mlp=mlp if packed else None
        )
        return model.head(x[:, -1])


def sample(logits: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token id per row of logits (B, V) from softmax(logits / temperature), (B,).

    Temperature 0 is greedy. Raises PgolfError for a negative temperature, or logits that are not finite.
    """
    need(temperature >= 0, f"temperature is {temperature}; it must be 0 or more")
    problem = "the model's logits are not finite: its activations overflow, so it cannot write text"
    need(torch.isfinite(logits).all(), problem)
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = torch.softmax(logits / temperature, dim=-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(model: GPT, prompt: Tensor, num_tokens: int, **options: Any) -> Tensor:
    """Return prompts with num_tokens more tokens each, int64 (B, P + num_tokens).

    prompt: (B, P) with P at least 1. `options` are those of `sample`. RoPE has the base of the final length.
    Raises PgolfError for an empty prompt, a negative num_tokens, or ids outside the vocabulary.
    """
    vocab = model.config.vocab_size
    problem = f"cannot continue prompts of shape {tuple(prompt.shape)} by {num_tokens} tokens"
    need(prompt.ndim == 2 and prompt.numel() and num_tokens >= 0, problem)
    problem = f"the prompt holds ids outside 0 to {vocab - 1}: use the tokenizer the model was made for"
    need(int(prompt.min()) >= 0 and int(prompt.max()) < vocab, problem)
    prompt = prompt.long().to(model.tok_emb.weight.device)
    length = prompt.shape[1] + num_tokens
    decoder = Decoder(model, prompt.shape[0], length)
    text = F.pad(prompt, (0, num_tokens))
    for position in range(length - 1):
        logits = decoder.step(text[:, position])
        if position + 1 >= prompt.shape[1]:
            text[:, position + 1] = sample(logits, **options)
    return text
