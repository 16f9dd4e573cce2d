"""The data of a run: shards, validation stream, tokenizer and byte table, checked against each other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast import console
from pgolf_fast.config.schema import DataConfig
from pgolf_fast.data.corpus import build_corpus
from pgolf_fast.data.shards import (
    BOS_ID,
    Shard,
    Split,
    check_tokens,
    data_folder,
    find_shards,
    first_tokens,
    load_validation,
    open_shard,
    shard_paths,
    side_files,
    unread_files,
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

_SAMPLE = 1 << 16  # tokens at the beginning of a shard that are compared with its tokenizer
_DOCUMENTS, _LENGTH = 64, 128  # of them at most, and tokens of each
SIDE_SHARE = 0.05  # by which side files may differ from the pieces: they count text before normalization


@dataclass(frozen=True)
class Source:
    """An opened data set."""

    folder: Path
    tokenizer: Tokenizer
    table: ByteTable
    vocab_size: int
    val_tokens: int | None

    def train_shards(self) -> list[Shard]:
        shards = find_shards(self.folder, "train")
        looks_foreign(shards[0], self.tokenizer)
        return shards

    def validation(self, seq_len: int) -> np.ndarray:
        """Return the validation stream, a whole number of `seq_len` targets plus one token."""
        return load_validation(self.folder, seq_len, vocab_size=self.vocab_size, max_tokens=self.val_tokens)

    def side_bytes(self, tokens: np.ndarray) -> np.ndarray | None:
        """Return the bytes of the targets tokens[1:] by the side files of the shards, or None without any.

        tokens: the beginning of `validation`. Raises `PgolfError` for side files that do not fit.
        """
        shards = find_shards(self.folder, "val")
        looks_foreign(shards[0], self.tokenizer)
        sides = side_files(shards)
        if not sides:
            return None
        counts = first_tokens(sides, len(tokens))
        check_side(counts, tokens, self.table, sides[0].path)
        console.logger.info("bytes of text are those of %s", ", ".join(side.path.name for side in sides))
        return counts[1:].astype(np.int64)


def open_source(config: DataConfig, vocab_size: int) -> Source:
    """Open the data set that a configuration names, or the built-in corpus if it names none.

    Raises PgolfError for a missing folder or a tokenizer of another size than the model.
    """
    folder = build_corpus(vocab_size=vocab_size) if config.path is None else data_folder(Path(config.path))
    tokenizer = Tokenizer.load(find_tokenizer(folder, config.tokenizer))
    check_vocab(tokenizer, vocab_size)
    if unread := unread_files(folder):
        console.logger.warning("%s: %s", folder, unread)
    return Source(folder, tokenizer, byte_table(tokenizer), vocab_size, config.val_tokens)


def check_side(counts: np.ndarray, tokens: np.ndarray, table: ByteTable, path: Path) -> int:
    """Return the bytes of the targets tokens[1:] by the counts (len(tokens),) in side file `path`.

    Raises `PgolfError` if BOS tokens have bytes, or the sum is far from that of the pieces.
    """
    if wrong := int(np.count_nonzero(counts[tokens == BOS_ID])):
        raise PgolfError(
            f"{path} counts bytes for {wrong:,} BOS tokens, which have none: use the side file that was made "
            "with the shard, or remove it"
        )
    own, pieces = int(counts[1:].sum(dtype=np.int64)), scored_bytes(table, tokens)
    if abs(own - pieces) > SIDE_SHARE * pieces:
        raise PgolfError(
            f"{path} counts {own:,} bytes of text, but the pieces of these {len(tokens):,} tokens have "
            f"{pieces:,}: use the side file that was made with the shard, or remove it"
        )
    return own


def returning(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return how many documents are the same tokens when decoded and encoded again, and how many were tried.

    Text of this tokenizer always is; that of another one is not. Control pieces are left out.
    """
    starts = np.flatnonzero(tokens == BOS_ID)
    documents = np.split(tokens, starts)[1:] if len(starts) else [tokens]
    silent = byte_table(tokenizer).is_boundary
    same = tried = 0
    for index in np.unique(np.linspace(0, len(documents) - 1, _DOCUMENTS).astype(int)):
        document = documents[index]
        ids = document[~silent[document]][:_LENGTH].tolist()
        if len(ids) > 1:
            whole = len(ids) * 3 // 4  # the last word may be cut
            tried, same = tried + 1, same + (tokenizer.encode(tokenizer.decode(ids))[:whole] == ids[:whole])
    return same, tried


def looks_foreign(shard: Shard, tokenizer: Tokenizer) -> bool:
    """Return whether the beginning of a shard is hardly text of a tokenizer; warn then, and of odd pieces."""
    tokens = np.array(shard.tokens[:_SAMPLE])
    if int(tokens.max()) >= tokenizer.vocab_size:
        return True  # an error wherever such a token is read
    same, tried = returning(tokens, tokenizer)
    odd = byte_table(tokenizer).is_boundary[tokens] & (tokens != BOS_ID) & (tokens != tokenizer.eos_id)
    if (foreign := 2 * same < tried) or odd.any():
        console.logger.warning(
            "%s does not look like text of tokenizer %s: %d of %d documents are the same tokens when decoded "
            "and encoded again, and %d of %d tokens are padding, unknown or unused pieces. Bytes of text and "
            "scores are wrong with another tokenizer than the shard's: name it with --data.tokenizer",
            *(shard.path, tokenizer.path, same, tried, odd.sum(), len(tokens)),
        )
    return foreign


@dataclass(frozen=True)
class ShardInfo:
    """Counts of a shard."""

    file: str
    split: Split
    tokens: int
    documents: int  # Documents that start in this shard, counted by BOS ids
    scored_bytes: int | None
    """Bytes of this shard's targets, the denominator of bits per byte; None for text of another tokenizer."""
    bytes_per_token: float | None  # scored_bytes per target
    side_file: str | None  # File that counts them; else they are those of the pieces


def describe(folder: Path | str, tokenizer: Tokenizer) -> list[ShardInfo]:
    """Return one row per training and validation shard of `folder`, in reading order.

    Raises `PgolfError` if there is no shard, or one is bad or has ids that the tokenizer does not know.
    """
    folder, rows, table = data_folder(folder), [], byte_table(tokenizer)
    splits: tuple[Split, ...] = ("train", "val")
    unread = unread_files(folder)
    if not any(shard_paths(folder, split) for split in splits):
        raise PgolfError(
            f"no *_train_*.bin or *_val_*.bin shard in {folder}: make some with `pgolf data tokenize` "
            "or `pgolf data download`" + (unread and f" ({unread})")
        )
    if unread:
        console.logger.warning("%s: %s", folder, unread)
    shards = [(open_shard(path), split) for split in splits for path in shard_paths(folder, split)]
    for shard, split in console.progress(shards, "reading", unit="shard"):
        check_tokens(shard, tokenizer.vocab_size)
        count, side_file, documents = None, None, len(shard.document_starts())
        if not looks_foreign(shard, tokenizer):
            count = scored_bytes(table, shard.tokens)
            for side in side_files([shard]):
                side_file = side.path.name
                count = check_side(side.tokens, shard.tokens, table, side.path)
        per_token = None if count is None else count / max(shard.num_tokens - 1, 1)
        row = shard.path.name, split, shard.num_tokens, documents, count, per_token, side_file
        rows.append(ShardInfo(*row))
    return rows
