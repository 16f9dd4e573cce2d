"""Streams of tokens, batches cut from them, and the state a run resumes from."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import counting_shards, document_shards, real_data

from pgolf_fast.config.schema import DataConfig, EvalConfig, RunConfig, TrainConfig
from pgolf_fast.data import loader as loader_module
from pgolf_fast.data.loader import DocumentStream, Loader, TokenStream, make_loader, segment_starts
from pgolf_fast.data.shards import find_shards, write_shard
from pgolf_fast.errors import PgolfError

Batch = tuple[torch.Tensor, torch.Tensor]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# Streams


def test_stream_crosses_borders_and_wraps(tmp_path: Path) -> None:
    stream = TokenStream(counting_shards(tmp_path, 5, 3, 4))
    np.testing.assert_array_equal(stream.take(4), [0, 1, 2, 3])
    np.testing.assert_array_equal(stream.take(6), [4, 5, 6, 7, 8, 9])
    assert stream.position == 10
    np.testing.assert_array_equal(stream.take(27), [10, 11, *range(12), *range(12), 0])
    assert stream.position == 37
    assert stream.take(0).shape == (0,)


def test_stream_position_is_resumed(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, 5, 3, 4)
    for count in range(30):
        stream, resumed = TokenStream(shards), TokenStream(shards)
        stream.take(count)
        resumed.seek(stream.position)
        assert resumed.position == stream.position
        np.testing.assert_array_equal(resumed.take(17), stream.take(17))


def test_skipping_is_taking(tmp_path: Path) -> None:
    shards = counting_shards(tmp_path, 5, 3, 4)
    taken, skipped = TokenStream(shards), TokenStream(shards)
    taken.take(31)
    skipped.skip(31)
    assert taken.position == skipped.position


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


def test_each_epoch_has_every_document_in_a_new_order(tmp_path: Path) -> None:
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
        resumed.seek(stream.position)
        assert resumed.position == stream.position == skipped.position
        np.testing.assert_array_equal(resumed.take(40), stream.take(40))


def test_document_stream_needs_a_document(tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"no document starts \(token id 1\)"):
        DocumentStream([write_shard(tmp_path / "b_train_0.bin", np.array([5, 6]))], seed=0)


# Batches


def sequential(shards, micro_batch_tokens: int = 8, seq_len: int = 4, **settings) -> Loader:
    return Loader(TokenStream(shards), micro_batch_tokens=micro_batch_tokens, seq_len=seq_len, **settings)


def shuffled(shards, **settings) -> Loader:
    return Loader(DocumentStream(shards, seed=5), micro_batch_tokens=8, seq_len=4, **settings)


def rank_1_of_2(folder: Path, kind: str = "sequential") -> Loader:
    if kind == "shuffled":
        return shuffled(document_shards(folder, [3, 7, 1, 4, 12, 20], 6), rank=1, world_size=2)
    return sequential(counting_shards(folder, 40, 13, 60), rank=1, world_size=2)


def test_ranks_take_the_spans_of_the_spec(tmp_path: Path) -> None:
    """A call takes world * (local + 1) tokens; each rank has its own span; y is x shifted by one."""
    world, local = 3, 8
    shards = counting_shards(tmp_path, 40, 13, 60)
    loaders = [sequential(shards, local, rank=r, world_size=world) for r in range(world)]
    for call in range(12):  # 12 * 27 tokens: wraps almost three times
        for rank, loader in enumerate(loaders):
            x, y = loader.next_batch()
            start = (call * world + rank) * (local + 1)
            span = torch.arange(start, start + local + 1) % 113
            assert x.dtype == y.dtype == torch.int64
            assert torch.equal(x, span[:-1].reshape(2, 4))
            assert torch.equal(y, span[1:].reshape(2, 4))
    assert len({json.dumps(loader.state()) for loader in loaders}) == 1


def test_inputs_and_targets_do_not_share_memory(tmp_path: Path) -> None:
    x, y = sequential(counting_shards(tmp_path, 40)).next_batch()
    x.fill_(0)
    assert torch.equal(y.flatten(), torch.arange(1, 9))


def test_data_shorter_than_a_call_wraps_inside_it(tmp_path: Path) -> None:
    x, y = sequential(counting_shards(tmp_path, 5)).next_batch()
    assert x.flatten().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert y.flatten().tolist() == [1, 2, 3, 4, 0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["sequential", "shuffled"])
def test_a_resumed_run_sees_the_same_batches(tmp_path: Path, kind: str) -> None:
    whole = rank_1_of_2(tmp_path, kind)
    states, batches = [], []
    for _ in range(25):
        states.append(json.loads(json.dumps(whole.state())))
        batches.append(whole.next_batch())
    for start in (0, 1, 7, 24):
        resumed = rank_1_of_2(tmp_path, kind)
        resumed.next_batch()  # as after a warm-up whose effect is undone
        resumed.load_state(states[start])
        assert resumed.state() == states[start]
        assert all(same(resumed.next_batch(), batch) for batch in batches[start:])


def test_batches_are_consecutive_pieces_of_the_stream(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7, 1, 4, 12, 20], 6)
    stream = DocumentStream(shards, seed=5)
    loaders = [shuffled(shards, rank=r, world_size=3) for r in range(3)]
    for _ in range(10):
        for loader in loaders:
            span = torch.from_numpy(stream.take(9).astype(np.int64))
            assert same(loader.next_batch(), (span[:-1].view(2, 4), span[1:].view(2, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.loader": "shuffled"}, "data.loader was 'shuffled' and is now 'sequential'"),
        ({"total_tokens": 7}, "total_tokens was 7 and is now 113"),
        ({"position": None}, "its position is None"),
        ({"position": {"epoch": 0}}, "not a number of tokens"),
        ({"position": -1}, "its position is -1, not a number of tokens"),
    ],
)
def test_state_of_other_data_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    loader = rank_1_of_2(tmp_path)
    with pytest.raises(PgolfError, match=message):
        loader.load_state({**loader.state(), **change})


def test_state_of_another_seed_is_refused(tmp_path: Path) -> None:
    loader = rank_1_of_2(tmp_path, "shuffled")
    with pytest.raises(PgolfError, match=r"data.seed was 6 and is now 5"):
        loader.load_state({**loader.state(), "data.seed": 6})


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
        sequential(counting_shards(tmp_path, 10), **sizes)


def test_make_loader_follows_the_config(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7, 1, 4, 12, 20], 6)
    train = TrainConfig(seq_len=4, micro_batch_tokens=8, batch_tokens=16)
    for kind, seed in (("sequential", 1), ("shuffled", 1), ("shuffled", 2)):
        data = DataConfig(loader=kind, seed=seed)  # type: ignore[arg-type]
        config = RunConfig(train=train, data=data, eval=EvalConfig(stride=4))
        stream = DocumentStream(shards, seed=seed) if kind == "shuffled" else TokenStream(shards)
        plain = Loader(stream, micro_batch_tokens=8, seq_len=4, rank=1, world_size=2)
        with contextlib.closing(make_loader(shards, config, rank=1, world_size=2)) as made:
            assert made.state() == plain.state()
            assert all(same(made.next_batch(), plain.next_batch()) for _ in range(9))


def test_make_loader_checks_ids(tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"has token id 1024 at position 1024, but model.vocab_size is 1024"):
        make_loader(counting_shards(tmp_path, 1025), RunConfig())


def test_real_shards_give_the_challenges_batches() -> None:
    shards = find_shards(real_data() / "datasets" / "webmix_sp1024", "train")
    flat = np.concatenate([shard.tokens for shard in shards])
    with contextlib.closing(sequential(shards, 98_304, 2048)) as loader:
        for call in range(3):
            x, y = loader.next_batch()
            span = flat[call * 98_305 : (call + 1) * 98_305].astype(np.int64)
            assert x.shape == y.shape == (48, 2048)
            np.testing.assert_array_equal(x.flatten(), span[:-1])
            np.testing.assert_array_equal(y.flatten(), span[1:])


# Reading ahead


def is_ahead(loader: Loader) -> bool:
    """Wait for the batch that is read ahead; return True if the stream is past what was returned."""
    assert loader._ahead is not None
    loader._ahead.result(timeout=10)
    return loader._stream.position != loader.state()["position"]


def test_state_leaves_out_what_was_not_returned(tmp_path: Path) -> None:
    plain = rank_1_of_2(tmp_path)
    batches = [plain.next_batch() for _ in range(8)]
    with contextlib.closing(rank_1_of_2(tmp_path)) as loader:
        for _ in range(3):
            loader.next_batch()
        assert is_ahead(loader)
        state = loader.state()
        assert same(loader.next_batch(), batches[3])
        loader.load_state(state)
        assert loader.state() == state
        assert all(same(loader.next_batch(), batch) for batch in batches[3:])


@pytest.mark.parametrize("rank", [0, 1])
def test_batch_size_changes_without_skipping_a_token(tmp_path: Path, rank: int) -> None:
    shards, place = counting_shards(tmp_path, 500), {"rank": rank, "world_size": 2}
    with contextlib.closing(sequential(shards, 16, **place)) as loader:
        assert loader.next_batch()[0][0, 0] == 17 * rank
        assert is_ahead(loader)
        loader.set_batch(4)
        for number in range(3):  # the first batches of both ranks had 17 tokens each, now it is 5
            tokens, targets = loader.next_batch()
            start = 2 * 17 + (2 * number + rank) * 5
            assert tokens.tolist() == [[*range(start, start + 4)]]
            assert targets.tolist() == [[*range(start + 1, start + 5)]]
        state, expected = loader.state(), loader.next_batch()
    resumed = sequential(shards, 4, **place)
    resumed.load_state(state)
    assert same(resumed.next_batch(), expected)
    with pytest.raises(PgolfError, match=r"micro_batch_tokens 6 is not a positive multiple of .* 4"):
        resumed.set_batch(6)


def test_errors_surface_in_next_batch_after_the_good_batches(tmp_path: Path, monkeypatch) -> None:
    stream = TokenStream(counting_shards(tmp_path, 40))
    spans = [stream.take(9), stream.take(9)]

    def take(count: int) -> np.ndarray:
        if not spans:
            raise PgolfError("the disk is gone")
        return spans.pop(0)

    with contextlib.closing(sequential(counting_shards(tmp_path, 40))) as loader:
        monkeypatch.setattr(loader._stream, "take", take)
        start = loader.state()
        first = loader.next_batch()
        loader.next_batch()
        for _ in range(2):
            with pytest.raises(PgolfError, match=r"the disk is gone"):
                loader.next_batch()
        monkeypatch.undo()
        loader.load_state(start)
        assert same(loader.next_batch(), first)


@pytest.mark.parametrize("kind", ["cut short", "emptied", "other tokens", "longer"])
def test_a_shard_that_changes_while_it_is_read_is_an_error(tmp_path: Path, kind: str) -> None:
    """A memory map ends the process with SIGBUS for the first two, and trains on for the others."""
    first, second = counting_shards(tmp_path, 50, 50)
    stream = TokenStream([first, second])
    stream.take(60)
    content = second.path.read_bytes()
    changed = {"cut short": content[:-30], "emptied": b"", "other tokens": bytes(len(content))}
    second.path.write_bytes(changed.get(kind, content + b"00"))
    os.utime(second.path, ns=(1, 1))  # a file system may have coarse times
    with pytest.raises(PgolfError, match=r"000001.bin was changed while it was being read: put back"):
        stream.take(20)


def test_a_shard_that_is_replaced_before_it_is_read_is_an_error(tmp_path: Path, monkeypatch) -> None:
    """Of many shards few are open; the others are recognized when they are opened again."""
    monkeypatch.setattr(loader_module, "_OPEN_FILES", 2)
    shards = counting_shards(tmp_path, *[10] * 6)
    stream = TokenStream(shards)
    assert stream.take(120).tolist() == [*range(60), *range(60)]
    assert len(stream._files) == 2
    new = write_shard(tmp_path / "new.bin", shards[0].tokens[::-1].copy())
    new.path.replace(shards[0].path)
    with pytest.raises(PgolfError, match=r"count_train_000000.bin was changed"):
        stream.take(1)


def test_moved_shards_are_recognized(tmp_path: Path) -> None:
    """By more than their number of tokens, which is a round one for many data sets."""
    here, there = (counting_shards(tmp_path / name, 30, 5000) for name in ("here", "there"))
    assert TokenStream(here).identity() == TokenStream(there).identity()
    tokens = there[1].tokens.copy()
    tokens[-1] = 7
    others = [[there[0], write_shard(there[1].path, tokens)], counting_shards(tmp_path / "cut", 3000, 2030)]
    for other in others:
        assert TokenStream(other).identity() != TokenStream(here).identity()
        assert TokenStream(other).total == TokenStream(here).total


def test_closing_ends_the_thread(tmp_path: Path) -> None:
    loader = rank_1_of_2(tmp_path)
    threads = loader._pool._threads
    assert not threads  # it starts when needed
    loader.next_batch()
    assert [thread.is_alive() for thread in threads] == [True]
    loader.close()
    loader.close()
    assert [thread.is_alive() for thread in threads] == [False]
    with pytest.raises(RuntimeError, match=r"after shutdown"):
        loader.next_batch()


# Packed rows


@pytest.mark.parametrize("longest", [1, 3, 8, 100])
@pytest.mark.parametrize(
    "tokens", [[5, 6, 7], [1], [1, 1, 5], [7, 1, *range(2, 30), 1, 8, 9, 1], [1, *[4] * 200]]
)
def test_segments_begin_at_bos_and_are_cut(tokens: list[int], longest: int) -> None:
    found = segment_starts(np.array(tokens), 1, longest)
    want, since = [], 0
    for position, token in enumerate(tokens):
        since = 0 if token == 1 or position == 0 else since + 1
        if since % longest == 0:
            want.append(position)
    assert found.dtype == np.int32
    assert len(found) >= 64
    assert len(found) & (len(found) - 1) == 0
    np.testing.assert_array_equal(found, [*want, *[len(tokens)] * (len(found) - len(want))])
    assert len(want) < len(found)


def test_packed_rows_and_their_resumption(tmp_path: Path) -> None:
    shards = document_shards(tmp_path, [3, 7, 1, 4, 12, 5, 2, 9], 11)
    sizes = {"micro_batch_tokens": 16, "seq_len": 4}
    with contextlib.ExitStack() as stack:
        plain, packed, resumed = (
            stack.enter_context(contextlib.closing(Loader(TokenStream(shards), **sizes, **row)))
            for row in ({}, {"max_document": 5}, {"max_document": 5})
        )
        for step in range(6):
            (x, y), (row, targets, starts) = plain.next_batch(), packed.next_batch()
            assert row.shape == targets.shape == (1, 16)
            assert torch.equal(row.flatten(), x.flatten())
            assert torch.equal(targets.flatten(), y.flatten())
            np.testing.assert_array_equal(starts, segment_starts(row[0].numpy(), 1, 5))
            if step == 2:
                state = json.loads(json.dumps(packed.state()))
        resumed.load_state(state)
        for _ in range(3):
            again = resumed.next_batch()
        assert all(torch.equal(a, b) for a, b in zip(again, (row, targets, starts), strict=True))
