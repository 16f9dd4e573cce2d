"""The data of a run: shards, validation stream, tokenizer and byte table, checked against each other."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast import console
from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import DataConfig
from pgolf_fast.data import shards
from pgolf_fast.data.corpus import build_corpus
from pgolf_fast.data.manifest import check_manifest
from pgolf_fast.data.shards import BOS_ID, Shard, Split, open_shard, shard_paths, side_file
from pgolf_fast.data.tokenizer import (
    ByteTable,
    Tokenizer,
    byte_table,
    find_tokenizer,
    scored_bytes,
    target_bytes,
)
from pgolf_fast.errors import PgolfError

_SAMPLE = 1 << 16  # tokens at the start of a shard that are checked against its tokenizer
_DOCUMENTS, _LENGTH = 64, 256  # largest number of documents, and of tokens in each
SIDE_SHARE = 0.05  # by which side files may differ from pieces, as they count text before normalization


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    folder: Path
    tokenizer: Tokenizer
    table: ByteTable
    vocab_size: int
    val_tokens: int | None

    def train_shards(self) -> list[Shard]:
        found = shards.find_shards(self.folder, "train")
        looks_foreign(found[0], self.tokenizer)
        return found

    def validation(self, seq_len: int) -> np.ndarray:
        """Return the validation stream, a whole number of `seq_len` targets plus one token."""
        vocab_size, max_tokens = self.vocab_size, self.val_tokens
        return shards.load_validation(self.folder, seq_len, vocab_size=vocab_size, max_tokens=max_tokens)

    def side_bytes(self, tokens: np.ndarray) -> np.ndarray | None:
        """Return the bytes of the targets in `tokens`, a prefix of `validation`; None without side files."""
        found = shards.find_shards(self.folder, "val")
        looks_foreign(found[0], self.tokenizer)
        sides = [side for shard in found if (side := side_counts(shard, self.table)) is not None]
        if not sides:
            return None
        names = f"side files like {side_file(found[0].path).name}"
        if len(sides) < len(found):
            raise PgolfError(f"{self.folder} has {len(found)} validation shards but {len(sides)} {names}")
        console.logger.info("bytes of text are counted by %s", names)
        return np.concatenate(sides)[1 : len(tokens)].astype(np.int64)


def open_source(config: DataConfig, vocab_size: int) -> Source:
    """Open the configured data set, or the built-in corpus.

    Raises PgolfError for a missing folder, or a tokenizer of another size than the model.
    """
    folder = build_corpus(vocab_size=vocab_size) if config.path is None else Path(config.path)
    tokenizer = Tokenizer.load(find_tokenizer(shards.data_folder(folder), config.tokenizer))
    size = tokenizer.vocab_size
    why = f"tokenizer {tokenizer.path} has {size} pieces but model.vocab_size is {vocab_size}"
    need(size == vocab_size, f"{why}: set model.vocab_size to {size}, or give another --data.tokenizer")
    check_manifest(folder, tokenizer)
    shards.warn_of_others(folder)
    return Source(folder, tokenizer, byte_table(tokenizer), vocab_size, config.val_tokens)


def side_counts(shard: Shard, table: ByteTable) -> np.ndarray | None:
    """Return the bytes of each token by the side file, if any. Raises `PgolfError` if it does not fit."""
    path, tokens = side_file(shard.path), shard.tokens
    if not os.path.lexists(path):
        return None
    counts = open_shard(path).tokens
    own, pieces = int(counts[1:].sum(dtype=np.int64)), scored_bytes(table, tokens)
    alike = len(counts) == len(tokens) and not counts[tokens == BOS_ID].any()
    alike = alike and abs(own - pieces) <= SIDE_SHARE * pieces
    has = f"{shard.path.name} has {pieces:,} of {len(tokens):,}, and none of BOS tokens"
    hint = "use the side file that was made with it, or remove it"
    need(alike, f"{path} counts {own:,} bytes of {len(counts):,} tokens, but {has}: {hint}")
    by_piece = target_bytes(table, (head := tokens[:_SAMPLE])[:-1], head[1:])
    if np.abs(counts[1 : len(head)] - by_piece).sum() > 2 * SIDE_SHARE * by_piece.sum():
        why = f"has them, as if it were shifted: {hint}, or tables by token class are wrong"
        console.logger.warning(f"{path} counts bytes at other tokens than {shard.path.name} {why}")
    return counts


def returning(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return how many documents give the same tokens when decoded and re-encoded, and how many were tried.

    Text of this tokenizer always does; text of another one, or with unknown or unused pieces, does not.
    """
    documents, same = np.split(tokens, np.flatnonzero(tokens == BOS_ID))[1:] or [tokens], list[bool]()
    for document in documents[:: -(-len(documents) // _DOCUMENTS)]:
        ids = document[document != BOS_ID][:_LENGTH]
        middle = ids[len(ids) // 4 : -(-len(ids) * 3 // 4)]  # words at both ends may be cut
        again = np.array(tokenizer.encode(tokenizer.decode(ids.tolist())), ids.dtype)
        same += [middle.tobytes() in again.tobytes()] * (len(middle) > 0)
    return sum(same), len(same)


def looks_foreign(shard: Shard, tokenizer: Tokenizer) -> bool:
    """Return whether the start of a shard does not look like text of a tokenizer, and warn if so."""
    tokens = np.array(shard.tokens[:_SAMPLE])
    if int(tokens.max()) >= tokenizer.vocab_size:
        return True  # reading such a token is an error
    same, tried = returning(tokens, tokenizer)
    if foreign := 10 * same < 9 * tried:
        console.logger.warning(
            f"{shard.path} does not look like text of tokenizer {tokenizer.path}: {same} of {tried} "
            "documents are the same tokens when decoded and encoded again. Scores are wrong with another "
            "tokenizer than the shard's: give that one"
        )
    return foreign


@dataclass(frozen=True)
class ShardInfo:
    """Counts of a shard."""

    file: str
    split: Split
    tokens: int
    documents: int  # Documents that start in this shard, counted by BOS ids
    scored_bytes: int | None  # Bytes of this shard's targets, unless it looks like another tokenizer's text
    bytes_per_token: float | None  # scored_bytes per target


def describe(folder: Path | str, tokenizer: Tokenizer) -> list[ShardInfo]:
    """Return a row per shard, in reading order. Raises `PgolfError` for none, a bad one or unknown ids."""
    folder, rows, table = shards.data_folder(folder), [], byte_table(tokenizer)
    splits: tuple[Split, ...] = ("train", "val")
    paths = [(path, split) for split in splits for path in shard_paths(folder, split)]
    shards.warn_of_others(folder)
    hint = "make some with `pgolf data tokenize` or `pgolf data download`"
    need(paths, f"no *_train_*.bin or *_val_*.bin shard in {folder}: {hint}")
    for path, split in console.progress(paths, "reading", unit="shard"):
        shard = open_shard(path)
        shards.check_tokens(shard, tokenizer.vocab_size)
        count, side, documents = None, side_counts(shard, table), len(shard.document_starts())
        if not looks_foreign(shard, tokenizer):
            count = scored_bytes(table, shard.tokens) if side is None else int(side[1:].sum(dtype=np.int64))
        per_token = None if count is None else count / max(shard.num_tokens - 1, 1)
        rows.append(ShardInfo(path.name, split, shard.num_tokens, documents, count, per_token))
    return rows
