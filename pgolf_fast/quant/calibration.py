"""Calibration: what errors cost, on text that the model generates itself (PR 1501) or on training text.

GPTQ needs a Hessian of each matrix's input. Grid rd also needs row importances: Fisher information with a row
and a column factor (K-FAC, Martens and Grosse 2015). A change E of a matrix raises the loss by about
1/2 sum_r rows[r] e_r^T hessian e_r nats per token. Gradients are those of the log-probability of tokens
sampled from the model, so their mean square is the true Fisher information rather than the empirical one.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import QuantConfig, RunConfig
from pgolf_fast.console import progress
from pgolf_fast.data.shards import random_windows
from pgolf_fast.data.source import open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import PackedBanks
from pgolf_fast.model.decoding import Decoder, sample
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.plan import Visit
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.model.weights import Tensors
from pgolf_fast.ops import reference
from pgolf_fast.quant.gptq import inverse_factor
from pgolf_fast.quant.sdclip import TOKEN_TABLE, quantize_sdclip
from pgolf_fast.quant.state import QuantizedState, group_of, hessian_name, is_slot, quantize_state, unbank

DAMPING = 0.01  # times the mean diagonal; like the original, in addition to GPTQ's own damping
SMALLEST_DAMPING = 1e-6
BATCHES = 16  # gradients that importances are averaged over
SHARED = 0.1  # share of the matrix mean in a row's importance: short text does not visit every row
TABLE_DAMPING = 1e-3  # times the mean diagonal, for Hessians fitted to gradients
_ROUNDS = 3  # alternations of fitting rows and columns


@torch.no_grad()
def quantize_model(
    model: GPT, config: QuantConfig, *, seq_len: int, text: Tensor | None = None
) -> QuantizedState:
    """Quantize a model; method gptq collects Hessians on `text`, by default what the model writes.

    seq_len: the training length, which calibration text does not exceed. The model is not changed.
    """
    hessians, sdclip = None, config.grid == "sdclip"
    if config.method == "gptq":
        text = self_generate(model, config, seq_len) if text is None else text
        hessians = collect_hessians(model, text, means=sdclip)
    return (quantize_sdclip if sdclip else quantize_state)(model.state_dict(), config, hessians)


def training_text(config: RunConfig) -> Tensor | None:
    """Return calibration text from the training shards, int64 (sequences, length + 1).

    None if `config.quant` does not ask for it. Raises PgolfError if the shards are too short.
    """
    quant = config.quant
    if quant.calibration == "generated" or quant.method == "round":
        return None
    length = min(quant.calibration_length, config.train.seq_len)
    shards = open_source(config.data, config.model.vocab_size).train_shards()
    windows = random_windows(shards, quant.calibration_sequences, length, seed=quant.seed)
    unknown = windows.max() >= config.model.vocab_size
    problem = f"{shards[0].path.parent} has token id {windows.max()}, which the model does not"
    need(not unknown, f"{problem}: use shards made with its tokenizer")
    return torch.from_numpy(windows)


@torch.no_grad()
def self_generate(model: GPT, config: QuantConfig, seq_len: int, packed: PackedBanks | None = None) -> Tensor:
    """Generate calibration text, int64 (calibration_sequences, min(calibration_length, seq_len)).

    `calibration_batch` sequences grow together, one token at a time. First tokens are uniform over all ids;
    the rest come from softmax(logits / temperature). One generator on the model's device, seeded with
    `config.seed`, draws everything, so the text depends on device, dtype and calibration_batch. RoPE uses the
    base of the final length. `packed` replaces the model's banks. Memory: that of `Decoder`.
    Raises PgolfError for lengths below 2, or if activations overflow.
    """
    length = min(config.calibration_length, seq_len)
    problem = f"calibration on {config.calibration_sequences} sequences of {length} tokens is not possible"
    rule = "quant.calibration_length must be at least 2 and the others at least 1"
    need(min(length - 1, config.calibration_sequences, config.calibration_batch) >= 1, f"{problem}: {rule}")
    device = model.tok_emb.weight.device
    generator = torch.Generator(device=device).manual_seed(config.seed)
    text = torch.empty(config.calibration_sequences, length, dtype=torch.int64, device=device)
    parts = text.split(config.calibration_batch)
    steps = itertools.product(parts, range(length))
    for part, position in progress(steps, "calibration text", total=len(parts) * length, unit="step"):
        if position == 0:
            decoder, size = Decoder(model, len(part), length, banks=packed), (len(part),)
            tokens = torch.randint(model.config.vocab_size, size, generator=generator, device=device)
        else:
            logits = decoder.step(tokens)
            if not bool(logits.isfinite().all()):
                _Grams(model).add_text(part[:, :position])  # raises an error that names the block
            tokens = sample(logits, temperature=config.temperature, generator=generator)
        part[:, position] = tokens
    return text


@torch.no_grad()
def collect_hessians(model: GPT, tokens: Tensor, batch: int = 8, *, means: bool = False) -> dict[str, Tensor]:
    """Collect the damped Hessians of all bank matrices, float32 by `hessian_name`: four per layer.

    tokens (sequences, length): each sequence gives length - 1 inputs. A Hessian is the sum of x^T x over all
    inputs, divided by the number of sequences, plus 1 % of its mean diagonal (PR 1501). With `means` it is
    the mean of x^T x, and the token table, which reads the final states, has one too (PR 1394).
    Raises PgolfError for fewer than one sequence or two tokens, or if activations overflow.
    """
    grams = _Grams(model, table=means)
    for part in progress(_inputs(model, tokens, "Hessians").split(batch), "Hessians", unit="batch"):
        grams.add_text(part)
    for name, gram in grams.sums.items():
        if means:
            gram /= grams.counts[name]
            continue
        gram /= tokens.shape[0]
        diagonal = torch.diagonal(gram)
        diagonal += DAMPING * max(diagonal.mean().item(), SMALLEST_DAMPING)
    return grams.sums


def _inputs(model: GPT, tokens: Tensor, what: str) -> Tensor:
    """Return all tokens but the last of each sequence, on the model's device."""
    problem = f"{what} need (sequences, length of 2 or more) tokens, not {tuple(tokens.shape)}"
    need(tokens.ndim == 2 and tokens.shape[0] >= 1 and tokens.shape[1] >= 2, problem)
    return tokens[:, :-1].to(model.tok_emb.weight.device)


class _Grams:
    """Float32 sums of x^T x over the inputs of every matrix; the `Observer` of its own forward."""

    def __init__(self, model: GPT, table: bool = False):
        self.table = table  # the token table's too, whose inputs are the final states
        self.model, self.banks, self.sums = model, model.banks(), dict[str, Tensor]()
        self.counts = Counter[str]()  # inputs
        # attention with the identity as output projection returns that projection's input
        self.identity = torch.eye(model.config.model_dim).to(self.banks.qo)

    def add_text(self, tokens: Tensor) -> None:
        """Run one forward of tokens (B, T), as `GPT.hidden` does. Raises PgolfError if a sum overflows."""
        self.tables = rope_tables(self.model.config, tokens.shape[1], tokens.device)
        x = self.model.smear(self.model.embed(tokens))
        hidden = self.model.trunk(x, self.model.value_embeddings(tokens), self.banks, self.attend, self)
        if self.table:
            self._add(TOKEN_TABLE, hidden)
        if broken := [name for name, gram in self.sums.items() if not bool(gram.isfinite().all())]:
            name = broken[0]
            place = name if name == TOKEN_TABLE else f"block {name.split('.')[1]} ({name})"
            problem = f"activations overflow in {place}"
            raise PgolfError(f"{problem}: the run diverged, quantize an earlier checkpoint")

    def attend(self, visit: Visit, x: Tensor, value_embed: Tensor | None) -> Tensor:
        config, banks, layer, n = self.model.config, self.banks, visit.layer, self.model.config.num_layers
        qo, kv = (banks.qo[layer], self.identity), (banks.kv[layer], banks.kv[n + layer])
        attn, heads, xsa = self.model.block(layer).attn, config.num_kv_heads, self.model.uses_xsa(layer)
        own = (torch.stack(qo), torch.stack(kv), attn.q_gain, value_embed)
        gate = attn.gate(x, lambda n: F.linear(x, banks.qo[layer, :n]))
        context = ops.gqa_attention(x, *own, *self.tables, 0, num_kv_heads=heads, xsa=xsa, gate=gate)
        self._add(hessian_name(layer, "attn_out"), context)
        return F.linear(context, banks.qo[n + layer])

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None:
        self._add(hessian_name(layer, "attn_in"), x)

    def mlp_input(self, layer: int, x: Tensor) -> None:
        self._add(hessian_name(layer, "mlp_in"), x)
        hidden = reference.activation(F.linear(x, self.banks.up[layer]), self.model.config.mlp_activation)
        self._add(hessian_name(layer, "mlp_hidden"), hidden)

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        self.counts[name] += len(rows)
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.sums[name].addmm_(rows.T, rows)


@dataclass(frozen=True, eq=False)
class Fisher:
    """Factors of a matrix (R, C): row importances (R,) and hessian (C, C), float32 on its device."""

    rows: Tensor
    hessian: Tensor
    damping: float


def collect_fisher(
    model: GPT, tokens: Tensor, hessians: Tensors, *, damping: float = 0.01, seed: int = 42
) -> dict[str, Fisher]:
    """Return the factors of every matrix by unbanked name. The model is not changed.

    tokens (sequences, length) are inputs; targets are sampled from the model. hessians, from
    `collect_hessians`, are the column factors of bank matrices. Tables have no input to take a Hessian of:
    their two factors are fitted to gradients alternately, like a matrix normal distribution (Dutilleul 1999).
    Row importances are measured against the inverse of the column factor, the spread of GPTQ's errors.
    Raises PgolfError for fewer than one sequence or two tokens, or a non-finite gradient.
    """
    inputs = _inputs(model, tokens, "importances")
    columns = {name: hessian / inputs.shape[1] for name, hessian in hessians.items()}
    named = progress(columns.items(), "factors of Hessians", unit="Hessian")
    factors = {name: _square_root(hessian, damping, name) for name, hessian in named}
    rows: dict[str, Tensor] = {}
    kept: dict[str, list[Tensor]] = {}
    for gradients in _gradients(model, inputs, seed):
        for name, gradient in gradients.items():
            problem = f"the gradient of {name} is not finite: the training run diverged"
            need(torch.isfinite(gradient).all(), problem)
            if is_slot(name):
                share = _row_sums(gradient, factors[group_of(name)])
                rows[name] = rows[name] + share if name in rows else share
            else:
                kept.setdefault(name, []).append(gradient.bfloat16())
    count = inputs.numel()
    fishers = {n: Fisher(_smooth(t / count), columns[group_of(n)], damping) for n, t in rows.items()}
    for name, samples in progress(kept.items(), "factors of tables", unit="table"):
        fishers[name] = _fit_table(torch.stack(samples), count)
    return fishers


def _gradients(model: GPT, inputs: Tensor, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield, per batch of text, the float32 gradients of the summed loss by unbanked matrix name."""
    generator = torch.Generator(inputs.device).manual_seed(seed)
    parameters = dict(model.named_parameters())
    parts = inputs.split(-(-len(inputs) // BATCHES))
    for part in progress(parts, "importances", unit="batch"):
        with torch.no_grad():
            chances = torch.softmax(model.logits(part).float(), dim=-1)
            targets = torch.multinomial(chances.flatten(0, 1), 1, generator=generator).view_as(part)
        with torch.enable_grad():
            loss = model.token_losses(part, targets).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        by_name = {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}
        yield {n: g.float() for n, g in unbank(by_name).items() if n.endswith(".weight") and g.ndim == 2}


def _square_root(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Return V (C, C) with V^T V = (hessian + damping mean(diag) I)^-1."""
    order, factor = inverse_factor(hessian, damping, name)
    return factor[:, order.argsort()]


def _row_sums(gradient: Tensor, root: Tensor) -> Tensor:
    """Return g_r^T H^-1 g_r / C per row: a sample of its importance, times the number of tokens summed."""
    return (gradient @ root.T).square().mean(dim=1)


def _smooth(rows: Tensor) -> Tensor:
    """Pull importances toward their mean, so that none is zero; return ones if all are zero."""
    mean = rows.mean()
    return torch.lerp(rows, mean.expand_as(rows), SHARED) if mean > 0 else torch.ones_like(rows)


def _fit_table(gradients: Tensor, tokens: int) -> Fisher:
    """Fit both factors of a matrix to gradients (batches, R, C); the hessian has mean diagonal 1."""
    hessian = torch.eye(gradients.shape[2], device=gradients.device)
    rows = _fitted_rows(gradients, hessian, tokens)
    for _ in range(_ROUNDS):
        weighed = (gradient.float() * rows.rsqrt()[:, None] for gradient in gradients)
        gram = functools.reduce(torch.add, (w.T @ w for w in weighed))
        mean = torch.diagonal(gram).mean()
        if mean <= 0:
            break
        hessian = gram / mean
        rows = _fitted_rows(gradients, _square_root(hessian, TABLE_DAMPING, "a table"), tokens)
    return Fisher(rows, hessian, TABLE_DAMPING)


def _fitted_rows(gradients: Tensor, root: Tensor, tokens: int) -> Tensor:
    sums = (_row_sums(gradient.float(), root) for gradient in gradients)
    return _smooth(functools.reduce(torch.add, sums) / tokens)
