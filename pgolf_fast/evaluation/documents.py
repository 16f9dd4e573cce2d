"""Documents in step: windows cut at document starts, scored segment by segment, many documents at once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.data.shards import BOS_ID
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.protocol import Chunk, Segment
from pgolf_fast.evaluation.windows import Windows


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """The first target of each document, (documents,): the one that is predicted from its BOS.

    Target t is of the document that its input token t is in; what comes before the first BOS is one too.
    """
    starts = np.flatnonzero(tokens[:-1] == BOS_ID)
    return starts if len(starts) and starts[0] == 0 else np.concatenate(([0], starts))


def cut_at(windows: Windows, starts: np.ndarray) -> Windows:
    """The windows with those that score targets of several documents cut, so that each scores one's.

    Every target is predicted from the same inputs as before. Raises PgolfError for windows that score a
    target twice.
    """
    if not np.array_equal(windows.first[1:], windows.end[:-1]):
        raise PgolfError("documents need windows that score each target once: set eval.repeat_tail to false")
    first = np.union1d(windows.first, starts)
    end = np.append(first[1:], windows.end[-1])
    return Windows(windows.start[np.searchsorted(windows.first, first, side="right") - 1], end, first)


def document_chunks(
    windows: Windows, starts: np.ndarray, config: TTTConfig
) -> tuple[Windows, list[Chunk | Segment]]:
    """Windows in the order in which they are scored, each with its document's row, and the segments of them.

    A segment is of up to `config.lora.documents` documents, similar in their number of segments. With adapter
    phased, chunks of the stream stand between those of their documents, for the model itself to learn from;
    documents are then batched within a chunk only, so that no score depends on a later token of the stream.
    """
    windows = cut_at(windows, starts)
    ends = np.append(starts[1:], windows.end[-1])
    segments = -(-(ends - starts) // config.lora.segment_tokens)
    order: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    chunks: list[Chunk | Segment] = []
    scored = 0
    for phase in _phases(starts, ends, config):
        by_length = phase[np.argsort(-segments[phase], kind="stable")]
        for at in range(0, len(by_length), config.lora.documents):
            batch = by_length[at : at + config.lora.documents]
            for number in range(segments[batch[0]]):
                begin = starts[batch] + number * config.lora.segment_tokens
                end = np.clip(begin + config.lora.segment_tokens, None, ends[batch])
                found, row = _windows_of(windows, begin, np.maximum(begin, end))
                order.append(found)
                rows.append(row)
                more = int((segments[batch] > number + 1).sum())
                opens = len(batch) if number == 0 else 0
                chunks.append(
                    Segment(scored, scored + len(found), begin[:more], config.lora.segment_tokens, opens)
                )
                scored += len(found)
        if config.adapter == "phased":
            first, last = int(starts[phase[0]]), int(ends[phase[-1]])
            place = first // config.chunk_tokens, -(-int(ends[-1]) // config.chunk_tokens)
            chunks.append(Chunk(scored, scored, first, last, *place))
    if isinstance(chunks[-1], Chunk):  # nothing is scored after it
        chunks.pop()
    chosen = windows[np.concatenate(order)]
    return Windows(chosen.start, chosen.end, chosen.first, np.concatenate(rows)), chunks


def _phases(starts: np.ndarray, ends: np.ndarray, config: TTTConfig) -> Iterator[np.ndarray]:
    """Documents, by number, that are scored with the same weights of the model."""
    numbers = np.arange(len(starts))
    if config.adapter != "phased":
        yield numbers
        return
    for _, group in groupby(numbers, lambda i: starts[i] // config.chunk_tokens):
        yield np.array(list(group))


def _windows_of(windows: Windows, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The windows that begin to score in begin[i] .. end[i]-1, and i; those of one shape side by side."""
    low, high = (np.searchsorted(windows.first, edge) for edge in (begin, end))
    found = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    row = np.repeat(np.arange(len(low)), high - low)
    part = windows[found]
    by_shape = np.lexsort((row, part.end - part.start, part.end - part.first))
    return found[by_shape], row[by_shape]
