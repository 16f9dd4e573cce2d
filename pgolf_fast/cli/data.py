"""`pgolf data info | tokenize | download`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast import console
from pgolf_fast.cli.arguments import parse
from pgolf_fast.cli.output import print_out


@dataclass(frozen=True)
class _Info:
    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of shards."""
    tokenizer: Path | None = None
    """SentencePiece .model; default: the one in or beside the folder."""


def info(argv: list[str]) -> int:
    """pgolf data info DIR [--tokenizer MODEL]"""
    from pgolf_fast.data.info import describe
    from pgolf_fast.data.shards import data_folder
    from pgolf_fast.data.tokenizer import Tokenizer, find_tokenizer

    arguments = parse("data info", _Info, argv)
    data_folder(arguments.folder)
    tokenizer = Tokenizer.load(find_tokenizer(arguments.folder, arguments.tokenizer))
    rows = [
        (
            s.file,
            s.split,
            f"{s.tokens:,}",
            f"{s.documents:,}",
            f"{s.scored_bytes:,}",
            f"{s.bytes_per_token:.4f}",
        )
        for s in describe(arguments.folder, tokenizer)
    ]
    header = ("shard", "split", "tokens", "documents", "scored bytes", "bytes/token")
    print_out(console.table(rows, header))
    print_out(f"tokenizer {tokenizer.path} ({tokenizer.vocab_size} pieces)")
    return 0


@dataclass(frozen=True)
class _Tokenize:
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """.txt (a document each); .jsonl, .jsonl.gz, .jsonl.xz (a document in each line's "text"); or folders."""
    out: Path = Path("data/tokenized")
    """Folder for shards and tokenizer."""
    vocab_size: int = 1024
    """Pieces of the tokenizer."""
    tokenizer: Path | None = None
    """Use this SentencePiece .model instead of training one."""
    val_fraction: float = 0.05
    """Share of documents held out for validation, chosen by hash of their text."""
    workers: int | None = None
    """Processes; default: one a core."""


def tokenize(argv: list[str]) -> int:
    """pgolf data tokenize FILES... --vocab-size N [--out DIR]"""
    from pgolf_fast.data.tokenize import tokenize_files

    arguments = parse("data tokenize", _Tokenize, argv)
    console.setup_logging()
    summary = tokenize_files(
        arguments.files,
        out=arguments.out,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        val_fraction=arguments.val_fraction,
        workers=arguments.workers,
    )
    print_out(console.table([(name, str(value)) for name, value in summary.items()]))
    print_out(
        f"train with: pgolf train small --data.path {arguments.out} --model.vocab-size {arguments.vocab_size}"
    )
    return 0


@dataclass(frozen=True)
class _Download:
    dataset: Annotated[str, tyro.conf.Positional] = "sp1024"
    """Which tokenisation of the challenge's data."""
    out: Path = Path("data")
    """Folder for datasets/ and tokenizers/."""
    train_shards: int = 10
    """Training shards of 100 M tokens (200 MB) each."""
    endpoint: str | None = None
    """Another hub than the default."""


def download(argv: list[str]) -> int:
    """pgolf data download sp1024 [--train-shards N] [--out DIR]"""
    from pgolf_fast.data.download import download as fetch

    arguments = parse("data download", _Download, argv)
    console.setup_logging()
    folder = fetch(
        arguments.out,
        dataset=arguments.dataset,
        train_shards=arguments.train_shards,
        endpoint=arguments.endpoint,
    )
    print_out(f"train with: pgolf train exp101 --data.path {folder}")
    return 0
