"""Breakdowns of a score that sum to it: by class of target, context, document length and size of loss."""

from typing import Any

import numpy as np

from pgolf_fast.console import Table, number
from pgolf_fast.data.tokenizer import SPACE, Tokenizer
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.score import Score, Scorer
from pgolf_fast.evaluation.scores import TTT, labeled

CLASSES = ("word start", "within word", "byte", "after BOS", "BOS")
"""A target belongs to the last class that fits. BOS: any control, unknown or unused piece, which has no bytes
and mostly ends a document; after BOS: its input is such a piece; byte: a piece of one raw byte; word start: a
piece with a leading space; within word: any other."""
_WORD_START, _WITHIN, _BYTE, _AFTER, _SILENT = range(5)
PERCENTS = (1, 5, 10, 25, 50, 75, 90, 95, 99)
HARDEST = (1, 2, 5, 10, 25, 50)
THRESHOLDS = (1, 3, 5, 7, 10)
SHORTEST_CONTEXT, SHORTEST_DOCUMENT = 16, 128  # upper end of the first bucket; doubles for each next one
_BLOCK = 2**22  # upper limit of targets in memory at once


def token_classes(tokenizer: Tokenizer) -> np.ndarray:
    """Return the class of each id as a target regardless of its input: indices of `CLASSES`, uint8 (V,)."""
    ids = range(tokenizer.vocab_size)
    silent, byte = [tokenizer.is_silent(i) for i in ids], [tokenizer.is_byte(i) for i in ids]
    starts = [tokenizer.piece(i).startswith(SPACE) for i in ids]
    return np.select([silent, byte, starts], [_SILENT, _BYTE, _WORD_START], _WITHIN).astype(np.uint8)


def target_classes(tokens: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the class of each target tokens[1:], uint8 (targets,); `classes` (V,) is `token_classes`."""
    own = classes[tokens]
    return np.where((own[:-1] == _SILENT) & (own[1:] != _SILENT), np.uint8(_AFTER), own[1:])


def doubling(values: np.ndarray, first: int) -> np.ndarray:
    """Return the bucket index of positive integers; buckets are 1 .. first, first+1 .. 2 first, ..."""
    return np.searchsorted(first * 2 ** np.arange(40), values)


def _scores(sums: np.ndarray, first: int = 0) -> dict[str, dict]:
    """Return scores by class from sums (3, groups) or, with `first`, by nonempty bucket of `doubling`."""
    if first:
        buckets = np.flatnonzero(sums[1]).tolist()
        names = {i: f"{first * 2 ** (i - 1) + 1 if i else 1}-{first * 2**i}" for i in buckets}
    else:
        names = dict(enumerate(CLASSES))
    found = {name: Score(float(sums[0, i]), int(sums[1, i]), int(sums[2, i])) for i, name in names.items()}
    return {name: score.to_dict() for name, score in found.items()}


def figures(scorer: Scorer, classes: np.ndarray) -> dict[str, Any]:
    """Return the breakdown of losses that are filled in, as JSON values; `classes` is `token_classes`.

    by_class, by_context, by_document_tokens: scores by name in `CLASSES`, by context length in tokens, and by
    tokens of the document, BOS included. Everything else is `spread`.
    """
    stream, windows = scorer.stream, scorer.windows
    tokens, losses = stream.tokens.cpu().numpy(), scorer.losses.cpu().numpy()
    starts = document_starts(tokens)
    lengths = np.diff(np.append(starts, stream.num_targets))
    class_of = target_classes(tokens, classes)
    document_of = np.repeat(doubling(lengths, SHORTEST_DOCUMENT).astype(np.uint8), lengths)
    sums = np.zeros((3, 3, 64))  # by class, context or document; of nats, targets or bytes; in each group
    step = max(1, _BLOCK // scorer.seq_len)
    for low in range(0, len(windows), step):
        part = windows[low : low + step]
        targets = part.targets()
        context = targets - np.repeat(part.start, part.end - part.first) + 1
        own = losses[scorer.places[low] : scorer.places[low + len(part)]]
        groups = class_of[targets], doubling(context, SHORTEST_CONTEXT), document_of[targets]
        for kind, group in enumerate(groups):
            for unit, weights in enumerate((own, None, stream.target_bytes[targets])):
                sums[kind, unit] += np.bincount(group, weights, minlength=64)
    shortest = (0, SHORTEST_CONTEXT, SHORTEST_DOCUMENT)
    by_class, by_context, by_document = map(_scores, sums, shortest)
    parts = {"by_class": by_class, "by_context": by_context, "by_document_tokens": by_document}
    return {**parts, **spread(losses)}


def spread(losses: np.ndarray) -> dict[str, Any]:
    """Return how losses (targets,) in nats, in any order, are spread.

    loss_quantiles: losses that `PERCENTS` of all targets do not exceed, interpolated. loss_share_of_*: share
    of the summed loss in the hardest targets, by percent, rounded up, and in the easiest half. above_nats:
    shares of the targets and of the summed loss above `THRESHOLDS` (the table of PR 296).
    """
    ordered = np.sort(losses).astype(np.float64)
    count, total = len(ordered), float(ordered.sum())

    def share(first: int) -> float:
        return float(ordered[first:].sum()) / total

    quantiles = {f"p{p}": float(q) for p, q in zip(PERCENTS, np.percentile(ordered, PERCENTS), strict=True)}
    hardest = {str(p): share(count - -(-count * p // 100)) for p in HARDEST}
    firsts = np.searchsorted(ordered, THRESHOLDS, side="right").tolist()
    above = {str(t): (count - i, i) for t, i in zip(THRESHOLDS, firsts, strict=True)}
    return {
        "loss_quantiles": quantiles,
        "loss_share_of_hardest_percent": hardest,
        "loss_share_of_easiest_half": 1 - hardest["50"],
        "above_nats": {t: {"targets": n / count, "loss": share(i)} for t, (n, i) in above.items()},
    }


def tables(figures: dict[str, dict], *, every: bool = True, illegal: str | None = None) -> list[Table]:
    """Tabulate the `figures` of a scores file: the sliding score by class, or with `every` all of them.

    illegal: why the test-time training breaks the rules, if it does; its columns are labeled.
    """
    sliding, ttt, plain = figures["sliding"], figures.get("sliding_ttt", {}), figures["non_overlapping"]
    column = labeled("bpb with TTT", illegal)
    by_class = _part_table("class (sliding)", sliding["by_class"], ttt.get("by_class"), column)
    if not every:
        return [by_class]
    by_document, with_ttt = sliding["by_document_tokens"], ttt.get("by_document_tokens")
    both = {"sliding": sliding, **({labeled(TTT, illegal): ttt} if ttt else {})}
    nats = {name: f["loss_quantiles"] for name, f in both.items()}
    quantiles = [(p, *(f"{own[p]:.4f}" for own in nats.values())) for p in sliding["loss_quantiles"]]
    hardest = [(f"{p} %", f"{share:.1%}") for p, share in sliding["loss_share_of_hardest_percent"].items()]
    hardest.append(("easiest 50 %", f"{sliding['loss_share_of_easiest_half']:.1%}"))
    above = [(f"> {k}", f"{a['targets']:.1%}", f"{a['loss']:.1%}") for k, a in sliding["above_nats"].items()]
    return [
        by_class,
        _part_table("document tokens (sliding)", by_document, with_ttt, column),
        _part_table("context (non-overlapping)", plain["by_context"]),
        Table(("quantile of nats", *both), quantiles),
        Table(("hardest targets (sliding)", "of the loss"), hardest),
        Table(("nats (sliding)", "of targets", "of the loss"), above),
    ]


def shares(parts: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Return each part's share of targets, bytes and summed loss; parts as from `Score.to_dict`."""
    columns = {
        "targets": [p["tokens"] for p in parts.values()],
        "bytes": [p["bytes"] for p in parts.values()],
        "loss": [p["tokens"] * (p["loss"] or 0.0) for p in parts.values()],
    }
    own = {unit: [size / (sum(sizes) or 1) for size in sizes] for unit, sizes in columns.items()}
    return {name: {unit: own[unit][i] for unit in own} for i, name in enumerate(parts)}


def _part_table(title: str, parts: dict, with_ttt: dict | None = None, column: str = "") -> Table:
    """Tabulate parts of a score: each one's share of targets, bytes and loss, and its own score."""
    rows = []
    for name, own in shares(parts).items():
        scores = [parts[name]["bpb"], parts[name]["loss"]]
        scores += [] if with_ttt is None else [with_ttt[name]["bpb"]]
        rows.append((name, *(f"{s:.2%}" for s in own.values()), *(number(s, ".4f") for s in scores)))
    header = (title, "targets", "bytes", "loss", "bpb", "nats/token", column)
    return Table(header[: 6 if with_ttt is None else 7], rows)
