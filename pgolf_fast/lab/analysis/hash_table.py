"""Hash n-gram table: collisions, and the contribution of the table, its gate and its trigrams (PR 1501).

The contribution of a part is the loss of a trained model without it, on non-overlapping windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.config.model import ModelConfig
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.lab.analysis import bucket_load
from pgolf_fast.lab.analysis.bucket_load import OTHER, WORD_START, Contexts
from pgolf_fast.lab.analysis.losses import by_target, score_plain
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.summary import Column, Summary, draw, tabulate
from pgolf_fast.lab.analysis.validation import Validation, open_validation
from pgolf_fast.lab.compare.sweep import bootstrap_gain
from pgolf_fast.model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GATE, TRIGRAM, TABLE = "gate", "trigram", "whole table"


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure contexts per bucket, the gate's learned values, and the loss without parts of the table.

    Models without a table are skipped. Raises PgolfError if none has one, without validation data, and for
    losses that are not finite.
    """
    chosen = [model for model in models if model.need_config().model.bigram_vocab_size]
    if not chosen:
        names = ", ".join(model.name for model in models)
        raise PgolfError(
            f"{names}: no hash table (model.bigram_vocab_size is 0); analyze a model that has one"
        )
    validation = open_validation(chosen, options)
    table = validation.source.table
    configs = {model.name: model.need_config().model for model in chosen}
    first = chosen[0].need_config().model
    others = {f"{rows:,} rows": replace(first, bigram_vocab_size=rows) for rows in options.hash_rows}
    summaries = analyze_layouts({**configs, **others}, validation.tokens, table.has_leading_space)
    networks = {model.name: model.network(table, options.device) for model in chosen}
    summaries.append(_learned(networks))
    summaries.append(_added(networks, validation, options))
    losses = {name: _without_each(name, model, validation, options) for name, model in networks.items()}
    if gated := {name: own for name, own in losses.items() if configs[name].word_start_boost}:
        summaries.append(_published_contribution(gated))
    return [*summaries, _contribution(losses, validation)]


def analyze_layouts(
    configs: Mapping[str, ModelConfig], tokens: np.ndarray, has_leading_space: np.ndarray
) -> list[Summary]:
    """Measure contexts per bucket for the tables of `configs`, and for variants by split and trigrams.

    No trained model is needed. tokens (n,) are real ones; has_leading_space bool (V,) marks word starts.
    Raises PgolfError for a configuration without a table.
    """
    layouts: dict[str, ModelConfig] = {}
    users: dict[str, list[str]] = {}
    for name, config in configs.items():
        users.setdefault(_describe(config), []).append(name)
        for split in (False, True):
            for trigram in (False, True):
                variant = replace(config, pos_conditional=split, trigram=trigram)
                layouts.setdefault(_describe(variant), variant)
    contexts = {
        layout: bucket_load.contexts_of(config, tokens, has_leading_space)
        for layout, config in layouts.items()
    }
    used_by = {layout: ", ".join(users.get(layout, ["-"])) for layout in layouts}
    return [_all_pairs(layouts, used_by, has_leading_space), _loads(contexts, len(tokens), list(users))]


def _describe(config: ModelConfig) -> str:
    split = "split" if config.pos_conditional else "shared"
    return f"{config.bigram_vocab_size - 1:,} {split}{', trigrams' if config.trigram else ''}"


def _all_pairs(
    layouts: Mapping[str, ModelConfig], used_by: Mapping[str, str], has_leading_space: np.ndarray
) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for layout, config in layouts.items():
        counts = bucket_load.all_pairs(config, has_leading_space)
        values[layout] = [{**vars(one), "per_bucket": one.per_bucket} for one in counts]
        for one in counts:
            numbers = (f"{one.contexts:,}", f"{one.buckets:,}", f"{one.per_bucket:,.1f}")
            rows.append((layout, used_by[layout], one.kind, one.order, *numbers))
    return Summary(
        "contexts per bucket, all n-grams",
        "published",
        "Shows how many n-grams there are per bucket, counting every pair of token ids once (PR 1501: 256 "
        "shared, 163 and 350 split); cannot show what collides, as most pairs never occur and a few occur "
        "all the time.",
        Table(("buckets", "used by", "contexts of", "order", "contexts", "buckets each", "per bucket"), rows),
        values,
    )


def _loads(contexts: Mapping[str, Contexts], tokens: int, plotted: Sequence[str]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, list[dict[str, Any]]] = {}
    for layout, every in contexts.items():
        values[layout] = []
        for kind, order, chosen in bucket_load.groups(every):
            real, ideal = bucket_load.load(every, chosen), bucket_load.ideal_load(every, chosen)
            entry = {"kind": kind, "order": order, "observed": vars(real), "expected": vars(ideal)}
            values[layout].append(entry)
            pairs = (
                *(f"{load.occupied:,.0f}" for load in (real, ideal)),
                *(f"{load.contexts_in_bucket:.1f}" for load in (real, ideal)),
                *(f"{load.foreign:.1%}" for load in (real, ideal)),
            )
            rows.append((layout, kind, order, f"{real.contexts:,}", *pairs))
    shown = {layout: contexts[layout] for layout in plotted}
    header = (
        *("buckets", "contexts of", "order", "distinct", "buckets used", "ideal hash"),
        *("in its bucket", "ideal hash", "foreign use", "ideal hash"),
    )
    return Summary(
        "buckets on real tokens",
        "corrected",
        f"Shows on {tokens:,} tokens, weighted by how often each context occurs, how many contexts share the "
        "bucket of an occurrence and how much of the bucket's use is theirs, next to an ideal hash; more "
        "tokens bring more contexts, and sharing a row need not cost anything.",
        Table(header, rows),
        {"tokens": tokens, "layouts": values},
        draw("buckets", lambda axes: _paint_buckets(axes, shown), len(shown), width=7.0 * len(shown)),
    )


def _paint_buckets(panels: Sequence[Axes], shown: Mapping[str, Contexts]) -> None:
    """Draw the use of each table's buckets in descending order, real and with an ideal hash."""
    for axes, (layout, real) in zip(panels, shown.items(), strict=True):
        ideal = real.ideally_hashed(np.random.default_rng(0))
        usable = real.num_rows - 1
        parts = {"all": slice(0, usable)}
        if real.split:
            parts = {WORD_START: slice(0, usable // 2), OTHER: slice(usable // 2, 2 * (usable // 2))}
        for index, (kind, part) in enumerate(parts.items()):
            for contexts, style, name in ((real, "-", "real hash"), (ideal, ":", "ideal hash")):
                use = np.sort(contexts.occurrences_by_bucket()[part])[::-1]
                x, y = np.arange(1, len(use) + 1), np.where(use > 0, use, np.nan)
                axes.plot(x, y, style, color=f"C{index}", label=f"{kind}, {name}")
        axes.set(xscale="log", yscale="log", xlabel="bucket, most used first", ylabel="occurrences")
        axes.set_title(layout)
        axes.grid(alpha=0.3)
        axes.legend()


def _learned(networks: Mapping[str, GPT]) -> Summary:
    values = {}
    for name, network in networks.items():
        assert network.bigram is not None
        boost = network.word_start_boost.item() if network.config.word_start_boost else None
        values[name] = {"scale": network.bigram.scale.item(), "boost": boost}
    columns: list[Column] = [("bigram.scale", "scale", ".4f"), ("word_start_boost", "boost", ".4f")]
    return Summary(
        "learned scale and gate",
        "published",
        "Shows the two learned numbers (PR 1501's parent: 0.112 and 0.007); cannot show how much the table "
        "is used, as its rows and its projection can grow instead.",
        tabulate(("model",), columns, values),
        values,
    )


def _added(networks: Mapping[str, GPT], validation: Validation, options: Options) -> Summary:
    """Compare the root mean square of token embeddings and of what the table adds, by class of input."""
    values: dict[str, dict[str, dict[str, float]]] = {}
    windows = validation.tokens[:-1].reshape(-1, validation.seq_len)
    tokens = torch.from_numpy(windows).to(options.device)
    starts = torch.from_numpy(validation.source.table.has_leading_space).to(options.device)[tokens]
    for name, network in networks.items():
        values[name] = {}
        squares = _squares(network, tokens)
        for kind, chosen in ((WORD_START, starts), (OTHER, ~starts)):
            if chosen.any():
                token, added = (float(square[chosen].mean().sqrt()) for square in squares)
                values[name][kind] = {"token": token, "table": added, "ratio": added / token}
    columns: list[Column] = [
        ("token embedding", "token", ".4f"),
        ("from the table", "table", ".4f"),
        ("ratio", "ratio", ".1%"),
    ]
    return Summary(
        "what the table adds",
        "corrected",
        "Shows how large the table's part of the embedding is relative to the token's own (root mean square "
        "over channels and real tokens); a small part can matter, and later layers can ignore a large one.",
        tabulate(("model", "input"), columns, values),
        values,
    )


@torch.no_grad()
def _squares(network: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean squares over channels of the token embedding and of the table's part, each (B, T)."""
    assert network.bigram is not None
    parts: list[Tensor] = []
    hook = network.bigram.register_forward_hook(lambda module, x, out: parts.append(out.square().mean(-1)))
    try:
        # 4,096 tokens at a time bound the memory of the embeddings
        for chunk in tokens.split(max(1, 4096 // tokens.shape[1])):
            network.embed(chunk)
    finally:
        hook.remove()
    own = network.tok_emb.weight.square().mean(-1)[tokens]
    return own, torch.cat(parts)


def _without_each(name: str, network: GPT, validation: Validation, options: Options) -> dict[str, np.ndarray]:
    """Return losses (targets,) float64: "" as trained, then without each part that the model has."""
    stream = validation.stream(options.device)
    parts = [GATE] * network.config.word_start_boost + [TRIGRAM] * network.config.trigram + [TABLE]
    losses = {}
    for part in ("", *parts):
        with _without(network, part):
            losses[part] = by_target(score_plain(network, stream, validation.seq_len), name)
    return losses


@contextmanager
def _without(network: GPT, part: str) -> Iterator[None]:
    """Set the gate to 1, skip trigram rows or add nothing from the table; restore the model afterwards."""
    table = network.bigram
    assert table is not None
    before = table.scale.detach().clone(), network.word_start_boost.detach().clone(), table.trigram
    with torch.no_grad():
        if part == GATE:
            network.word_start_boost.fill_(1)
        elif part == TABLE:
            table.scale.zero_()
        elif part == TRIGRAM:
            table.trigram = False
    try:
        yield
    finally:
        with torch.no_grad():
            table.scale.copy_(before[0])
            network.word_start_boost.copy_(before[1])
        table.trigram = before[2]


def _published_contribution(losses: Mapping[str, Mapping[str, np.ndarray]]) -> Summary:
    values = {}
    for name, by_part in losses.items():
        nats = float(by_part[GATE].mean() - by_part[""].mean())
        values[name] = {"nats": nats, "bits_per_token": nats / math.log(2)}
    columns: list[Column] = [("nats/token", "nats", "+.5f"), ('its "bpb"', "bits_per_token", "+.5f")]
    return Summary(
        "loss without the gate",
        "published",
        "Shows what a trained model loses with the gate set to 1 (PR 1501: +0.017 nats, called +0.025 bpb, "
        "which are bits per token); cannot show what a model trained without a gate would lose.",
        tabulate(("model",), columns, values),
        values,
    )


def _contribution(losses: Mapping[str, Mapping[str, np.ndarray]], validation: Validation) -> Summary:
    starts = document_starts(validation.tokens)
    text_bytes = np.add.reduceat(validation.stream(torch.device("cpu")).target_bytes, starts)
    after_start = validation.source.table.has_leading_space[validation.tokens[:-1]]
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for name, by_part in losses.items():
        base = by_part[""]
        values[name] = {"": {"loss": float(base.mean())}}
        for part, without in by_part.items():
            if not part:
                continue
            before, after = (np.add.reduceat(each, starts) for each in (without, base))
            bpb, low, high = bootstrap_gain(before, after, text_bytes)
            change = without - base
            sides = [float(change[c].mean()) if c.any() else None for c in (after_start, ~after_start)]
            nats = float(change.mean())
            values[name][part] = {
                **{"nats": nats, "bpb": bpb, "low": low, "high": high},
                **{"nats_after_word_starts": sides[0], "nats_elsewhere": sides[1]},
            }
            interval = f"{low:+.5f} to {high:+.5f}" if len(starts) > 1 else "-"
            cells = (f"{nats:+.5f}", f"{bpb:+.5f}", interval, *(number(side, "+.5f") for side in sides))
            rows.append((name, part, *cells))
    header = (
        *("model", "without", "nats/token", "bits/byte", "95 % interval"),
        *("nats after word starts", "nats elsewhere"),
    )
    return Summary(
        "loss without parts of the table",
        "corrected",
        f"Shows what a trained model loses on {len(starts):,} documents when a part is removed, in bits per "
        "byte with a 95 % interval over documents; that is how much the model relies on the part, not what "
        "training with the part gained.",
        Table(header, rows),
        values,
    )
