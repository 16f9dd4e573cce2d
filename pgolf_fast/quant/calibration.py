"""Calibration without data: Hessians on text that the model generates itself (PR 1501)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.console import progress
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.attention import rope_tables
from pgolf_fast.model.decoding import Decoder, sample
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import reference

DAMPING = 0.01  # times the mean diagonal; like the original, in addition to GPTQ's own damping
SMALLEST_DAMPING = 1e-6
INPUTS = ("attn_in", "attn_out", "mlp_in", "mlp_hidden")


def hessian_name(layer: int, which: str) -> str:
    """Name a Hessian: `attn_in` is the input of Q, K and V, `attn_out` of the output projection."""
    return f"blocks.{layer}.{which}"


@torch.no_grad()
def self_generate(model: GPT, config: QuantConfig, seq_len: int) -> Tensor:
    """Generate calibration text, int64 (calibration_sequences, min(calibration_length, seq_len)).

    `calibration_batch` sequences grow together, one token at a time. First tokens are uniform over all ids;
    the rest come from softmax(logits / temperature). One generator on the model's device, seeded with
    `config.seed`, draws everything, so the text depends on device, dtype and calibration_batch. RoPE uses the
    base of the final length. Memory: that of `Decoder`.
    Raises PgolfError for lengths below 2.
    """
    length = min(config.calibration_length, seq_len)
    if length < 2 or config.calibration_sequences < 1 or config.calibration_batch < 1:
        raise PgolfError(
            f"calibration on {config.calibration_sequences} sequences of {length} tokens is not possible: "
            "quant.calibration_length must be at least 2 and the others at least 1"
        )
    device = model.tok_emb.weight.device
    generator = torch.Generator(device=device).manual_seed(config.seed)
    sizes = [
        min(config.calibration_batch, config.calibration_sequences - start)
        for start in range(0, config.calibration_sequences, config.calibration_batch)
    ]
    steps = ((batch, position) for batch in range(len(sizes)) for position in range(length))
    texts: list[Tensor] = []
    for batch, position in progress(steps, "calibration text", total=len(sizes) * length, unit="step"):
        if position == 0:
            decoder = Decoder(model, sizes[batch], length)
            start_ids = (sizes[batch],)
            tokens = torch.randint(model.config.vocab_size, start_ids, generator=generator, device=device)
            texts.append(tokens.new_empty(sizes[batch], length))
        else:
            tokens = sample(decoder.step(tokens), temperature=config.temperature, generator=generator)
        texts[-1][:, position] = tokens
    return torch.cat(texts)


@torch.no_grad()
def collect_hessians(model: GPT, tokens: Tensor, batch: int = 8) -> dict[str, Tensor]:
    """Collect the damped Hessians of all bank matrices, float32 by `hessian_name`: four per layer.

    tokens (sequences, length): each sequence gives length - 1 inputs. A Hessian is the sum of x^T x over all
    inputs, divided by the number of sequences, plus 1 % of its mean diagonal (PR 1501).
    Raises PgolfError for fewer than one sequence or two tokens.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise PgolfError(f"Hessians need (sequences, length of 2 or more) tokens, not {tuple(tokens.shape)}")
    parts = tokens.to(model.tok_emb.weight.device)[:, :-1].split(batch)
    grams = _Grams(model)
    for part in progress(parts, "Hessians", unit="batch"):
        grams.add_text(part)
    for gram in grams.sums.values():
        gram /= tokens.shape[0]
        diagonal = torch.diagonal(gram)
        diagonal += DAMPING * max(diagonal.mean().item(), SMALLEST_DAMPING)
    return grams.sums


class _Grams:
    """Float32 sums of x^T x over the inputs of every bank matrix; the `Observer` of its own forward."""

    def __init__(self, model: GPT):
        self.model, self.banks, self.sums = model, model.banks(), dict[str, Tensor]()
        # attention with the identity as output projection returns that projection's input
        self.identity = torch.eye(
            model.config.model_dim, dtype=self.banks.qo.dtype, device=self.banks.qo.device
        )

    def add_text(self, tokens: Tensor) -> None:
        """Run one forward of tokens (B, T), as `GPT.hidden` does."""
        self.tables = rope_tables(self.model.config, tokens.shape[1], tokens.device)
        x = self.model.smear(self.model.embed(tokens))
        self.model.trunk(x, self.model.value_embeddings(tokens), self.banks, self.attend, self)

    def attend(self, layer: int, x: Tensor, value_embed: Tensor | None) -> Tensor:
        config, banks, n = self.model.config, self.banks, self.model.config.num_layers
        context = ops.gqa_attention(
            x,
            torch.stack((banks.qo[layer], self.identity)),
            torch.stack((banks.kv[layer], banks.kv[n + layer])),
            self.model.block(layer).attn.q_gain,
            value_embed,
            *self.tables,
            0,
            num_kv_heads=config.num_kv_heads,
            xsa=self.model.uses_xsa(layer),
        )
        self._add(layer, "attn_out", context)
        return F.linear(context, banks.qo[n + layer])

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None:
        self._add(layer, "attn_in", x)

    def mlp_input(self, layer: int, x: Tensor) -> None:
        self._add(layer, "mlp_in", x)
        hidden = reference.activation(F.linear(x, self.banks.up[layer]), self.model.config.mlp_activation)
        self._add(layer, "mlp_hidden", hidden)

    def _add(self, layer: int, which: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        name = hessian_name(layer, which)
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.sums[name].addmm_(rows.T, rows)
