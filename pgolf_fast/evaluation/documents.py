"""Documents in parallel: windows cut at document starts, scored segment by segment, a batch at a time."""

from dataclasses import replace

import numpy as np

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.data.shards import BOS_ID
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.protocol import Chunk
from pgolf_fast.evaluation.windows import Windows


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """Return the first target of each document, (documents,): the one predicted from its BOS.

    Target t belongs to the document of its input token t. Tokens before the first BOS are a document too.
    """
    starts = np.flatnonzero(tokens[:-1] == BOS_ID)
    return starts if len(starts) and starts[0] == 0 else np.concatenate(([0], starts))


def cut_at(windows: Windows, starts: np.ndarray) -> Windows:
    """Split windows at document starts, keeping all inputs. Raises PgolfError if a target is scored twice."""
    if not np.array_equal(windows.first[1:], windows.end[:-1]):
        raise PgolfError("documents need windows that score each target once: set eval.repeat_tail to false")
    first = np.union1d(windows.first, starts)
    end = np.append(first[1:], windows.end[-1])
    return Windows(windows.start[np.searchsorted(windows.first, first, side="right") - 1], end, first)


def document_chunks(windows: Windows, starts: np.ndarray, config: TTTConfig) -> tuple[Windows, list[Chunk]]:
    """Return windows in scoring order, each with its document's row, and chunks of one segment per document.

    A batch has up to `config.lora.documents` documents with similar numbers of segments. With adapter phased,
    the chunks of some documents are followed by one of the stream for the model itself to learn from. Batches
    do not cross these, so that no score depends on a later token of the stream.
    """
    windows = cut_at(windows, starts)
    ends = np.append(starts[1:], windows.end[-1])
    length = config.lora.segment_tokens
    segments = -(-(ends - starts) // length)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    chunks: list[Chunk] = []
    scored = 0
    phases = [np.arange(len(starts))]  # documents that are scored with the same weights of the model
    if config.adapter == "phased":
        phases = np.split(phases[0], np.flatnonzero(np.diff(starts // config.chunk_tokens)) + 1)
    for phase in phases:
        by_length = phase[np.argsort(-segments[phase], kind="stable")]
        for low in range(0, len(by_length), config.lora.documents):
            batch = by_length[low : low + config.lora.documents]
            for number in range(segments[batch[0]]):
                begin = starts[batch] + number * length
                end = np.clip(begin + length, None, ends[batch])
                parts.append(_windows_of(windows, begin, np.maximum(begin, end)))
                longer = int((segments[batch] > number + 1).sum())  # longest first: these are the first
                learned, new = tuple(begin[:longer].tolist()), len(batch) if number == 0 else 0
                high = scored + len(parts[-1][0])
                chunks.append(Chunk(scored, high, learned, length, by_document=True, new_documents=new))
                scored = high
        if config.adapter == "phased":
            first, last = int(starts[phase[0]]), int(ends[phase[-1]])
            position = first // config.chunk_tokens, -(-int(ends[-1]) // config.chunk_tokens)
            chunks.append(Chunk(scored, scored, (first,), last - first, *position))
    if not chunks[-1].by_document:  # nothing is scored after it
        chunks.pop()
    order, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    return replace(windows[order], row=rows), chunks


def _windows_of(windows: Windows, begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows that start to score in begin[i] .. end[i]-1 and their i, grouped by shape."""
    low, high = (np.searchsorted(windows.first, edge) for edge in (begin, end))
    chosen = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
    row = np.repeat(np.arange(len(low)), high - low)
    part = windows[chosen]
    by_shape = np.lexsort((row, part.end - part.start, part.end - part.first))
    return chosen[by_shape], row[by_shape]
