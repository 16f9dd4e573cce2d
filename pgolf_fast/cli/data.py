"""Commands on token shards and tokenizers: data info, data tokenize, data download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast import console


@dataclass(frozen=True)
class Info:
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # Folder of shards.
    tokenizer: Path | None = None  # SentencePiece .model file; default: the one in or next to the folder.

    def main(self) -> None:
        from pgolf_fast.data.shards import data_folder, side_file
        from pgolf_fast.data.source import describe
        from pgolf_fast.data.tokenizer import Tokenizer, find_tokenizer

        data_folder(self.folder)
        tokenizer = Tokenizer.load(find_tokenizer(self.folder, self.tokenizer))
        header = ("shard", "split", "tokens", "documents", "scored bytes", "bytes/token")
        rows = []
        for shard in describe(self.folder, tokenizer):
            counts = (console.number(n, ",") for n in (shard.tokens, shard.documents, shard.scored_bytes))
            rows.append((shard.file, shard.split, *counts, console.number(shard.bytes_per_token, ".4f")))
        print(console.Table(header, rows))
        print(f"tokenizer {tokenizer.path} ({tokenizer.vocab_size} pieces)")
        if sides := [path.name for row in rows if (path := side_file(self.folder / row[0])).is_file()]:
            print(f"bytes counted by {', '.join(sides)}")


@dataclass(frozen=True)
class Tokenize:
    # .txt (one document each); .jsonl, .jsonl.gz, .jsonl.xz (one document per line, in "text"); folders.
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")]
    out: Path = Path("data/tokenized")  # Folder for shards and tokenizer.
    vocab_size: int = 1024  # Pieces of the tokenizer.
    tokenizer: Path | None = None  # SentencePiece .model file to use instead of training one.
    val_fraction: float = 0.05  # Share of documents held out for validation, chosen by a hash of their text.
    workers: int | None = None  # Processes; default: one per core.

    def main(self) -> None:
        from pgolf_fast.data.tokenize import tokenize_files

        console.setup_logging()
        print(console.Table(None, tokenize_files(**vars(self)).items()))
        print(f"train with: pgolf train small --data.path {self.out} --model.vocab-size {self.vocab_size}")


@dataclass(frozen=True)
class Download:
    # Tokenization of the challenge's data to download.
    dataset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")] = "sp1024"
    out: Path = Path("data")  # Folder for datasets/ and tokenizers/.
    train_shards: int = 10  # Training shards of 100 M tokens (200 MB) each.
    endpoint: str | None = None  # Hub to download from instead of the default.

    def main(self) -> None:
        from pgolf_fast.data.download import download

        console.setup_logging()
        folder = download(**vars(self))
        print(f"train with: pgolf train exp101 --data.path {folder}")
