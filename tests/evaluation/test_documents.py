"""Documents scored in parallel: how windows are split, ordered and grouped into chunks."""

import numpy as np
import pytest
from evaluations import SEQ, STRIDE, stream_of
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.config.ttt import LoraConfig, TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import cut_at, document_chunks, document_starts
from pgolf_fast.evaluation.protocol import Ledger
from pgolf_fast.evaluation.windows import sliding_windows


@given(
    count=st.integers(17, 400),
    stride=st.integers(1, 16),
    bos=st.lists(st.integers(0, 400), max_size=12),
    segment=st.integers(1, 40),
    documents=st.integers(1, 5),
    phased=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_target_is_scored_once_and_before_it_is_handed_over(
    count, stride, bos, segment, documents, phased
):
    tokens = np.full(count, 5)
    tokens[[b for b in bos if b < count]] = 1
    starts = document_starts(tokens)
    lora = LoraConfig(segment_tokens=segment, documents=documents)
    config = TTTConfig(adapter="phased" if phased else "lora", chunk_tokens=64, lora=lora)
    whole = sliding_windows(count - 1, 16, stride)
    windows, chunks = document_chunks(whole, starts, config)
    document = np.searchsorted(starts, windows.first, side="right") - 1
    assert sum(c.high - c.low for c in chunks) == len(windows)
    assert sorted(np.concatenate([np.arange(*w) for w in zip(windows.first, windows.end, strict=True)])) == [
        *range(count - 1)
    ]
    assert np.array_equal(document, np.searchsorted(starts, windows.end - 1, side="right") - 1)
    # every target has the inputs that it has without documents
    first_input = dict(zip(whole.end - 1, whole.start, strict=True))
    for end, start in zip(windows.end - 1, windows.start, strict=True):
        assert start == first_input[next(e for e in whole.end - 1 if e >= end)]
    ledger, opened, scored, seen_until = Ledger(stream_of(tokens)), 0, 0, -1
    for chunk in chunks:
        assert chunk.low == scored
        scored = chunk.high
        part = windows[chunk.low : chunk.high]
        ledger.note(part)
        if not chunk.by_document:
            assert phased
            seen_until = chunk.starts[0] + chunk.length
            ledger.hand_over(chunk)
            continue
        opened = chunk.new_documents or opened
        assert opened <= documents
        assert len(chunk.starts) <= opened
        assert (part.row < opened).all()
        assert (part.first >= seen_until).all()  # what the model learned from comes before
        if chunk.starts:
            assert ledger.hand_over(chunk).tokens.shape == (len(chunk.starts), segment + 1)
    assert scored == len(windows)
    assert chunks[-1].by_document


def test_learning_rate_does_not_depend_on_later_documents():
    """Streams that differ from token 200 on, in where documents begin, too: the same numbers until there."""
    first, second = np.full(641, 5), np.full(641, 5)
    first[::20] = second[:200:20] = 1
    lora = LoraConfig(segment_tokens=16, documents=3)
    config, seen = TTTConfig(adapter="phased", chunk_tokens=64, lora=lora), []
    for tokens in (first, second):
        _, chunks = document_chunks(sliding_windows(640, SEQ, STRIDE), document_starts(tokens), config)
        learned = [c for c in chunks if not c.by_document and c.starts[0] + c.length < 200]
        seen.append([(c.starts, c.length, c.index, c.count) for c in learned])
    assert seen[0] == seen[1] == [((0,), 80, 0, 10), ((80,), 60, 1, 10)]


def test_windows_that_score_twice_are_rejected():
    with pytest.raises(PgolfError, match=r"set eval\.repeat_tail to false"):
        cut_at(sliding_windows(100, 16, 4, repeat_tail=True), np.array([0, 50]))
