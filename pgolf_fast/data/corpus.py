"""A corpus without a download: prose from the installed documentation of Python, torch and numpy."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import math
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf_fast import console
from pgolf_fast.config.checks import need
from pgolf_fast.data.manifest import write_manifest
from pgolf_fast.data.shards import write_shard
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer, byte_table, scored_bytes, train_tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import locked, write_json

_FORMAT = 1
_FILES = ("corpus_train_000000.bin", "corpus_val_000000.bin", "tokenizer.model", "info.json")
_VAL_PART = 20
_MIN_PARAGRAPH = 60
_MIN_DOCUMENT = 200
_MIN_PROSE = 0.8
_SKIPPED_FOLDERS = re.compile(
    "tests?|testing|idlelib|idle_test|lib2to3|turtledemo|ensurepip|_vendor|(site|dist)-packages|__pycache__"
)


@dataclass(frozen=True)
class Source:
    """An installed package whose documentation is read."""

    name: str
    version: str
    root: Path
    topics: bool = False  # Also read the language topics of `help()`


def default_sources() -> list[Source]:
    """Return Python's standard library, and torch and numpy if installed, without importing them."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [Source("python", platform.python_version(), stdlib, topics=True)]
    for name in ("torch", "numpy"):
        try:
            spec = importlib.util.find_spec(name)
            version = importlib.metadata.version(name)
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.submodule_search_locations:
            sources.append(Source(name, version, Path(next(iter(spec.submodule_search_locations)))))
    return sources


def documents(sources: list[Source]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each help topic and each module with some prose; no paragraph is repeated."""
    seen: set[str] = set()
    for source in sources:
        if source.topics:
            for topic, text in sorted(_help_topics().items()):
                yield from _document(f"{source.name}/topics/{topic}", [text], seen)
        inside = sorted(path.relative_to(source.root).parts for path in source.root.rglob("*.py"))
        files = [parts for parts in inside if not any(map(_SKIPPED_FOLDERS.fullmatch, parts))]
        for parts in console.progress(files, f"reading {source.name} documentation", unit="file"):
            texts = _docstrings(source.root.joinpath(*parts))
            yield from _document("/".join((source.name, *parts)), texts, seen)


def build_corpus(cache_dir: Path | None = None, vocab_size: int = 1024) -> Path:
    """Return the folder of the built-in corpus: two shards, `tokenizer.model` and `info.json`.

    It is built once per set of package versions and vocabulary, in `cache_dir` or the user's cache folder,
    and moved there when it is complete, so a build may be killed. Concurrent builds wait for it. Raises
    `PgolfError` if no text is found, the folder cannot be written, or the text does not support `vocab_size`.
    """
    import platformdirs

    sources = default_sources()
    parent = Path(cache_dir) if cache_dir is not None else Path(platformdirs.user_cache_dir("pgolf_fast"))
    versions = "_".join(f"{source.name}{source.version}" for source in sources)
    pieces = importlib.metadata.version("sentencepiece")
    folder = parent / f"corpus_v{_FORMAT}_{versions}_sentencepiece{pieces}_sp{vocab_size}"
    if _is_complete(folder):
        return folder
    try:
        with locked(parent / ".corpus.lock"):
            for path in parent.glob(".corpus-*.tmp"):  # left by a killed build
                shutil.rmtree(path, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".corpus-", suffix=".tmp", dir=parent) as temporary:
                if not _is_complete(folder):  # built by another process meanwhile
                    _build(Path(temporary) / "corpus", sources, vocab_size)
                    shutil.rmtree(folder, ignore_errors=True)  # some of its files were removed
                    os.rename(Path(temporary) / "corpus", folder)
    except OSError as error:
        hint = "make that folder writable, set XDG_CACHE_HOME, or set data.path to shards of your own"
        raise PgolfError(f"cannot write the built-in corpus to {parent}: {error.strerror}; {hint}") from error
    return folder


def _build(folder: Path, sources: list[Source], vocab_size: int) -> None:
    start = time.monotonic()
    texts: dict[str, list[str]] = {"train": [], "val": []}
    for name, text in documents(sources):
        # by a hash of its name: a document keeps its split when others are added or removed
        part = int(hashlib.sha1(name.encode()).hexdigest(), 16) % _VAL_PART
        texts["train" if part else "val"].append(text)
    if not texts["train"] or not texts["val"]:
        looked = ", ".join(str(source.root) for source in sources) or "nowhere"
        found = f"{len(texts['train'])} training and {len(texts['val'])} validation documents"
        hint = "set data.path to shards, or make some with `pgolf data tokenize`"
        where = f"in the Python sources (looked in {looked})"
        raise PgolfError(f"empty corpus: found {found} {where}; {hint}")
    tokenizer = Tokenizer.load(train_tokenizer(texts["train"], vocab_size, folder / "tokenizer"))
    table = byte_table(tokenizer)
    versions = {source.name: source.version for source in sources}
    info: dict[str, object] = {"format": _FORMAT, "vocab_size": vocab_size, "sources": versions}
    tokens = {}
    for split, file in zip(("train", "val"), _FILES, strict=False):
        ids = [i for text in texts[split] for i in tokenizer.encode_document(text)]
        tokens[split] = np.array(ids, dtype=np.uint16)
        write_shard(folder / file, tokens[split])
        count_bytes = scored_bytes(table, tokens[split])
        info[split] = {"documents": len(texts[split]), "tokens": len(ids), "bytes": count_bytes}
    unigram, bigram = ngram_floors(tokens["train"], tokens["val"], table, vocab_size)
    info["unigram_bpb"], info["bigram_bpb"] = round(unigram, 4), round(bigram, 4)
    write_json(folder / "info.json", info)
    rule = f"1 of {_VAL_PART} documents, by the hash of their name"
    write_manifest(folder, tokenizer, rule, {split: info[split] for split in texts})
    took = console.duration(time.monotonic() - start)
    console.logger.info("built-in corpus: %d training tokens, built in %s", len(tokens["train"]), took)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _help_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # not in every distribution of Python
        return {}
    return {name: text for name, text in topics.items() if isinstance(text, str)}


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a module, its classes and functions, without importing it."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in third-party strings
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    return list(_walk(tree))


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    text = ast.get_docstring(node, clean=False)
    if text is not None:
        yield text
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from _call_strings(child.value)


def _call_strings(call: ast.Call) -> Iterator[str]:
    """Yield docstrings passed to a call, as torch and numpy do for functions written in C."""
    for argument in call.args:
        inner = argument.elts if isinstance(argument, ast.Tuple) else [argument]
        for value in inner:
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
                value = value.func.value  # the text of "...".format(...)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


def _document(name: str, texts: list[str], seen: set[str]) -> Iterator[tuple[str, str]]:
    fresh = dict.fromkeys(line for text in texts for line in _prose(text) if line not in seen)
    seen.update(fresh)
    joined = "\n".join(fresh)
    if len(joined) >= _MIN_DOCUMENT:
        yield name, joined


_ROLE = re.compile(r":[a-z:+-]+:`~?!?([^`<]*?)\s*(?:<[^`]*>)?`")
_RULE = re.compile(r"^\s*[-=~^*\"#+]{3,}\s*$", re.MULTILINE)


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs of `text` that are prose, each on one line; no code, tables or directives."""
    text = _RULE.sub("", inspect.cleandoc(text.encode("utf-8", "replace").decode("utf-8").replace("\0", "")))
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" in paragraph or paragraph.lstrip().startswith((".. ", "... ", "$ ", "# ")):
            continue
        line = " ".join(_ROLE.sub(r"\1", paragraph).replace("`", "").replace("**", "").split())
        plain = sum(c.isalpha() or c == " " for c in line)
        if len(line) >= _MIN_PARAGRAPH and plain >= _MIN_PROSE * len(line):
            yield line


def ngram_floors(
    train_tokens: np.ndarray, val_tokens: np.ndarray, table: ByteTable, vocab_size: int
) -> tuple[float, float]:
    """Score `val_tokens` by a unigram and an interpolated bigram model of `train_tokens`, in bits per byte.

    The unigram uses counts plus one, the bigram Witten-Bell smoothing over the unigram. Raises `PgolfError`
    for fewer than two tokens, ids outside the vocabulary, or validation tokens without any text.
    """
    for name, tokens in (("training", train_tokens), ("validation", val_tokens)):
        need(len(tokens) >= 2, f"{len(tokens)} {name} tokens are too few to count pairs of; give at least 2")
        if int(tokens.max()) >= vocab_size:
            raise PgolfError(f"{name} tokens hold id {int(tokens.max())}, but vocab_size is {vocab_size}")
    count_bytes = scored_bytes(table, val_tokens)
    need(count_bytes != 0, "the validation tokens have no text at all: give files with text in them")
    unigram = np.bincount(train_tokens, minlength=vocab_size).astype(np.float64) + 1.0
    unigram /= unigram.sum()
    previous, current = val_tokens[:-1].astype(np.int64), val_tokens[1:].astype(np.int64)
    seen = train_tokens[:-1].astype(np.int64) * vocab_size + train_tokens[1:]
    pairs, counts = np.unique(seen, return_counts=True)
    asked = previous * vocab_size + current
    at = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    pair_counts = np.where(pairs[at] == asked, counts[at], 0)
    context = np.bincount(train_tokens[:-1], minlength=vocab_size)[previous]
    kinds = np.bincount(pairs // vocab_size, minlength=vocab_size)[previous]  # distinct followers
    below = unigram[current]
    mixed = (pair_counts + kinds * below) / np.maximum(context + kinds, 1.0)
    bigram = np.where(context + kinds > 0, mixed, below)
    per_bit = 1.0 / (math.log(2.0) * count_bytes)
    return -float(np.log(below).sum()) * per_bit, -float(np.log(bigram).sum()) * per_bit
