"""Commands on token shards and tokenizers: data info, data tokenize, data download."""

import contextlib
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

from tyro.conf import Positional, arg

from pgolf_fast import console
from pgolf_fast.errors import PgolfError

_SECONDS = 2.0  # time limit of the comparison in `data info` without --overlap


@contextlib.contextmanager
def _own_options() -> Iterator[None]:
    """Name the options of these commands in errors, not those of `pgolf train`."""
    try:
        yield
    except PgolfError as error:
        raise PgolfError(str(error).replace("--data.tokenizer", "--tokenizer")) from error


@dataclass(frozen=True)
class Info:
    folder: Annotated[Path, Positional, arg(metavar="DIR")]  # Folder of shards.
    tokenizer: Path | None = None  # SentencePiece .model file; default: the one in or next to the folder.
    overlap: bool = False  # Compare all validation documents and 13-grams with all training shards.

    def main(self) -> None:
        from pgolf_fast.data.manifest import check_manifest
        from pgolf_fast.data.shards import Split, shard_paths, side_file
        from pgolf_fast.data.source import describe
        from pgolf_fast.data.tokenizer import Tokenizer, find_tokenizer
        from pgolf_fast.lab.audit.overlap import find_overlap

        splits = [split for split in get_args(Split) if shard_paths(self.folder, split)]
        if not splits:
            what = "holds no *_train_*.bin or *_val_*.bin" if self.folder.exists() else "does not exist"
            raise PgolfError(f"data folder {self.folder} {what}: make shards with `pgolf data tokenize`")
        with _own_options():
            tokenizer = Tokenizer.load(find_tokenizer(self.folder, self.tokenizer))
            manifest = check_manifest(self.folder, tokenizer)
        header = ("shard", "split", "tokens", "documents", "scored bytes", "bytes/token")
        rows = []
        for shard in describe(self.folder, tokenizer):
            counts = (console.number(n, ",") for n in (shard.tokens, shard.documents, shard.scored_bytes))
            rows.append((shard.file, shard.split, *counts, console.number(shard.bytes_per_token, ".4f")))
        print(console.Table(header, rows))
        print(f"tokenizer {tokenizer.path} ({tokenizer.vocab_size:,} pieces)")
        if sides := [path.name for row in rows if (path := side_file(self.folder / row[0])).is_file()]:
            print(f"bytes counted by {', '.join(sides)}")
        if manifest is not None:
            print(f"validation: {manifest['split']}; tokenizer and token counts are those of the manifest")
        if self.overlap or len(splits) == 2:
            seconds = math.inf if self.overlap else _SECONDS
            found = find_overlap(self.folder, ngrams=self.overlap, seconds=seconds)
            print(f"overlap: {found.text}{'' if found.complete else '; --overlap compares all'}")
            if found.copies or not found.by_chance:
                print("WARNING: validation text is in the training data, so scores on it are too optimistic")


@dataclass(frozen=True)
class Tokenize:
    # .txt (one document each); .jsonl, .jsonl.gz, .jsonl.xz (one document per line, in "text"); folders.
    files: Annotated[tuple[Path, ...], Positional, arg(metavar="FILE ...")]
    out: Path = Path("data/tokenized")  # Folder for shards and tokenizer.
    vocab_size: int = 1024  # Pieces of the tokenizer.
    tokenizer: Path | None = None  # SentencePiece .model file to use instead of training one.
    caseops: bool = False  # Encode capitals as CaseOps operators, with side files of the bytes of text.
    val_docs: int | None = None  # Use the first N documents for validation; the challenge's split has 50,000.
    val_fraction: float | None = None  # Else, the share for validation, by a hash of the text; default: 0.05.
    workers: int | None = None  # Processes; default: one per core.

    def main(self) -> None:
        from pgolf_fast.data.tokenize import tokenize_files

        with _own_options():
            counts = tokenize_files(**vars(self))
        print(console.Table(None, [(k, f"{v:,}" if isinstance(v, int) else v) for k, v in counts.items()]))
        if counts["train_shards"]:
            words = ("--data.path", str(self.out), "--model.vocab-size", str(self.vocab_size))
            print(f"train with: {shlex.join(('pgolf', 'train', 'small', *words))}")


@dataclass(frozen=True)
class Download:
    # Tokenization of the challenge's data to download.
    dataset: Annotated[str, Positional, arg(metavar="DATASET")] = "sp1024"
    out: Path = Path("data")  # Folder for datasets/ and tokenizers/.
    train_shards: int = 10  # Training shards of 100 M tokens (200 MB) each.
    repo_id: str | None = None  # Dataset on the Hub, OWNER/NAME; default: the one that has DATASET.
    endpoint: str | None = None  # Hub to download from instead of the default.

    def main(self) -> None:
        from pgolf_fast.data.download import download

        folder = download(**vars(self))
        print(f"train with: pgolf train exp101 --data.path {shlex.quote(str(folder))}")
