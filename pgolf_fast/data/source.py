"""The data of a run: shards, validation stream, tokenizer and byte table, checked against each other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast import console
from pgolf_fast.config.schema import DataConfig
from pgolf_fast.data.corpus import build_corpus
from pgolf_fast.data.manifest import check_manifest
from pgolf_fast.data.shards import (
    Shard,
    Split,
    check_tokens,
    data_folder,
    find_shards,
    load_validation,
    open_shard,
    shard_paths,
)
from pgolf_fast.data.tokenizer import (
    ByteTable,
    Tokenizer,
    byte_table,
    check_vocab,
    find_tokenizer,
    scored_bytes,
)
from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    folder: Path
    tokenizer: Tokenizer
    table: ByteTable
    vocab_size: int
    val_tokens: int | None

    def train_shards(self) -> list[Shard]:
        return find_shards(self.folder, "train")

    def validation(self, seq_len: int) -> np.ndarray:
        """Return the validation stream, a whole number of `seq_len` targets plus one token."""
        return load_validation(self.folder, seq_len, vocab_size=self.vocab_size, max_tokens=self.val_tokens)


def open_source(config: DataConfig, vocab_size: int) -> Source:
    """Open the data set that a configuration names, or the built-in corpus if it names none.

    Raises PgolfError for a missing folder or a tokenizer of another size than the model.
    """
    folder = build_corpus(vocab_size=vocab_size) if config.path is None else data_folder(Path(config.path))
    tokenizer = Tokenizer.load(find_tokenizer(folder, config.tokenizer))
    check_vocab(tokenizer, vocab_size)
    check_manifest(folder, tokenizer)
    return Source(folder, tokenizer, byte_table(tokenizer), vocab_size, config.val_tokens)


@dataclass(frozen=True)
class ShardInfo:
    """Counts of a shard."""

    file: str
    split: Split
    tokens: int
    documents: int  # Documents that start in this shard, counted by BOS ids
    scored_bytes: int  # Bytes of this shard's targets, the denominator of bits per byte
    bytes_per_token: float  # scored_bytes per target


def describe(folder: Path | str, tokenizer: Tokenizer) -> list[ShardInfo]:
    """Return one row per training and validation shard of `folder`, in reading order.

    Raises `PgolfError` if there is no shard, or one is bad or has ids that the tokenizer does not know.
    """
    folder = data_folder(folder)
    splits: tuple[Split, ...] = ("train", "val")
    paths = [(path, split) for split in splits for path in shard_paths(folder, split)]
    if not paths:
        raise PgolfError(
            f"no *_train_*.bin or *_val_*.bin shard in {folder}: make some with `pgolf data tokenize` "
            "or `pgolf data download`"
        )
    table, rows = byte_table(tokenizer), []
    for path, split in console.progress(paths, "reading", unit="shard"):
        shard = open_shard(path)
        check_tokens(shard, tokenizer.vocab_size)
        count, documents = scored_bytes(table, shard.tokens), len(shard.document_starts())
        per_token = count / max(shard.num_tokens - 1, 1)
        rows.append(ShardInfo(path.name, split, shard.num_tokens, documents, count, per_token))
    return rows
