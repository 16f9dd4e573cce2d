"""SentencePiece tokenizers, and the bytes of text of each token."""

import functools
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pgolf_fast.config.checks import need
from pgolf_fast.data import caseops
from pgolf_fast.data.caseops import OPERATORS
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_bytes

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"
_PLAIN = str.maketrans(SPACE, " ", OPERATORS)
_SENTENCES = (
    "The quick brown Fox can't jump over 13 lazy dogs; it costs $4,096 (or 50 %)!",
    "two  spaces,   three,\ta tab\na new line\r\n\n    and an indented one",
    " na\u00efve \u00dcn\u00efc\u00f6d\u00e9 \u00df \u0416 \u03bb \ua66e \u00bd \ufb01x ",
    "\U0001f642 \u65e5\u672c\u8a9e\u3002 \ud55c\uad6d\uc5b4 \U0001f680\U0001f680",
    'ALL CAPS, MiXeD iPhone; https://example.org/a?b=c&d={e}|~^\\_`#@*+<>[]"',
)
_BLOCK = 1 << 22  # tokens at a time: counting makes int64 arrays of them
_SENTENCE_CHARS = 2000
_TRAINING_CHARS = 256_000_000  # more would not change the vocabulary, and is held in memory


class Tokenizer:
    """A SentencePiece model, loaded by `Tokenizer.load`."""

    def __init__(self, processor: "SentencePieceProcessor", path: Path):
        self._processor = processor
        self.path = path
        ids = [int(processor.piece_to_id(operator)) for operator in OPERATORS]
        self._operators = [] if processor.unk_id() in ids else ids

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Load a .model file. Raises `PgolfError` if it is missing, of another format, or loses text."""
        from sentencepiece import SentencePieceProcessor

        path = Path(path)
        why = f"tokenizer {path} does not exist: give a SentencePiece .model file with --data.tokenizer"
        need(path.is_file(), why)
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError, TypeError) as error:
            # the reason, if any, follows the location in SentencePiece's source
            reason = re.sub(r"^[A-Z]+: |\S+\(\d+\) \[.*\] *", "", str(error)) or "it cannot be parsed"
            why = f"{path} is not a SentencePiece model ({reason}): give a .model file with --data.tokenizer"
            raise PgolfError(why) from error
        tokenizer = cls(processor, path)
        if fault := counting_fault(tokenizer, byte_table(tokenizer)):
            raise PgolfError(f"tokenizer {path} cannot be used: {fault}")
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return len(self._processor)

    @property
    def bos_id(self) -> int:
        """The id that starts a document; -1 if the model has none."""
        return int(self._processor.bos_id())

    @property
    def has_caseops(self) -> bool:
        """Whether all operators of CaseOps are pieces, so that documents are encoded with it."""
        return bool(self._operators)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text` as it is, without BOS. Lone surrogates are read as '?'."""
        return list(self._processor.encode(_valid(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control tokens have none. Raises `PgolfError` for an unknown id."""
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        why = f"token id {wrong} does not exist: tokenizer {self.path} has {self.vocab_size} pieces"
        need(wrong is None, why)
        return str(self._processor.decode([int(i) for i in ids]))

    def encode_document(self, text: str) -> list[int]:
        """Return BOS and the tokens of `text`, with CaseOps if the model has its operators.

        Raises `PgolfError` if the model has no BOS.
        """
        why = f"tokenizer {self.path} has no BOS piece, which starts each document: use one that has"
        need(self.bos_id >= 0, why)
        return [self.bos_id, *self.encode(caseops.encode(text) if self.has_caseops else text)]

    def decode_document(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without CaseOps; operators that fit no text, as in a sample, are lost."""
        text = self.decode(ids)
        return caseops.decode(text, strict=False) if self.has_caseops else text

    def encode_with_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (n,) of `text` as it is, and the [begin, end) of its UTF-8 that each covers, (n, 2).

        That is the text before normalization: the last of several tokens that one character made covers it,
        and white space that is removed belongs to the next token, or at either end to none.
        """
        try:
            found = self._processor.encode(_valid(text), return_type="offset_mapping", return_bytes=True)
        except TypeError as error:
            why = "counting the bytes of each token needs sentencepiece 0.2.3: pip install -U sentencepiece"
            raise PgolfError(why) from error
        return np.array(found["ids"], np.int64), np.array(found["offsets"], np.int64).reshape(-1, 2)

    def encode_document_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `encode_document` and the bytes of `text` that each token covers, int64 of shape (n,).

        BOS and the operators of CaseOps have none, but an operator that is part of the text has 3 (PR 1729).
        """
        ids, spans = self.encode_with_spans(caseops.encode(text) if self.has_caseops else text)
        counts, escaped = spans[:, 1] - spans[:, 0], False
        for at in np.flatnonzero(np.isin(ids, self._operators)):
            counts[at] -= 0 if escaped else len(OPERATORS[0].encode())
            escaped = not escaped and ids[at] == self._operators[-1]
        return np.append(self.bos_id, ids), np.append(0, counts)

    def piece(self, token: int) -> str:
        """Return the piece as the model writes it; a leading U+2581 is a space."""
        return str(self._processor.id_to_piece(token))

    def is_silent(self, token: int) -> bool:
        """Return True for control, unknown and unused pieces, which have no text."""
        sp = self._processor
        return bool(sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token))

    def is_byte(self, token: int) -> bool:
        return bool(self._processor.is_byte(token))


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class ByteTable:
    """The bytes of text of each token id, for bits per byte."""

    base_bytes: np.ndarray  # int16 (V,): UTF-8 bytes of the piece without its leading space
    has_leading_space: np.ndarray
    """bool (V,): the piece starts with a space, which is one more byte unless it follows a boundary."""
    is_boundary: np.ndarray  # bool (V,): control, unknown and unused ids


@functools.lru_cache(maxsize=4)
def byte_table(tokenizer: Tokenizer) -> ByteTable:
    """Return the byte counts of every id of `tokenizer`; made once per tokenizer."""
    size = tokenizer.vocab_size
    table = ByteTable(np.zeros(size, np.int16), np.zeros(size, np.bool_), np.zeros(size, np.bool_))
    for token in range(size):
        if tokenizer.is_silent(token):
            table.is_boundary[token] = True
        elif tokenizer.is_byte(token):
            table.base_bytes[token] = 1  # byte fallback: one raw byte
        elif (piece := tokenizer.piece(token)) not in OPERATORS:
            table.has_leading_space[token] = piece.startswith(SPACE)
            table.base_bytes[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode("utf-8"))
    return table


def plain_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the original text of `ids`, with a space where the bytes of U+2581 encode one."""
    return tokenizer.decode(ids).translate(_PLAIN)


def counting_fault(tokenizer: Tokenizer, table: ByteTable) -> str | None:
    """Return what is wrong with the bytes that `table` counts for known text, or None.

    Text may be normalized (whitespace, NFKC, case), but no character may be lost, and the count must be its
    length in UTF-8. A leading space need not be counted.
    """
    for text in _SENTENCES:
        ids = tokenizer.encode(text)
        back = plain_text(tokenizer, ids)
        if _folded(back) != _folded(text):
            return f"it loses characters ({text!r} comes back as {back!r}): train one with byte_fallback"
        back = back if text.endswith(" ") else back.rstrip(" ")
        counted = scored_bytes(table, np.array([np.argmax(table.is_boundary), *ids]))
        if counted not in {size := len(back.encode()), size - back.startswith(" ")}:
            why = " (no piece is a space, U+2581)" * (SPACE in tokenizer.decode(ids))
            return f"{counted} bytes are counted for the {size} of {text!r}{why}: use another tokenizer"
    return None


def _folded(text: str) -> list[str]:  # to what normalization preserves
    return unicodedata.normalize("NFKC", text.casefold()).split()


def target_bytes(table: ByteTable, prev_ids: np.ndarray, target_ids: np.ndarray) -> np.ndarray:
    """Return the bytes of each target given the token before it, int64 of the shape of `target_ids`."""
    prev_ids, target_ids = np.asarray(prev_ids), np.asarray(target_ids)
    size = len(table.base_bytes)
    for ids in (prev_ids, target_ids):
        hint = f"but the tokenizer has {size} pieces: use the tokenizer the shards were made with"
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise PgolfError(f"token ids run from {int(ids.min())} to {int(ids.max())}, {hint}")
    space = table.has_leading_space[target_ids] & ~table.is_boundary[prev_ids]
    return table.base_bytes[target_ids].astype(np.int64) + space


def scored_bytes(table: ByteTable, tokens: np.ndarray) -> int:
    """Return the bytes of the targets tokens[1:], the denominator of bits per byte."""
    total = 0
    for start in range(0, max(len(tokens) - 1, 0), _BLOCK):
        block = np.asarray(tokens[start : start + _BLOCK + 1])
        total += int(target_bytes(table, block[:-1], block[1:]).sum())
    return total


def find_tokenizer(folder: Path | str, explicit: Path | str | None = None) -> Path:
    """Return the .model file for the shards in `folder`: `explicit`, or the one in or next to the folder.

    Searches the folder, its parent, and `tokenizers` in the parent and grandparent. Among several, the one
    with the number in the folder's name (`..._sp1024`) is taken. Raises `PgolfError` unless there is one.
    """
    if explicit is not None:
        return Path(explicit)
    folder = Path(folder).absolute()
    places = [folder, folder.parent, folder.parent / "tokenizers", folder.parent.parent / "tokenizers"]
    for place in places:
        models = sorted(place.glob("[!.]*.model")) if place.is_dir() else []
        if models:
            return models[0] if len(models) == 1 else _pick(models, folder)
    hint = "looked there, in its parent and in 'tokenizers' next to them: name one with --data.tokenizer"
    raise PgolfError(f"no tokenizer (*.model) for {folder}; {hint}")


def _pick(models: list[Path], folder: Path) -> Path:
    number = re.search(r"sp(\d+)(\w*)", folder.name) or re.search(r"(\d+)()$", folder.name)
    if number:
        matching = [path for path in models if number[1] in re.findall(r"\d+", path.stem)]
        same = [path for path in matching if path.stem.endswith(number[2] or "bpe")]
        for fitting in (matching, same):
            if len(fitting) == 1:
                return fitting[0]
    names = ", ".join(path.name for path in models)
    why = f"several tokenizers fit {folder}: {names} in {models[0].parent}; name one with --data.tokenizer"
    raise PgolfError(why)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, prefix_path: Path | str, with_caseops: bool = False
) -> Path:
    """Train a BPE like the challenge's on `texts`; write and return `<prefix_path>.model`.

    `with_caseops` trains on text encoded by CaseOps and reserves ids 4 to 7 for its operators. The same texts
    give the same bytes. Raises `PgolfError` if there is no text, or too little (or too many
    different characters) for `vocab_size`.
    """
    import sentencepiece

    path = Path(f"{prefix_path}.model")
    reserved: dict[str, Any] = {"user_defined_symbols": list(OPERATORS)} if with_caseops else {}
    encoded = map(caseops.encode, texts) if with_caseops else texts
    sentences = list(_sentences(encoded))  # not lazily: SentencePiece would hide an error of the iterator
    need(sentences, f"cannot train tokenizer {path}: the text is empty; give files with text in them")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            character_coverage=0.999,
            max_sentence_length=16 * _SENTENCE_CHARS,
            num_threads=4,  # a fixed number: it is written into the model
            minloglevel=2,
            **reserved,
        )
    except (RuntimeError, OSError) as error:
        raise _training_error(str(error), vocab_size) from error
    write_bytes(path, model.getvalue())
    return path


def _training_error(message: str, vocab_size: int) -> PgolfError:
    if most := re.search(r"value <= (\d+)", message):
        hint = f"it supports at most {most.group(1)} pieces; use a smaller vocab_size or more text"
        return PgolfError(f"vocab_size {vocab_size} is too large for this text: {hint}")
    if least := re.search(r"smaller than required_chars\D*\d+ vs (\d+)", message):
        what = "256 byte pieces, 4 control pieces and the characters of this text"
        hint = f"{what} need at least {least.group(1)}; use a larger vocab_size"
        return PgolfError(f"vocab_size {vocab_size} is too small: {hint}")
    why = f"SentencePiece could not train {vocab_size} pieces on this text: {' '.join(message.split())}"
    return PgolfError(why)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Split `texts` at spaces into pieces that are short enough for SentencePiece not to skip."""
    total = 0
    for text in texts:
        words = " ".join(_valid(text).replace("\0", " ").split())
        start = 0
        while start < len(words):
            end = start + _SENTENCE_CHARS
            if end < len(words):
                end = words.rfind(" ", start, end) + 1 or end
            yield words[start:end].rstrip()
            total += end - start
            start = end
        if total >= _TRAINING_CHARS:
            return
