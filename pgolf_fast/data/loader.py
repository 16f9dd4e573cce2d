"""Training batches: shards -> a stream of tokens -> one Loader, which reads ahead in a thread."""

import os
import weakref
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np

from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.shards import BOS_ID, HEADER_BYTES, Shard, check_tokens, raise_bad_token
from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    import torch

Batch = tuple["torch.Tensor", "torch.Tensor"]
# Inputs and targets; of a packed row, where its segments begin too, as `segment_starts` gives them
Rows = tuple["torch.Tensor", ...]

_FEWEST_SLOTS = 64  # of segment starts, doubled as needed: every number of them is compiled anew
_CHECK_AT_OPENING = 10_000_000  # tokens of each shard; the rest is checked as it is read
_OPEN_FILES = 64  # a data set may have more shards than a process may open


def _state(found: os.stat_result) -> tuple[int, ...]:
    """Return the attributes of a file that change with its contents."""
    return found.st_ino, found.st_size, found.st_mtime_ns


class TokenStream:
    """The tokens of all shards in order, again and again. Ids are checked against `vocab_size`."""

    kind = "sequential"

    def __init__(self, shards: Sequence[Shard], *, vocab_size: int | None = None):
        need(shards, "no shards to read tokens from: give at least one")
        self.shards, self.vocab_size = list(shards), vocab_size
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        self._states = [_state(os.stat(shard.path)) for shard in self.shards]
        self._files: dict[int, int] = {}  # descriptors of open shards, the most recently used last
        weakref.finalize(self, lambda files: [*map(os.close, files.values())], self._files)
        crc = 0  # of token counts and of first and last tokens, to recognize shards that were moved
        for index, shard in enumerate(self.shards):
            count = min(shard.num_tokens, 4096)
            for at in (0, shard.num_tokens - count):
                crc = zlib.crc32(self._read(index, at, count).data, zlib.crc32(b"%d" % at, crc))
        self._digest = f"{crc:08x}"
        self.total = int(self._starts[-1])
        self._epoch, self._at = 0, 0
        if vocab_size is not None:
            for shard in self.shards:
                check_tokens(shard, vocab_size, limit=_CHECK_AT_OPENING)

    def identity(self) -> dict[str, object]:
        """Return what must match for a position to be resumed; the location of the shards may change."""
        return {"data.loader": self.kind, "total_tokens": self.total, "tokens": self._digest}

    def take(self, count: int) -> np.ndarray:
        """Return the next `count` tokens, uint16 of shape (count,), continuing into the next epoch."""
        out = np.empty(count, dtype=np.uint16)
        done = 0
        while done < count:
            start, length = self._next_run()
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            offset = start - int(self._starts[index])
            to_end = self.shards[index].num_tokens - offset
            block = self._read(index, offset, min(length, count - done, to_end))
            if self.vocab_size is not None and int(block.max()) >= self.vocab_size:
                raise_bad_token(self.shards[index], offset, block, self.vocab_size)
            out[done : done + len(block)] = block
            self.skip(len(block))
            done += len(block)
        return out

    def _read(self, index: int, offset: int, count: int) -> np.ndarray:
        """Return tokens of a shard, uint16 of shape (count,). Raises PgolfError if its file was changed.

        They are read with system calls, because a memory map of a truncated file would crash the process.
        """
        path = self.shards[index].path
        file = self._files.pop(index) if index in self._files else os.open(path, os.O_RDONLY)
        self._files[index] = file
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.pop(next(iter(self._files))))
        data = os.pread(file, 2 * count, HEADER_BYTES + 2 * offset)
        if _state(os.fstat(file)) != self._states[index] or len(data) < 2 * count:
            raise PgolfError(f"{path} was changed while it was being read: put back the shard that was there")
        return np.frombuffer(data, dtype="<u2")

    def skip(self, count: int) -> None:
        """Advance by `count` tokens without reading them."""
        self.seek(self.position + count)

    @property
    def position(self) -> int:
        """Tokens before the next one, over all epochs."""
        return self._epoch * self.total + self._at

    def seek(self, position: int) -> None:
        """Move to a `position`."""
        epoch, self._at = divmod(position, self.total)
        if epoch != self._epoch:
            self._start_epoch(epoch)

    def _next_run(self) -> tuple[int, int]:
        """Return where in the shards the next token is, and how many consecutive ones follow from there."""
        return self._at, self.total - self._at

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch


class DocumentStream(TokenStream):
    """Whole documents, each from a BOS id to the next, in an order that `seed` and the epoch determine."""

    kind = "shuffled"

    def __init__(self, shards: Sequence[Shard], *, seed: int, vocab_size: int | None = None):
        super().__init__(shards, vocab_size=vocab_size)
        self._seed = seed
        firsts = zip(self.shards, self._starts, strict=False)
        begins = np.concatenate([shard.document_starts() + int(first) for shard, first in firsts])
        hint = "the shuffled loader needs them; use data.loader sequential or tokenize with BOS"
        need(len(begins), f"no document starts (token id {BOS_ID}) in {self.shards[0].path.parent}: {hint}")
        # tokens before the first BOS are a document too
        self._begins = begins if begins[0] == 0 else np.concatenate([[0], begins])
        self._lengths = np.diff(self._begins, append=self.total)
        self._start_epoch(0)

    def identity(self) -> dict[str, object]:
        return {**super().identity(), "data.seed": self._seed}

    def _start_epoch(self, epoch: int) -> None:
        # a generator for each epoch, so that a resumed run needs no history
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        self._epoch = epoch
        self._order = generator.permutation(len(self._begins))
        self._ends = np.cumsum(self._lengths[self._order])

    def _next_run(self) -> tuple[int, int]:
        index = int(np.searchsorted(self._ends, self._at, side="right"))
        document, left = self._order[index], int(self._ends[index]) - self._at
        return int(self._begins[document] + self._lengths[document]) - left, left


def segment_starts(tokens: np.ndarray, bos_id: int, longest: int) -> np.ndarray:
    """Return where the segments of a packed row (T,) begin, int32, filled up with T to a power of two.

    A segment begins at 0, at every BOS, and every `longest` tokens after one of these (PR 1855).
    """
    begins = np.union1d([0], np.flatnonzero(tokens == bos_id))
    ends = np.append(begins[1:], len(tokens))
    starts = np.concatenate([np.arange(*span, longest) for span in zip(begins, ends, strict=True)])
    slots = max(_FEWEST_SLOTS, 1 << len(starts).bit_length())
    return np.pad(starts, (0, slots - len(starts)), constant_values=len(tokens)).astype(np.int32)


class Loader:
    """Batches cut from a stream as the challenge does, one of them read ahead in a thread.

    Each call uses world_size * (micro_batch_tokens + 1) consecutive tokens; rank r takes the r-th span of
    micro_batch_tokens + 1. The last target of a span is not used again as an input. With `pin`, batches are
    in pinned memory, so that copying them to a GPU does not block. With `max_document`, a batch is one packed
    row, cut as in `segment_starts`. Raises `PgolfError` for sizes that do not fit, or fewer tokens than one
    sequence and its last target.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        micro_batch_tokens: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        pin: bool = False,
        max_document: int | None = None,
        bos_id: int = BOS_ID,
    ):
        self._stream, self._seq_len, self._pin = stream, seq_len, pin
        self._max_document, self._bos_id = max_document, bos_id
        self._rank, self._world_size = rank, world_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pgolf-loader")
        self._ahead: Future[tuple[Rows, int]] | None = None
        # after the batches returned so far; the stream itself is one batch ahead
        self._position = stream.position
        self.set_batch(micro_batch_tokens)
        why = f"rank {rank} does not exist: with world_size {world_size} it is 0 to {world_size - 1}"
        need(0 <= rank < world_size, why)
        why = f"sequence longer than data: the training shards have {stream.total} tokens"
        hint = "use a shorter train.seq_len or more text"
        need(stream.total > seq_len, f"{why}, but one sequence of {seq_len} needs {seq_len + 1}; {hint}")

    def set_batch(self, micro_batch_tokens: int) -> None:
        """Change the tokens of a batch, in whole sequences, from the next one on; no token is skipped."""
        whole = min(self._seq_len, micro_batch_tokens) >= 1 and micro_batch_tokens % self._seq_len == 0
        why = f"is not a positive multiple of train.seq_len {self._seq_len}"
        need(whole, f"train.micro_batch_tokens {micro_batch_tokens} {why}")
        self._discard()
        self._stream.seek(self._position)  # back to the first token that was not returned
        self._span = micro_batch_tokens + 1  # one more for the last target

    def next_batch(self) -> Rows:
        """Return inputs and targets, int64 (micro_batch_tokens // seq_len, seq_len), or a packed row."""
        if self._ahead is None:
            self._ahead = self._pool.submit(self._read)
        batch, self._position = self._ahead.result()
        self._ahead = self._pool.submit(self._read)
        return batch

    def _read(self) -> tuple[Rows, int]:
        """Return the next batch and the stream's position after it."""
        import torch

        # every rank passes over the spans of the others, so that all positions agree
        self._stream.skip(self._rank * self._span)
        span = self._stream.take(self._span)
        self._stream.skip((self._world_size - 1 - self._rank) * self._span)
        parts = (part.astype(np.int64) for part in (span[:-1], span[1:]))
        longest = self._max_document
        batch = [
            torch.from_numpy(part).view(-1, self._seq_len if longest is None else len(part)) for part in parts
        ]
        if longest is not None:
            batch.append(torch.from_numpy(segment_starts(span[:-1], self._bos_id, longest)))
        return tuple(t.pin_memory() if self._pin else t for t in batch), self._stream.position

    def state(self) -> dict[str, object]:
        """Return the state after the batches returned so far, as JSON values, the same on every rank."""
        return {**self._stream.identity(), "position": self._position}

    def load_state(self, state: dict[str, object]) -> None:
        """Continue after the batches that came before `state`. Raises `PgolfError` if the data differs."""
        for name, now in self._stream.identity().items():
            hint = "use the data, data.loader and data.seed this run was started with"
            why = f"cannot resume the data: {name} was {state.get(name)!r} and is now {now!r}; {hint}"
            need(state.get(name, now) == now, why)
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            what = f"its position is {position!r}, not a number of tokens"
            raise PgolfError(f"cannot resume the data: {what}; the checkpoint is damaged")
        self._discard()
        self._stream.seek(position)
        self._position = self._stream.position

    def _discard(self) -> None:
        if self._ahead is not None:
            wait([self._ahead])
            self._ahead = None

    def close(self) -> None:
        """End the thread; `next_batch` then raises RuntimeError. Closing twice is allowed."""
        self._pool.shutdown()


def make_loader(
    shards: Sequence[Shard], config: RunConfig, *, rank: int = 0, world_size: int = 1, pin: bool = False
) -> Loader:
    """Return the loader that `config.data` and `config.train` ask for; `pin` for batches that go to a GPU."""
    vocab_size, train = config.model.vocab_size, config.train
    if config.data.loader == "shuffled":
        stream: TokenStream = DocumentStream(shards, seed=config.data.seed, vocab_size=vocab_size)
    else:
        stream = TokenStream(shards, vocab_size=vocab_size)
    sizes: dict[str, Any] = {"micro_batch_tokens": train.micro_batch_tokens, "seq_len": train.seq_len}
    sizes |= {"max_document": train.max_document, "bos_id": config.model.bos_id}
    return Loader(stream, **sizes, rank=rank, world_size=world_size, pin=pin)
