"""Hash n-gram table: collisions, and the contribution of the table, its gate and its trigrams (PR 1501).

Collisions are counted over all pairs of tokens as published, and on real tokens. A context is the key of a
row: the current token and the one before it (bigram) or two before it (trigram). Rows are those of
`reference.ngram_rows`. A word start is a context whose current token has a leading space. The contribution of
a part is the loss of a trained model without it, on non-overlapping windows.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.bench.drawing import Axes
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.console import Table, number
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.lab.analysis.losses import score_plain
from pgolf_fast.lab.analysis.models import LoadedModel, Validation, open_validation
from pgolf_fast.lab.analysis.summary import Options, Summary, columns, draw, tabulate
from pgolf_fast.lab.compare.statistics import bootstrap_gain
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import reference

GATE, TRIGRAM, TABLE = "gate", "trigram", "whole table"
WORD_START, OTHER = "word start", "other"
ORDERS = ("bigram", "trigram")
DRAWS = 4  # samples of an ideal hash; on 16,384 tokens they differ by about 1 %


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure contexts per bucket, the gate's learned values, and the loss without parts of the table.

    Models without a table are skipped; raises PgolfError if none has one.
    """
    chosen = [model for model in models if model.need_config().model.bigram_vocab_size]
    if not chosen:
        why = "no hash table (model.bigram_vocab_size is 0); analyze a model that has one"
        raise PgolfError(f"{', '.join(model.name for model in models)}: {why}")
    validation = open_validation(chosen, options)
    table = validation.source.table
    configs = {model.name: model.need_config().model for model in chosen}
    first = configs[chosen[0].name]
    others = {f"{rows:,} rows": replace(first, bigram_vocab_size=rows) for rows in options.hash_rows}
    summaries = analyze_layouts({**configs, **others}, validation.tokens, table.has_leading_space)
    networks = {model.name: model.network(table, options.device) for model in chosen}
    summaries += [_learned(networks), _added(networks, validation, options)]
    losses = {name: _without_each(name, model, validation, options) for name, model in networks.items()}
    if gated := {name: own for name, own in losses.items() if configs[name].word_start_boost}:
        summaries.append(_published_contribution(gated))
    return [*summaries, _contribution(losses, validation)]


def analyze_layouts(
    configs: Mapping[str, ModelConfig], tokens: np.ndarray, has_leading_space: np.ndarray
) -> list[Summary]:
    """Measure contexts per bucket for the tables of `configs`, and for variants by split and trigrams.

    tokens (n,) are real ones; has_leading_space bool (V,) is true for word starts. No model is needed.
    """
    layouts: dict[str, ModelConfig] = {}
    users: dict[str, list[str]] = {}
    for name, config in configs.items():
        users.setdefault(_describe(config), []).append(name)
        for split, trigram in product((False, True), repeat=2):
            variant = replace(config, pos_conditional=split, trigram=trigram)
            layouts.setdefault(_describe(variant), variant)
    contexts = {name: contexts_of(config, tokens, has_leading_space) for name, config in layouts.items()}
    used_by = {layout: ", ".join(users.get(layout, ["-"])) for layout in layouts}
    return [_all_pairs(layouts, used_by, has_leading_space), _loads(contexts, len(tokens), list(users))]


def _describe(config: ModelConfig) -> str:
    split = "split" if config.pos_conditional else "shared"
    return f"{config.bigram_vocab_size - 1:,} {split}{', trigrams' if config.trigram else ''}"


@dataclass(frozen=True)
class AllPairs:
    """Contexts per bucket if every context occurred equally often."""

    kind: str
    order: str
    contexts: int
    buckets: int
    per_bucket: float


def all_pairs(config: ModelConfig, has_leading_space: np.ndarray) -> list[AllPairs]:
    """Count as published: all n-grams that end in a class, over the buckets that the class can use.

    V tokens make V bigrams (V^2 trigrams) per current token. One row is reserved for "no n-gram here"; in a
    split table each class has half of the other rows, in a shared one both have all of them (PR 1501). For
    1,024 tokens, 325 of them word starts, and 4,096 rows: 256.07 shared; 162.58 and 349.67 split.
    """
    vocab, starts = len(has_leading_space), int(has_leading_space.sum())
    usable = config.bigram_vocab_size - 1
    last = {WORD_START: starts, OTHER: vocab - starts} if config.pos_conditional else {"all": vocab}
    buckets = usable // 2 if config.pos_conditional else usable
    return [
        AllPairs(kind, order, count * vocab**length, buckets, count * vocab**length / buckets)
        for length, order in enumerate(ORDERS[: 1 + config.trigram], start=1)
        for kind, count in last.items()
    ]


@dataclass(frozen=True)
class Contexts:
    """Distinct contexts of a text and their counts; all arrays are (contexts,)."""

    counts: np.ndarray
    buckets: np.ndarray
    starts: np.ndarray  # bool: the context ends in a word start
    orders: np.ndarray  # index in `ORDERS`
    num_rows: int
    split: bool

    def ideally_hashed(self, rng: np.random.Generator) -> "Contexts":
        """Draw the bucket of each context uniformly from those that it can use."""
        size, usable = len(self.counts), self.num_rows - 1
        if not self.split:
            return replace(self, buckets=rng.integers(usable, size=size))
        second_half = np.where(self.starts, 0, usable // 2)
        return replace(self, buckets=rng.integers(usable // 2, size=size) + second_half)

    def occurrences_by_bucket(self) -> np.ndarray:
        return np.bincount(self.buckets, self.counts, minlength=self.num_rows)


def contexts_of(config: ModelConfig, tokens: np.ndarray, has_leading_space: np.ndarray) -> Contexts:
    """Count the contexts of tokens (n,). Raises PgolfError without a hash table, or under 3 tokens."""
    if not config.bigram_vocab_size:
        raise PgolfError("the model has no hash table: model.bigram_vocab_size is 0")
    if len(tokens) < 3:
        raise PgolfError(f"the hash table is analyzed on at least 3 tokens, not {len(tokens)}")
    ids, vocab = tokens.astype(np.int64), len(has_leading_space)
    leading = torch.from_numpy(has_leading_space) if config.pos_conditional else None
    batch = torch.from_numpy(ids)[None]
    rows = reference.ngram_rows(batch, config.bigram_vocab_size, leading, config.trigram)
    parts = []
    for order, row in enumerate(row for row in rows if row is not None):  # a row of bigrams comes first
        length = order + 1  # tokens before the current one
        keys = ids[length:]  # an n-gram is a number in base V
        for back in range(1, length + 1):
            keys = keys * vocab + ids[length - back : len(ids) - back]
        _, first, counts = np.unique(keys, return_index=True, return_counts=True)
        ends, buckets = ids[length:][first], row[0, length:].numpy()[first]
        parts.append((counts, buckets, has_leading_space[ends], np.full_like(ends, order)))
    counts, buckets, starts, orders = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Contexts(counts, buckets, starts, orders, config.bigram_vocab_size, config.pos_conditional)


@dataclass(frozen=True)
class Load:
    """Collisions of the contexts of one class and order; the last two are means over occurrences."""

    occurrences: int
    contexts: int
    occupied: float  # buckets used by any of them
    contexts_in_bucket: float  # in that of an occurrence, including its own
    foreign: float  # share of the occurrences in that bucket that belong to other contexts


def load(contexts: Contexts, chosen: np.ndarray) -> Load:
    """Measure contexts[chosen]; `chosen` is bool (contexts,) with at least one True."""
    counts, buckets = contexts.counts[chosen], contexts.buckets[chosen]
    in_bucket = np.bincount(contexts.buckets, minlength=contexts.num_rows)
    total = contexts.occurrences_by_bucket()
    company = float(np.average(in_bucket[buckets], weights=counts))
    foreign = float(np.average(1 - counts / total[buckets], weights=counts))
    return Load(int(counts.sum()), len(counts), len(np.unique(buckets)), company, foreign)


def ideal_load(contexts: Contexts, chosen: np.ndarray, *, seed: int = 0) -> Load:
    """Return the mean `load` of DRAWS ideal hashes, drawn with `seed`."""
    rng = np.random.default_rng(seed)
    drawn = [load(contexts.ideally_hashed(rng), chosen) for _ in range(DRAWS)]
    means = np.mean([(one.occupied, one.contexts_in_bucket, one.foreign) for one in drawn], axis=0)
    return Load(drawn[0].occurrences, drawn[0].contexts, *means.tolist())


def groups(contexts: Contexts) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield class, order and mask of every nonempty part of the contexts."""
    for kind, own in ((WORD_START, contexts.starts), (OTHER, ~contexts.starts)):
        for index, order in enumerate(ORDERS):
            chosen = own & (contexts.orders == index)
            if chosen.any():
                yield kind, order, chosen


def _all_pairs(
    layouts: Mapping[str, ModelConfig], used_by: Mapping[str, str], has_leading_space: np.ndarray
) -> Summary:
    values = {
        layout: [{"used_by": used_by[layout], **vars(one)} for one in all_pairs(config, has_leading_space)]
        for layout, config in layouts.items()
    }
    shown = columns(str, used_by="used by", kind="contexts of", order="order")
    shown += columns(",d", contexts="contexts", buckets="buckets each")
    shown += columns(",.1f", per_bucket="per bucket")
    return Summary.published(
        "contexts per bucket, all n-grams",
        "Shows how many n-grams there are per bucket, counting every pair of token ids once (PR 1501: 256 "
        "shared, 163 and 350 split); cannot show what collides, as most pairs never occur and a few occur "
        "all the time.",
        *tabulate(("buckets",), shown, values),
    )


def _loads(contexts: Mapping[str, Contexts], tokens: int, plotted: Sequence[str]) -> Summary:
    rows: list[tuple[str, ...]] = []
    values: dict[str, list[dict[str, Any]]] = {layout: [] for layout in contexts}
    for layout, every in contexts.items():
        for kind, order, chosen in groups(every):
            loads = real, ideal = load(every, chosen), ideal_load(every, chosen)
            entry = {"kind": kind, "order": order, "observed": vars(real), "expected": vars(ideal)}
            values[layout].append(entry)
            formats = {"occupied": ",.0f", "contexts_in_bucket": ".1f", "foreign": ".1%"}
            cells = (format(getattr(one, key), form) for key, form in formats.items() for one in loads)
            rows.append((layout, kind, order, f"{real.contexts:,}", *cells))
    shown = {layout: contexts[layout] for layout in plotted}
    header: tuple[str, ...] = ("buckets", "contexts of", "order", "distinct", "buckets used", "ideal hash")
    header += ("in its bucket", "ideal hash", "foreign use", "ideal hash")
    return Summary(
        "buckets on real tokens",
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
        axes.legend()


def _learned(networks: Mapping[str, GPT]) -> Summary:
    values = {}
    for name, network in networks.items():
        assert network.bigram is not None
        boost = network.word_start_boost.item() if network.config.word_start_boost else None
        values[name] = {"scale": network.bigram.scale.item(), "boost": boost}
    return Summary.published(
        "learned scale and gate",
        "Shows the two learned numbers (PR 1501's parent: 0.112 and 0.007); cannot show how much the table "
        "is used, as its rows and its projection can grow instead.",
        *tabulate(("model",), columns(".4f", scale="bigram.scale", boost="word_start_boost"), values),
    )


def _added(networks: Mapping[str, GPT], validation: Validation, options: Options) -> Summary:
    """Compare the root mean square of token embeddings and of what the table adds, by class of input."""
    values: dict[str, dict[str, dict[str, float]]] = {name: {} for name in networks}
    windows = validation.tokens[:-1].reshape(-1, validation.seq_len)
    tokens = torch.from_numpy(windows).to(options.device)
    starts = torch.from_numpy(validation.source.table.has_leading_space[windows]).to(options.device)
    for name, network in networks.items():
        squares = _squares(network, tokens)
        for kind, chosen in ((WORD_START, starts), (OTHER, ~starts)):
            if chosen.any():
                token, added = (float(square[chosen].mean().sqrt()) for square in squares)
                values[name][kind] = {"token": token, "table": added, "ratio": added / token}
    shown = columns(".4f", token="token embedding", table="from the table") + columns(".1%", ratio="ratio")
    return Summary(
        "what the table adds",
        "Shows how large the table's part of the embedding is relative to the token's own (root mean square "
        "over channels and real tokens); a small part can matter, and later layers can ignore a large one.",
        *tabulate(("model", "input"), shown, values),
    )


@torch.no_grad()
def _squares(network: GPT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean squares over channels of the token embedding and of the table's part, each (B, T)."""
    assert network.bigram is not None
    inputs = network.has_leading_space, network.word_start_boost, network.bigram.proj.weight
    # 4,096 tokens at a time bound the memory of the embeddings
    chunks = tokens.split(max(1, 4096 // tokens.shape[1]))
    added = torch.cat([network.bigram(chunk, *inputs).square().mean(-1) for chunk in chunks])
    return network.tok_emb.weight.square().mean(-1)[tokens], added


def _without_each(name: str, network: GPT, validation: Validation, options: Options) -> dict[str, np.ndarray]:
    """Return losses (targets,) float64: "" as trained, then without each part that the model has."""
    stream = validation.stream(options.device)
    parts = [GATE] * network.config.word_start_boost + [TRIGRAM] * network.config.trigram + [TABLE]
    losses = {}
    for part in ("", *parts):
        with _without(network, part):
            _, losses[part] = score_plain(name, network, stream, validation.seq_len)
    return losses


@contextmanager
def _without(network: GPT, part: str) -> Iterator[None]:
    """Set the gate to 1, skip trigram rows or add nothing from the table; restore the model afterward."""
    table = network.bigram
    assert table is not None
    scale, boost, trigram = table.scale.data.clone(), network.word_start_boost.data.clone(), table.trigram
    if part == GATE:
        network.word_start_boost.data.fill_(1)
    elif part == TABLE:
        table.scale.data.zero_()
    table.trigram = trigram and part != TRIGRAM
    try:
        yield
    finally:
        table.scale.data.copy_(scale)
        network.word_start_boost.data.copy_(boost)
        table.trigram = trigram


def _published_contribution(losses: Mapping[str, Mapping[str, np.ndarray]]) -> Summary:
    values = {}
    for name, by_part in losses.items():
        nats = float(by_part[GATE].mean() - by_part[""].mean())
        values[name] = {"nats": nats, "bits_per_token": nats / math.log(2)}
    return Summary.published(
        "loss without the gate",
        "Shows what a trained model loses with the gate set to 1 (PR 1501: +0.017 nats, called +0.025 bpb, "
        "which are bits per token); cannot show what a model trained without a gate would lose.",
        *tabulate(("model",), columns("+.5f", nats="nats/token", bits_per_token='its "bpb"'), values),
    )


def _contribution(losses: Mapping[str, Mapping[str, np.ndarray]], validation: Validation) -> Summary:
    starts = document_starts(validation.tokens)
    text_bytes = np.add.reduceat(validation.stream("cpu").target_bytes, starts)
    after_start = validation.source.table.has_leading_space[validation.tokens[:-1]]
    rows: list[tuple[str, ...]] = []
    values: dict[str, Any] = {}
    for name, by_part in losses.items():
        base, *_ = by_part.values()
        values[name] = {"": {"loss": float(base.mean())}}
        for part, without in list(by_part.items())[1:]:
            before, after = (np.add.reduceat(each, starts) for each in (without, base))
            bpb, low, high = bootstrap_gain(before, after, text_bytes)
            change = without - base
            sides = [float(change[c].mean()) if c.any() else None for c in (after_start, ~after_start)]
            nats = float(change.mean())
            by_side = {"nats_after_word_starts": sides[0], "nats_elsewhere": sides[1]}
            values[name][part] = {"nats": nats, "bpb": bpb, "low": low, "high": high, **by_side}
            interval = f"{low:+.5f} to {high:+.5f}" if len(starts) > 1 else "-"
            cells = (f"{nats:+.5f}", f"{bpb:+.5f}", interval, *(number(side, "+.5f") for side in sides))
            rows.append((name, part, *cells))
    header: tuple[str, ...] = ("model", "without", "nats/token", "bits/byte", "95 % interval")
    header += ("nats after word starts", "nats elsewhere")
    return Summary(
        "loss without parts of the table",
        f"Shows what a trained model loses on {len(starts):,} documents when a part is removed, in bits per "
        "byte with a 95 % interval over documents; that is how much the model relies on the part, not what "
        "training with the part gained.",
        Table(header, rows),
        values,
    )
