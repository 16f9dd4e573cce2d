"""Batches of tokens: the challenge's sequential stream, or documents in a new order each epoch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pgolf_fast.config.schema import DataConfig, TrainConfig
from pgolf_fast.data.shards import BOS_ID, Shard, check_tokens, raise_bad_token
from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    import torch

Batch = tuple["torch.Tensor", "torch.Tensor"]

_CHECK_AT_OPENING = 10_000_000
"""Tokens of each shard checked before training starts; the rest is checked as it is read."""


class _Flat:
    """Shards seen as one array; every id read is checked against the vocabulary."""

    def __init__(self, shards: Sequence[Shard], vocab_size: int | None):
        if not shards:
            raise PgolfError("no shards to read tokens from: give at least one")
        self.shards = list(shards)
        self.vocab_size = vocab_size
        self.starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        self.total = int(self.starts[-1])
        self._maps: list[np.memmap | None] = [None] * len(self.shards)
        if vocab_size is not None:
            for shard in self.shards:
                check_tokens(shard, vocab_size, limit=_CHECK_AT_OPENING)

    def map_of(self, index: int) -> np.memmap:
        tokens = self._maps[index]
        if tokens is None:
            tokens = self._maps[index] = self.shards[index].tokens
        return tokens

    def shard_at(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def copy_into(self, out: np.ndarray, position: int) -> None:
        """Fill `out` (uint16) with the tokens from `position` on, without wrapping."""
        done = 0
        while done < len(out):
            index = self.shard_at(position + done)
            offset = position + done - int(self.starts[index])
            block = self.map_of(index)[offset : offset + len(out) - done]
            if self.vocab_size is not None and int(block.max()) >= self.vocab_size:
                raise_bad_token(self.shards[index], offset, block, self.vocab_size)
            out[done : done + len(block)] = block
            done += len(block)


class _Stream(Protocol):
    total: int

    def take(self, count: int) -> np.ndarray: ...
    def skip(self, count: int) -> None: ...
    def seek(self, position: dict[str, int]) -> None: ...
    @property
    def position(self) -> dict[str, int]: ...


class TokenStream:
    """The tokens of all shards in order, again from the first shard after the last.

    Raises `PgolfError` if there are no shards or an id is not below `vocab_size`.
    """

    def __init__(self, shards: Sequence[Shard], *, vocab_size: int | None = None):
        self._flat = _Flat(shards, vocab_size)
        self.total = self._flat.total
        self._epoch = 0
        self._at = 0

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, uint16 of shape (count,); crosses shard borders and wraps."""
        out = np.empty(count, dtype=np.uint16)
        done = 0
        while done < count:
            step = min(count - done, self.total - self._at)
            self._flat.copy_into(out[done : done + step], self._at)
            self.skip(step)
            done += step
        return out

    def skip(self, count: int) -> None:
        """Pass over `count` tokens without reading them."""
        epochs, self._at = divmod(self._at + count, self.total)
        self._epoch += epochs

    @property
    def position(self) -> dict[str, int]:
        """Where the next token comes from: epoch, shard index and offset in that shard."""
        index = self._flat.shard_at(self._at)
        return {"epoch": self._epoch, "shard": index, "offset": self._at - int(self._flat.starts[index])}

    def seek(self, position: dict[str, int]) -> None:
        """Go to a `position`. Raises `PgolfError` if these shards have no such place."""
        epoch, index, offset = _fields(position, ("epoch", "shard", "offset"))
        if index >= len(self._flat.shards) or offset >= self._flat.shards[index].num_tokens:
            raise PgolfError(
                f"cannot resume at shard {index}, token {offset}: the data now has {len(self._flat.shards)} "
                f"shards and {self.total} tokens; use the data this run was started with"
            )
        self._epoch, self._at = epoch, int(self._flat.starts[index]) + offset


class DocumentStream:
    """Whole documents one after the other, in a new order each epoch that depends on `seed` and epoch alone.

    A document starts at each BOS id. Raises `PgolfError` if there is none.
    """

    def __init__(self, shards: Sequence[Shard], *, seed: int, vocab_size: int | None = None):
        self._flat = _Flat(shards, vocab_size)
        self.total = self._flat.total
        self._seed = seed
        self._begins = self._index_documents()
        self._lengths = np.diff(self._begins, append=self.total)
        self._shuffle(0)
        self._at = 0

    def _index_documents(self) -> np.ndarray:
        begins = []
        for index in range(len(self._flat.shards)):
            tokens = self._flat.map_of(index)
            for start in range(0, len(tokens), 1 << 24):
                found = np.flatnonzero(tokens[start : start + (1 << 24)] == BOS_ID)
                begins.append(found + (start + int(self._flat.starts[index])))
        documents = np.concatenate(begins)
        if not len(documents):
            raise PgolfError(
                f"no document starts (token id {BOS_ID}) in {self._flat.shards[0].path.parent}: "
                "the shuffled loader needs them; use data.loader sequential or tokenize with BOS"
            )
        return documents if documents[0] == 0 else np.concatenate([[0], documents])

    def _shuffle(self, epoch: int) -> None:
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        self._epoch = epoch
        self._order = generator.permutation(len(self._begins))
        self._ends = np.cumsum(self._lengths[self._order])

    def _locate(self) -> tuple[int, int]:
        """Index in this epoch's order of the current document, and the offset in it."""
        index = int(np.searchsorted(self._ends, self._at, side="right"))
        return index, self._at - (int(self._ends[index - 1]) if index else 0)

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens, uint16 of shape (count,); goes on into the next epoch."""
        out = np.empty(count, dtype=np.uint16)
        done = 0
        while done < count:
            index, offset = self._locate()
            document = int(self._order[index])
            step = min(count - done, int(self._lengths[document]) - offset)
            self._flat.copy_into(out[done : done + step], int(self._begins[document]) + offset)
            self.skip(step)
            done += step
        return out

    def skip(self, count: int) -> None:
        """Pass over `count` tokens without reading them."""
        epochs, self._at = divmod(self._at + count, self.total)
        if epochs:
            self._shuffle(self._epoch + epochs)

    @property
    def position(self) -> dict[str, int]:
        """Where the next token comes from: epoch, index in its order of documents, offset in the document."""
        index, offset = self._locate()
        return {"epoch": self._epoch, "index": index, "offset": offset}

    def seek(self, position: dict[str, int]) -> None:
        """Go to a `position`. Raises `PgolfError` if these documents have no such place."""
        epoch, index, offset = _fields(position, ("epoch", "index", "offset"))
        self._shuffle(epoch)
        if index >= len(self._order) or offset >= self._lengths[self._order[index]]:
            raise PgolfError(
                f"cannot resume at document {index}, token {offset}: the data now has {len(self._order)} "
                f"documents and {self.total} tokens; use the data this run was started with"
            )
        self._at = (int(self._ends[index - 1]) if index else 0) + offset


class _Loader:
    """Cuts a stream into batches, as the challenge does.

    Each call uses world_size * (micro_batch_tokens + 1) consecutive tokens; rank r takes the r-th span of
    micro_batch_tokens + 1. The last target of a span is not used again as an input.
    """

    kind = ""

    def __init__(self, stream: _Stream, *, micro_batch_tokens: int, seq_len: int, rank: int, world_size: int):
        self._seq_len = seq_len
        self.set_batch(micro_batch_tokens)
        if not 0 <= rank < world_size:
            raise PgolfError(
                f"rank {rank} does not exist: with world_size {world_size} it is 0 to {world_size - 1}"
            )
        if stream.total < seq_len + 1:
            raise PgolfError(
                f"sequence longer than data: the training shards have {stream.total} tokens, but one "
                f"sequence of {seq_len} needs {seq_len + 1}; use a shorter train.seq_len or more text"
            )
        self._stream = stream
        self._rank = rank
        self._world_size = world_size

    def set_batch(self, micro_batch_tokens: int) -> None:
        """From the next batch on, that many tokens each. Raises `PgolfError` unless these are sequences."""
        if self._seq_len < 1 or micro_batch_tokens < 1 or micro_batch_tokens % self._seq_len:
            raise PgolfError(
                f"train.micro_batch_tokens {micro_batch_tokens} is not a positive multiple of train.seq_len "
                f"{self._seq_len}"
            )
        self._span = micro_batch_tokens + 1

    def next_batch(self) -> Batch:
        """Inputs and targets, two int64 tensors of shape (micro_batch_tokens // seq_len, seq_len)."""
        import torch

        self._stream.skip(self._rank * self._span)
        span = self._stream.take(self._span)
        self._stream.skip((self._world_size - 1 - self._rank) * self._span)
        inputs, targets = (torch.from_numpy(part.astype(np.int64)) for part in (span[:-1], span[1:]))
        return inputs.view(-1, self._seq_len), targets.view(-1, self._seq_len)

    def state(self) -> dict[str, object]:
        """What `load_state` needs to go on with the next batch; JSON-able and the same on every rank."""
        return {"loader": self.kind, "total_tokens": self._stream.total, "position": self._stream.position}

    def load_state(self, state: dict[str, object]) -> None:
        """Go on after the batches that came before `state`. Raises `PgolfError` if the data differs."""
        for name, here in (("loader", self.kind), ("total_tokens", self._stream.total)):
            if state.get(name) != here:
                raise PgolfError(
                    f"cannot resume the data: {name} was {state.get(name)!r} and is now {here!r}; "
                    "use the data and data.loader this run was started with"
                )
        position = state.get("position")
        if not isinstance(position, dict):
            raise PgolfError(
                f"cannot resume the data: its position is {position!r}; the checkpoint is damaged"
            )
        self._stream.seek(position)


class SequentialLoader(_Loader):
    """The challenge's loader: the shards in order, no shuffling, no document alignment.

    Raises `PgolfError` for sizes that do not fit, or fewer tokens than one sequence and its target.
    """

    kind = "sequential"

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        micro_batch_tokens: int,
        seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ):
        stream = TokenStream(shards, vocab_size=vocab_size)
        super().__init__(
            stream, micro_batch_tokens=micro_batch_tokens, seq_len=seq_len, rank=rank, world_size=world_size
        )


class ShuffledLoader(_Loader):
    """Documents in a new order each epoch, then cut like the challenge's stream.

    Raises `PgolfError` as `SequentialLoader` does, and if no document starts in the shards.
    """

    kind = "shuffled"

    def __init__(
        self,
        shards: Sequence[Shard],
        *,
        micro_batch_tokens: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ):
        self._seed = seed
        stream = DocumentStream(shards, seed=seed, vocab_size=vocab_size)
        super().__init__(
            stream, micro_batch_tokens=micro_batch_tokens, seq_len=seq_len, rank=rank, world_size=world_size
        )

    def state(self) -> dict[str, object]:
        return {**super().state(), "seed": self._seed}

    def load_state(self, state: dict[str, object]) -> None:
        if state.get("seed") != self._seed:
            raise PgolfError(
                f"cannot resume the data: data.seed was {state.get('seed')!r} and is now {self._seed}; "
                "use the seed this run was started with"
            )
        super().load_state(state)


class Prefetcher:
    """Fetches up to `depth` batches ahead in a daemon thread, which starts with the first `next_batch`.

    An exception in the thread is raised by the `next_batch` that would have returned its batch. With `pin`,
    batches lie in pinned memory, from which a copy to the GPU does not make the host wait.
    """

    def __init__(self, loader: SequentialLoader | ShuffledLoader, *, depth: int = 2, pin: bool = False):
        if depth < 1:
            raise PgolfError(f"prefetch depth is {depth}; it must be at least 1")
        self._loader = loader
        self._depth = depth
        self._pin = pin
        self._state = loader.state()
        self._ready: deque[tuple[Batch, dict[str, object]]] = deque()
        self._error: Exception | None = None
        self._change = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stop = False
        self._closed = False

    def _fetch(self) -> None:
        try:
            while True:
                with self._change:
                    self._change.wait_for(lambda: self._stop or len(self._ready) < self._depth)
                    if self._stop:
                        return
                tokens, targets = self._loader.next_batch()
                if self._pin:
                    tokens, targets = tokens.pin_memory(), targets.pin_memory()
                item = ((tokens, targets), self._loader.state())
                with self._change:
                    self._ready.append(item)
                    self._change.notify_all()
        except Exception as error:  # noqa: BLE001 - whatever it is, next_batch raises it
            with self._change:
                self._error = error
                self._change.notify_all()

    def next_batch(self) -> Batch:
        """The next batch, waiting for it if need be."""
        if self._closed:
            raise RuntimeError("next_batch called on a closed Prefetcher")
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch, name="pgolf-prefetch", daemon=True)
            self._thread.start()
        with self._change:
            self._change.wait_for(lambda: bool(self._ready) or self._error is not None)
            if not self._ready:
                assert self._error is not None
                raise self._error
            batch, self._state = self._ready.popleft()
            self._change.notify_all()
        return batch

    def state(self) -> dict[str, object]:
        """The loader's state after the batches handed out so far; those fetched ahead do not count."""
        return self._state

    def load_state(self, state: dict[str, object]) -> None:
        """Drop what was fetched ahead and go on from `state`."""
        self._halt()
        self._loader.load_state(state)
        self._state = self._loader.state()

    def set_batch(self, micro_batch_tokens: int) -> None:
        """From the next batch on, that many tokens each; no token is passed over for it."""
        self._halt()
        self._loader.set_batch(micro_batch_tokens)
        self._loader.load_state(self._state)

    def _halt(self) -> None:
        with self._change:
            self._stop = True
            self._change.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._thread, self._error, self._stop = None, None, False
        self._ready.clear()

    def close(self) -> None:
        """Stop the thread. Closing twice is allowed."""
        self._halt()
        self._closed = True

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_loader(
    shards: Sequence[Shard],
    data_config: DataConfig,
    train_config: TrainConfig,
    *,
    vocab_size: int,
    rank: int = 0,
    world_size: int = 1,
    pin: bool = False,
) -> Prefetcher:
    """The prefetching loader that `data_config.loader` asks for; `pin` for batches that go to a GPU."""
    loader: SequentialLoader | ShuffledLoader
    sizes = {"micro_batch_tokens": train_config.micro_batch_tokens, "seq_len": train_config.seq_len}
    place = {"rank": rank, "world_size": world_size, "vocab_size": vocab_size}
    if data_config.loader == "shuffled":
        loader = ShuffledLoader(shards, seed=data_config.seed, **sizes, **place)
    else:
        loader = SequentialLoader(shards, **sizes, **place)
    return Prefetcher(loader, pin=pin)


def _fields(position: dict[str, int], names: tuple[str, ...]) -> list[int]:
    values = [position.get(name) for name in names]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise PgolfError(
            f"cannot resume the data: its position is {position}; {', '.join(names)} are whole numbers: "
            "the checkpoint is damaged or of another loader"
        )
    return [int(value) for value in values if value is not None]
