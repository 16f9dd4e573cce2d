"""The data of a run: shards, validation stream, tokenizer and byte table, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast.config.schema import DataConfig
from pgolf_fast.data.corpus import build_corpus
from pgolf_fast.data.shards import Shard, data_folder, find_shards, load_validation
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer, byte_table, check_vocab, find_tokenizer


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
    return Source(folder, tokenizer, byte_table(tokenizer), vocab_size, config.val_tokens)
