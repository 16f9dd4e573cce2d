"""`pgolf data info | tokenize | download`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast import console
from pgolf_fast.cli.output import print_out


@dataclass(frozen=True)
class Info:
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of shards."""
    tokenizer: Path | None = None
    """SentencePiece .model file; default: the one in or next to the folder."""


def info(options: Info) -> int:
    from pgolf_fast.data.shards import data_folder
    from pgolf_fast.data.source import describe
    from pgolf_fast.data.tokenizer import Tokenizer, find_tokenizer

    data_folder(options.folder)
    tokenizer = Tokenizer.load(find_tokenizer(options.folder, options.tokenizer))
    rows = [
        (
            shard.file,
            shard.split,
            f"{shard.tokens:,}",
            f"{shard.documents:,}",
            f"{shard.scored_bytes:,}",
            f"{shard.bytes_per_token:.4f}",
        )
        for shard in describe(options.folder, tokenizer)
    ]
    print_out(console.table(rows, ("shard", "split", "tokens", "documents", "scored bytes", "bytes/token")))
    print_out(f"tokenizer {tokenizer.path} ({tokenizer.vocab_size} pieces)")
    return 0


@dataclass(frozen=True)
class Tokenize:
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")]
    """.txt (one document each); .jsonl, .jsonl.gz, .jsonl.xz (one document per line, in "text"); folders."""
    out: Path = Path("data/tokenized")
    """Folder for shards and tokenizer."""
    vocab_size: int = 1024
    """Pieces of the tokenizer."""
    tokenizer: Path | None = None
    """SentencePiece .model file to use instead of training one."""
    val_fraction: float = 0.05
    """Share of documents held out for validation, chosen by a hash of their text."""
    workers: int | None = None
    """Processes; default: one per core."""


def tokenize(options: Tokenize) -> int:
    from pgolf_fast.data.tokenize import tokenize_files

    console.setup_logging()
    summary = tokenize_files(**vars(options))
    print_out(console.table([(name, str(value)) for name, value in summary.items()]))
    print_out(
        f"train with: pgolf train small --data.path {options.out} --model.vocab-size {options.vocab_size}"
    )
    return 0


@dataclass(frozen=True)
class Download:
    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")] = "sp1024"
    """Tokenization of the challenge's data to download."""
    out: Path = Path("data")
    """Folder for datasets/ and tokenizers/."""
    train_shards: int = 10
    """Training shards of 100 M tokens (200 MB) each."""
    endpoint: str | None = None
    """Hub to download from instead of the default."""


def download(options: Download) -> int:
    from pgolf_fast.data.download import download as fetch

    console.setup_logging()
    folder = fetch(
        options.out,
        dataset=options.dataset,
        train_shards=options.train_shards,
        endpoint=options.endpoint,
    )
    print_out(f"train with: pgolf train exp101 --data.path {folder}")
    return 0
