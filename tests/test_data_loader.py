from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import counting_shards, document_shards, real_data

from pgolf_fast.config.schema import DataConfig, TrainConfig
from pgolf_fast.data.loader import (
    DocumentStream,
    Prefetcher,
    SequentialLoader,
    ShuffledLoader,
    TokenStream,
    make_loader,
)
from pgolf_fast.data.shards import find_shards, write_shard
from pgolf_fast.errors import PgolfError

Batch = tuple[torch.Tensor, torch.Tensor]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# --- streams


def test_stream_crosses_borders_and_wraps(tmp_path: Path) -> None:
    stream = TokenStream(counting_shards(tmp_path, 5, 3, 4))
    np.testing.assert_array_equal(stream.take(4), [0, 1, 2, 3])
    np.testing.assert_array_equal(stream.take(6), [4, 5, 6, 7, 8, 9])
    assert stream.position == {"epoch": 0, "shard": 2, "offset": 2}
    np.testing.assert_array_equal(stream.take(27), [10, 11, *range(12), *range(12), 0])
    assert stream.position == {"epoch": 3, "shard": 0, "offset": 1}
    assert stream.take(0).shape == (0,)


def test_stream_position_is_resumed(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, 5, 3, 4)
    for count in range(30):
        stream, resumed = TokenStream(shards), TokenStream(shards)
        stream.take(count)
        resumed.seek(json.loads(json.dumps(stream.position)))
        assert resumed.position == stream.position
        np.testing.assert_array_equal(resumed.take(17), stream.take(17))


def test_skipping_is_taking(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, 5, 3, 4)
    taken, skipped = TokenStream(shards), TokenStream(shards)
    taken.take(31)
    skipped.skip(31)
    assert taken.position == skipped.position


@pytest.mark.parametrize(
    ("position", "message"),
    [
        (
            {"epoch": 0, "shard": 3, "offset": 0},
            "cannot resume at shard 3, token 0: the data now has 2 shards",
        ),
        ({"epoch": 0, "shard": 1, "offset": 3}, "cannot resume at shard 1, token 3"),
        ({"epoch": 0, "shard": -1, "offset": 0}, "whole numbers"),
        ({"epoch": 0, "shard": 0}, "whole numbers"),
    ],
)
def test_stream_refuses_places_that_do_not_exist(tmp_path: Path, position: dict, message: str) -> None:
    with pytest.raises(PgolfError, match=message):
        TokenStream(counting_shards(tmp_path, 5, 3)).seek(position)


def test_ids_are_checked_at_opening_and_when_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = counting_shards(tmp_path, 50, 50)
    with pytest.raises(PgolfError, match=r"count_train_000001.bin has token id 80 at position 30"):
        TokenStream(shards, vocab_size=80)
    monkeypatch.setattr("pgolf_fast.data.loader._CHECK_AT_OPENING", 10)
    stream = TokenStream(shards, vocab_size=80)
    stream.take(79)
    with pytest.raises(PgolfError, match=r"count_train_000001.bin has token id 80 at position 30"):
        stream.take(2)


def test_no_shards() -> None:
    with pytest.raises(PgolfError, match=r"no shards"):
        TokenStream([])


def documents_in(tokens: np.ndarray) -> list[tuple[int, ...]]:
    return sorted(tuple(part) for part in np.split(tokens, np.flatnonzero(tokens == 1)) if len(part))


def test_each_epoch_is_every_document_in_a_new_order(tmp_path: Path) -> None:
    lengths = [3, 7, 1, 4, 12, 5, 2, 9]
    shards = document_shards(tmp_path, lengths, 6, 25)  # the borders cut documents in two
    flat = np.concatenate([s.tokens for s in shards])
    stream = DocumentStream(shards, seed=3)
    first, second = stream.take(len(flat)), stream.take(len(flat))
    for epoch in (first, second):
        assert epoch[0] == 1
        assert documents_in(epoch) == documents_in(flat)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, flat)
    np.testing.assert_array_equal(DocumentStream(shards, seed=3).take(2 * len(flat)), [*first, *second])
    assert not np.array_equal(DocumentStream(shards, seed=4).take(len(flat)), first)
    order = np.random.Generator(np.random.PCG64([3, 1])).permutation(len(lengths))
    starts = np.cumsum([0, *lengths])
    np.testing.assert_array_equal(second, np.concatenate([flat[starts[d] : starts[d + 1]] for d in order]))


def test_text_before_the_first_bos_is_a_document(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a_train_0.bin", np.array([7, 8, 1, 9]))
    assert documents_in(DocumentStream([shard], seed=0).take(4)) == [(1, 9), (7, 8)]


def test_document_stream_resumes_and_skips(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7, 1, 4, 12], 6)
    for count in range(70):
        stream, resumed, skipped = (DocumentStream(shards, seed=1) for _ in range(3))
        stream.take(count)
        skipped.skip(count)
        resumed.seek(json.loads(json.dumps(stream.position)))
        assert resumed.position == stream.position == skipped.position
        np.testing.assert_array_equal(resumed.take(40), stream.take(40))


def test_document_stream_refuses(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7])
    with pytest.raises(
        PgolfError, match=r"cannot resume at document 2, token 0: the data now has 2 documents"
    ):
        DocumentStream(shards, seed=0).seek({"epoch": 0, "index": 2, "offset": 0})
    with pytest.raises(PgolfError, match=r"of another loader"):
        DocumentStream(shards, seed=0).seek({"epoch": 0, "shard": 0, "offset": 0})
    with pytest.raises(PgolfError, match=r"no document starts \(token id 1\)"):
        DocumentStream([write_shard(tmp_path / "b_train_0.bin", np.array([5, 6]))], seed=0)


# --- loaders


def test_ranks_take_the_spans_of_the_spec(tmp_path: Path) -> None:
    """Spec 2.2: a call takes world * (local + 1) tokens; rank r has its own span; y is x shifted by one."""
    world, local, seq_len = 3, 8, 4
    shards = counting_shards(tmp_path, 40, 13, 60)
    loaders = [
        SequentialLoader(shards, micro_batch_tokens=local, seq_len=seq_len, rank=r, world_size=world)
        for r in range(world)
    ]
    for call in range(12):  # 12 * 27 tokens: wraps almost three times
        for rank, loader in enumerate(loaders):
            x, y = loader.next_batch()
            start = (call * world + rank) * (local + 1)
            span = torch.arange(start, start + local + 1) % 113
            assert x.dtype == y.dtype == torch.int64
            assert torch.equal(x, span[:-1].reshape(2, seq_len))
            assert torch.equal(y, span[1:].reshape(2, seq_len))
    assert len({json.dumps(loader.state()) for loader in loaders}) == 1


def test_inputs_and_targets_do_not_share_memory(tmp_path: Path) -> None:
    x, y = SequentialLoader(counting_shards(tmp_path, 40), micro_batch_tokens=8, seq_len=4).next_batch()
    x.fill_(0)
    assert torch.equal(y.flatten(), torch.arange(1, 9))


def test_data_shorter_than_a_call_wraps_inside_it(tmp_path: Path) -> None:
    x, y = SequentialLoader(counting_shards(tmp_path, 5), micro_batch_tokens=8, seq_len=4).next_batch()
    assert x.flatten().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert y.flatten().tolist() == [1, 2, 3, 4, 0, 1, 2, 3]


def sequential(folder: Path) -> SequentialLoader:
    return SequentialLoader(
        counting_shards(folder, 40, 13, 60),
        micro_batch_tokens=8,
        seq_len=4,
        rank=1,
        world_size=2,
        vocab_size=113,
    )


def shuffled(folder: Path) -> ShuffledLoader:
    shards = document_shards(folder, [3, 7, 1, 4, 12, 20], 6)
    return ShuffledLoader(
        shards, micro_batch_tokens=8, seq_len=4, seed=5, rank=1, world_size=2, vocab_size=1000
    )


@pytest.mark.parametrize("make", [sequential, shuffled])
def test_a_resumed_run_sees_the_same_batches(
    tmp_path: Path, make: Callable[[Path], SequentialLoader | ShuffledLoader]
) -> None:
    whole = make(tmp_path)
    states, batches = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(whole.state())))
        batches.append(whole.next_batch())
    for start in (0, 1, 7, 24):
        resumed = make(tmp_path)
        resumed.next_batch()  # as after a warm-up whose effect is undone
        resumed.load_state(states[start])
        assert resumed.state() == states[start]
        assert all(same(resumed.next_batch(), batch) for batch in batches[start:])


def test_shuffled_ranks_share_one_stream(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7, 1, 4, 12, 20], 6)
    stream = DocumentStream(shards, seed=5)
    loaders = [
        ShuffledLoader(shards, micro_batch_tokens=8, seq_len=4, seed=5, rank=r, world_size=3)
        for r in range(3)
    ]
    for _ in range(10):
        for loader in loaders:
            span = torch.from_numpy(stream.take(9).astype(np.int64))
            assert same(loader.next_batch(), (span[:-1].view(2, 4), span[1:].view(2, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loader": "shuffled"}, "loader was 'shuffled' and is now 'sequential'"),
        ({"total_tokens": 7}, "total_tokens was 7 and is now 113"),
        ({"position": None}, "its position is None"),
        ({"position": {"epoch": 0}}, "whole numbers"),
    ],
)
def test_state_of_other_data_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    loader = sequential(tmp_path)
    with pytest.raises(PgolfError, match=message):
        loader.load_state({**loader.state(), **change})


def test_state_of_another_seed_is_refused(tmp_path: Path) -> None:
    loader = shuffled(tmp_path)
    with pytest.raises(PgolfError, match=r"data.seed was 6 and is now 5"):
        loader.load_state({**loader.state(), "seed": 6})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"micro_batch_tokens": 9, "seq_len": 4}, "micro_batch_tokens 9 is not a positive multiple of .* 4"),
        ({"micro_batch_tokens": 0, "seq_len": 4}, "micro_batch_tokens 0"),
        ({"micro_batch_tokens": 4, "seq_len": 0}, "train.seq_len 0"),
        (
            {"micro_batch_tokens": 4, "seq_len": 4, "rank": 2, "world_size": 2},
            "rank 2 does not exist.*0 to 1",
        ),
        (
            {"micro_batch_tokens": 10, "seq_len": 10},
            "sequence longer than data: .*10 tokens.* of 10 needs 11",
        ),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, sizes: dict, message: str) -> None:
    with pytest.raises(PgolfError, match=message):
        SequentialLoader(counting_shards(tmp_path, 10), **sizes)


# --- prefetching


def test_prefetcher_hands_out_the_same_batches(tmp_path: Path) -> None:
    plain = sequential(tmp_path)
    with Prefetcher(sequential(tmp_path), depth=3) as ahead:
        for _ in range(20):
            assert ahead.state() == plain.state()
            assert same(ahead.next_batch(), plain.next_batch())
        assert ahead.state() == plain.state()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_prefetcher_state_leaves_out_what_was_not_handed_out(tmp_path: Path) -> None:
    plain, inner = sequential(tmp_path), sequential(tmp_path)
    batches = [plain.next_batch() for _ in range(8)]
    with Prefetcher(inner, depth=2) as ahead:
        for _ in range(3):
            ahead.next_batch()
        wait_for(lambda: len(ahead._ready) == 2)
        state = ahead.state()
        assert inner.state() != state  # the thread is ahead
        assert same(ahead.next_batch(), batches[3])
        ahead.load_state(state)
        assert ahead.state() == state
        assert all(same(ahead.next_batch(), batch) for batch in batches[3:])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_size_of_batches_changes_and_no_token_is_passed_over(tmp_path: Path, rank: int) -> None:
    shards, sizes = counting_shards(tmp_path, 500), {"seq_len": 4, "rank": rank, "world_size": 2}
    loader = SequentialLoader(shards, micro_batch_tokens=16, **sizes)
    with Prefetcher(loader, depth=2) as ahead:
        assert ahead.next_batch()[0][0, 0] == 17 * rank
        wait_for(lambda: len(ahead._ready) == 2)
        ahead.set_batch(4)
        for number in range(3):  # the first batches of both ranks had 17 tokens each, now it is 5
            tokens, targets = ahead.next_batch()
            start = 2 * 17 + (2 * number + rank) * 5
            assert tokens.tolist() == [[*range(start, start + 4)]]
            assert targets.tolist() == [[*range(start + 1, start + 5)]]
        state, expected = ahead.state(), ahead.next_batch()
    resumed = SequentialLoader(shards, micro_batch_tokens=4, **sizes)
    resumed.load_state(state)
    assert same(resumed.next_batch(), expected)
    with pytest.raises(PgolfError, match=r"micro_batch_tokens 6 is not a positive multiple of .* 4"):
        resumed.set_batch(6)


class Failing:
    """Two batches, then an exception."""

    def __init__(self, loader: SequentialLoader):
        self.loader, self.calls = loader, 0

    def next_batch(self) -> Batch:
        self.calls += 1
        if self.calls == 3:
            raise PgolfError("the disk is gone")
        return self.loader.next_batch()

    def state(self) -> dict[str, object]:
        return self.loader.state()

    def load_state(self, state: dict[str, object]) -> None:
        self.loader.load_state(state)


def test_exceptions_surface_in_next_batch_after_the_good_batches(tmp_path: Path) -> None:
    with Prefetcher(Failing(sequential(tmp_path)), depth=4) as ahead:  # type: ignore[arg-type]
        start = ahead.state()
        first = ahead.next_batch()
        ahead.next_batch()
        for _ in range(2):
            with pytest.raises(PgolfError, match=r"the disk is gone"):
                ahead.next_batch()
        ahead.load_state(start)
        assert same(ahead.next_batch(), first)


def test_closing_ends_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    ahead = Prefetcher(sequential(tmp_path))
    assert threading.active_count() == before  # it starts when needed
    ahead.next_batch()
    assert threading.active_count() == before + 1
    ahead.close()
    ahead.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match=r"closed"):
        ahead.next_batch()


def test_depth_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"prefetch depth is 0"):
        Prefetcher(sequential(tmp_path), depth=0)


def test_make_loader_follows_the_config(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7, 1, 4, 12, 20], 6)
    train = TrainConfig(seq_len=4, micro_batch_tokens=8, batch_tokens=16)
    for kind, seed in (("sequential", 1), ("shuffled", 1), ("shuffled", 2)):
        data = DataConfig(loader=kind, seed=seed)  # type: ignore[arg-type]
        sizes = {"micro_batch_tokens": 8, "seq_len": 4, "rank": 1, "world_size": 2}
        plain: SequentialLoader | ShuffledLoader = (
            ShuffledLoader(shards, seed=seed, **sizes)
            if kind == "shuffled"
            else SequentialLoader(shards, **sizes)
        )
        with make_loader(shards, data, train, vocab_size=1000, rank=1, world_size=2) as ahead:
            assert ahead.state() == plain.state()
            assert all(same(ahead.next_batch(), plain.next_batch()) for _ in range(9))


def test_real_shards_give_the_challenges_batches() -> None:
    shards = find_shards(real_data() / "datasets" / "webmix_sp1024", "train")
    flat = np.concatenate([shard.tokens for shard in shards])
    loader = SequentialLoader(shards, micro_batch_tokens=98_304, seq_len=2048, vocab_size=1024)
    for call in range(3):
        x, y = loader.next_batch()
        span = flat[call * 98_305 : (call + 1) * 98_305].astype(np.int64)
        assert x.shape == y.shape == (48, 2048)
        np.testing.assert_array_equal(x.flatten(), span[:-1])
        np.testing.assert_array_equal(y.flatten(), span[1:])
