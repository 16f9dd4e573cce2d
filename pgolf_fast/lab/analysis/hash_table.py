"""The hash n-gram table: who shares its rows, and what it, its gate and its trigram are worth (PR 1501).

What is worth something is measured by taking it away from a trained model, on non-overlapping windows.
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
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.lab.analysis import bucket_load
from pgolf_fast.lab.analysis.bucket_load import OTHER, WORD_START, Contexts
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.losses import by_target, score_plain
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.validation import Validation, open_validation
from pgolf_fast.lab.compare.statistics import bootstrap_gain
from pgolf_fast.model.gpt import GPT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GATE, TRIGRAM, TABLE = "gate", "trigram", "whole table"


def hash_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Contexts per bucket, the gate's learned values, and the loss without parts of the table.

    Models without a table are left out. Raises PgolfError if none has one, there is no validation data, or
    losses are not finite.
    """
    having = [s for s in subjects if s.known().model.bigram_vocab_size]
    if not having:
        names = ", ".join(subject.name for subject in subjects)
        raise PgolfError(
            f"{names}: no hash table (model.bigram_vocab_size is 0); analyse a model that has one"
        )
    validation = open_validation(having, options)
    table = validation.source.table
    configs = {subject.name: subject.known().model for subject in having}
    first = having[0].known().model
    asked = {f"{rows:,} rows": replace(first, bigram_vocab_size=rows) for rows in options.hash_rows}
    found = layout_findings({**configs, **asked}, validation.tokens, table.has_leading_space)
    models = {s.name: s.model(table, options.device) for s in having}
    found.append(_learned(models))
    found.append(_added(models, validation, options))
    gated = {name: model for name, model in models.items() if configs[name].word_start_boost}
    losses = {name: _without_each(name, model, validation, options) for name, model in models.items()}
    if gated:
        found.append(_published_worth({name: losses[name] for name in gated}))
    found.append(_worth(losses, validation))
    return found


def layout_findings(
    configs: Mapping[str, ModelConfig], tokens: np.ndarray, has_leading_space: np.ndarray
) -> list[Finding]:
    """Contexts per bucket of the tables of `configs`, by name, and of the same split, with trigrams, or not.

    It needs no trained model. tokens (n,) are real ones, has_leading_space bool (V,) says which start a word.
    Raises PgolfError for a configuration without a table.
    """
    layouts: dict[str, ModelConfig] = {}
    users: dict[str, list[str]] = {}
    for name, config in configs.items():
        users.setdefault(_describe(config), []).append(name)
        for split in (False, True):
            for trigram in (False, True):
                one = replace(config, pos_conditional=split, trigram=trigram)
                layouts.setdefault(_describe(one), one)
    contexts = {
        layout: bucket_load.contexts_of(config, tokens, has_leading_space)
        for layout, config in layouts.items()
    }
    used = {layout: ", ".join(users.get(layout, ["-"])) for layout in layouts}
    return [_all_pairs(layouts, used, has_leading_space), _loads(contexts, len(tokens), list(users))]


def _describe(config: ModelConfig) -> str:
    split = "split" if config.pos_conditional else "shared"
    return f"{config.bigram_vocab_size - 1:,} {split}{', trigrams' if config.trigram else ''}"


def _all_pairs(
    layouts: Mapping[str, ModelConfig], used: Mapping[str, str], has_leading_space: np.ndarray
) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for layout, config in layouts.items():
        counts = bucket_load.all_pairs(config, has_leading_space)
        values[layout] = [{**vars(one), "per_bucket": one.per_bucket} for one in counts]
        rows += [
            (
                layout,
                used[layout],
                one.kind,
                one.order,
                f"{one.contexts:,}",
                f"{one.buckets:,}",
                f"{one.per_bucket:,.1f}",
            )
            for one in counts
        ]
    return Finding(
        "contexts per bucket, all n-grams",
        "published",
        "Shows how many n-grams there are for each bucket, counting every pair of token ids once (PR 1501: "
        "256 shared, 163 and 350 split); cannot show what collides, as most pairs never occur and a few "
        "occur all the time.",
        ("buckets", "used by", "contexts of", "order", "contexts", "buckets each", "per bucket"),
        rows,
        values,
    )


def _loads(contexts: Mapping[str, Contexts], tokens: int, plotted: Sequence[str]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for layout, found in contexts.items():
        values[layout] = []
        for kind, order, chosen in bucket_load.groups(found):
            real, ideal = bucket_load.load(found, chosen), bucket_load.ideal_load(found, chosen)
            values[layout].append(
                {"kind": kind, "order": order, "observed": vars(real), "expected": vars(ideal)}
            )
            rows.append(
                (
                    layout,
                    kind,
                    order,
                    f"{real.contexts:,}",
                    f"{real.occupied:,.0f}",
                    f"{ideal.occupied:,.0f}",
                    f"{real.company:.1f}",
                    f"{ideal.company:.1f}",
                    f"{real.foreign:.1%}",
                    f"{ideal.foreign:.1%}",
                )
            )
    shown = {layout: contexts[layout] for layout in plotted}
    return Finding(
        "buckets on real tokens",
        "corrected",
        f"Shows on {tokens:,} tokens, weighted by how often each context occurs, how many contexts an "
        "occurrence shares its bucket with and how much of the bucket's use is theirs, beside an ideal hash; "
        "more tokens bring more contexts, and sharing a row need not cost anything.",
        (
            "buckets",
            "contexts of",
            "order",
            "distinct",
            "buckets used",
            "ideal hash",
            "in its bucket",
            "ideal hash",
            "foreign use",
            "ideal hash",
        ),
        rows,
        {"tokens": tokens, "layouts": values},
        drawn("buckets", lambda axes: _paint_buckets(axes, shown), len(shown), width=7.0 * len(shown)),
    )


def _paint_buckets(panels: Sequence[Axes], shown: Mapping[str, Contexts]) -> None:
    """For each table, use of its buckets in falling order, real and of an ideal hash."""
    for axes, (layout, found) in zip(panels, shown.items(), strict=True):
        ideal = found.ideally_hashed(np.random.default_rng(0))
        usable = found.num_rows - 1
        parts = {"all": slice(0, usable)}
        if found.split:
            parts = {WORD_START: slice(0, usable // 2), OTHER: slice(usable // 2, 2 * (usable // 2))}
        for index, (kind, part) in enumerate(parts.items()):
            for one, style, name in ((found, "-", "real hash"), (ideal, ":", "ideal hash")):
                use = np.sort(one.occurrences_by_bucket()[part])[::-1]
                axes.plot(
                    np.arange(1, len(use) + 1),
                    np.where(use > 0, use, np.nan),
                    style,
                    color=f"C{index}",
                    label=f"{kind}, {name}",
                )
        axes.set(xscale="log", yscale="log", xlabel="bucket, most used first", ylabel="occurrences")
        axes.set_title(layout)
        axes.grid(alpha=0.3)
        axes.legend()


def _learned(models: Mapping[str, GPT]) -> Finding:
    values = {name: _gate_values(model) for name, model in models.items()}
    return Finding(
        "learned scale and gate",
        "published",
        "Shows the two learned numbers (PR 1501's parent: 0.112 and 0.007); cannot show how much of the "
        "table is used, as its rows and its projection are free to grow instead.",
        ("model", "bigram.scale", "word_start_boost"),
        [(name, *(f"{v:.4f}" if v is not None else "-" for v in two)) for name, two in values.items()],
        {name: {"scale": scale, "boost": boost} for name, (scale, boost) in values.items()},
    )


def _gate_values(model: GPT) -> tuple[float, float | None]:
    assert model.bigram is not None
    boost = model.word_start_boost.item() if model.config.word_start_boost else None
    return model.bigram.scale.item(), boost


def _added(models: Mapping[str, GPT], validation: Validation, options: Options) -> Finding:
    """Root mean squares of token embeddings and of what the table adds to them, by class of input."""
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    windows = validation.tokens[:-1].reshape(-1, validation.seq_len)
    tokens = torch.from_numpy(windows).to(options.device)
    starts = torch.from_numpy(validation.source.table.has_leading_space).to(options.device)[tokens]
    for name, model in models.items():
        values[name] = {}
        squares = _squares(model, tokens)
        for kind, chosen in ((WORD_START, starts), (OTHER, ~starts)):
            if not chosen.any():
                continue
            token, added = (float(square[chosen].mean().sqrt()) for square in squares)
            values[name][kind] = {"token": token, "table": added}
            rows.append((name, kind, f"{token:.4f}", f"{added:.4f}", f"{added / token:.1%}"))
    return Finding(
        "what the table adds",
        "corrected",
        "Shows how large the table's part of the embedding is beside the token's own (root mean square over "
        "channels and real tokens); a small part can matter and a large one can be ignored downstream.",
        ("model", "input", "token embedding", "from the table", "ratio"),
        rows,
        values,
    )


@torch.no_grad()
def _squares(model: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squares over channels of token embedding and of the table's part, each (B, T)."""
    assert model.bigram is not None
    seen: list[Tensor] = []
    hook = model.bigram.register_forward_hook(lambda module, inputs, out: seen.append(out.square().mean(-1)))
    try:
        for part in tokens.split(max(1, 4096 // tokens.shape[1])):
            model.embed(part)
    finally:
        hook.remove()
    own = model.tok_emb.weight.square().mean(-1)[tokens]
    return own, torch.cat(seen)


def _without_each(name: str, model: GPT, validation: Validation, options: Options) -> dict[str, np.ndarray]:
    """Losses by target, (targets,) float64: "" as trained, then without each part that the model has."""
    stream = validation.stream(options.device)
    parts = [GATE] * model.config.word_start_boost + [TRIGRAM] * model.config.trigram + [TABLE]
    found = {}
    for part in ("", *parts):
        with _without(model, part):
            found[part] = by_target(score_plain(model, stream, validation.seq_len), name)
    return found


@contextmanager
def _without(model: GPT, part: str) -> Iterator[None]:
    """The model with the gate at 1, no trigram rows, or nothing added by the table; afterwards as it was."""
    table = model.bigram
    assert table is not None
    before = table.scale.detach().clone(), model.word_start_boost.detach().clone(), table.trigram
    with torch.no_grad():
        if part == GATE:
            model.word_start_boost.fill_(1)
        elif part == TABLE:
            table.scale.zero_()
        elif part == TRIGRAM:
            table.trigram = False
    try:
        yield
    finally:
        with torch.no_grad():
            table.scale.copy_(before[0])
            model.word_start_boost.copy_(before[1])
        table.trigram = before[2]


def _published_worth(losses: Mapping[str, Mapping[str, np.ndarray]]) -> Finding:
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for name, found in losses.items():
        nats = float(found[GATE].mean() - found[""].mean())
        values[name] = {"nats": nats, "bits_per_token": nats / math.log(2)}
        rows.append((name, f"{nats:+.5f}", f"{nats / math.log(2):+.5f}"))
    return Finding(
        "loss without the gate",
        "published",
        "Shows what a trained model loses with the gate set to 1 (PR 1501: +0.017 nats, called +0.025 bpb, "
        "which are bits per token); cannot show what a model that was trained without a gate would lose.",
        ("model", "nats/token", 'its "bpb"'),
        rows,
        values,
    )


def _worth(losses: Mapping[str, Mapping[str, np.ndarray]], validation: Validation) -> Finding:
    starts = document_starts(validation.tokens)
    text_bytes = validation.stream(torch.device("cpu")).target_bytes
    by_document = np.add.reduceat(text_bytes, starts)
    after_start = validation.source.table.has_leading_space[validation.tokens[:-1]]
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for name, found in losses.items():
        base = found[""]
        values[name] = {"": {"loss": float(base.mean())}}
        for part, other in found.items():
            if not part:
                continue
            with_, without = (np.add.reduceat(each, starts) for each in (base, other))
            bpb, low, high = bootstrap_gain(without, with_, by_document)
            change = other - base
            sides = [float(change[c].mean()) if c.any() else None for c in (after_start, ~after_start)]
            values[name][part] = {
                "nats": float(change.mean()),
                "bpb": bpb,
                "low": low,
                "high": high,
                "nats_after_word_starts": sides[0],
                "nats_elsewhere": sides[1],
            }
            rows.append(
                (
                    name,
                    part,
                    f"{change.mean():+.5f}",
                    f"{bpb:+.5f}",
                    f"{low:+.5f} to {high:+.5f}" if len(starts) > 1 else "-",
                    *("-" if side is None else f"{side:+.5f}" for side in sides),
                )
            )
    return Finding(
        "loss without parts of the table",
        "corrected",
        f"Shows what a trained model loses on {len(starts):,} documents when a part is taken away, in bits "
        "per byte with a 95 % interval over documents; that is how much it relies on the part, not what "
        "training with the part gained.",
        (
            "model",
            "without",
            "nats/token",
            "bits/byte",
            "95 % interval",
            "nats after word starts",
            "nats elsewhere",
        ),
        rows,
        values,
    )
