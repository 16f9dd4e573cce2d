"""Commands that turn a run into a submission: quantize, pack, submit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pgolf_fast import console
from pgolf_fast.cli.options import Fields, Run, Words, run_folder
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.schema import Codec

_ADVANCED = ("quant.percentiles", "quant.block_size", "quant.damping", "quant.small_tensor")


@dataclass(frozen=True)
class Quantize:
    run: Run
    """Run folder."""
    fields: Annotated[Words, Fields(("quant",), brief=_ADVANCED)]
    grid: Literal["reference", "percentile", "rd"] | None = None
    """Short for --quant.grid."""
    target_bytes: int | None = None
    """Short for --quant.target-bytes."""


def quantize(options: Quantize) -> int:
    from pgolf_fast.artifact.pack import quantize_run

    short = {"grid": options.grid, "target_bytes": options.target_bytes}
    words = [f"quant.{name}={value}" for name, value in short.items() if value is not None]
    folder, config = run_folder(options.run, (*options.fields, *words))
    console.setup_logging(folder.log_file)
    print_out(str(quantize_run(folder, config.quant)))
    print_out(f"wrote {folder.quantized_file}")
    return 0


@dataclass(frozen=True)
class Pack:
    run: Run
    """Run folder, quantized."""
    fields: Annotated[Words, Fields(("pack",))]
    table: bool = False
    """Also print bytes by section and tensor, entropy bounds, and the artifact's size under every codec."""
    measure: tuple[Codec, ...] = get_args(Codec)
    """Codecs that --table measures, if installed; at full size lzma, zstd and brotli take a minute each."""
    json: Path | None = None
    """File for the table as JSON."""
    treemap: Path | None = None
    """PNG file for a treemap of the bytes."""


def pack(options: Pack) -> int:
    from pgolf_fast.artifact.pack import pack_run

    folder, config = run_folder(options.run, options.fields)
    console.setup_logging(folder.log_file)
    packed = pack_run(folder, config.pack)
    print_out(packed.table().text())
    print_out(f"wrote {packed.path}")
    if options.table or options.json or options.treemap:
        _print_bytes(packed.path, options)
    return 0


def _print_bytes(path: Path, options: Pack) -> None:
    from pgolf_fast.io import write_text
    from pgolf_fast.lab.analysis.artifact_bytes import artifact_table
    from pgolf_fast.lab.report.treemap import plot_treemap

    table = artifact_table(path, options.measure if options.table or options.json else ())
    if options.table:
        print_out("\n" + table.text())
    if options.json is not None:
        write_text(options.json, json.dumps(table.to_dict(), indent=1) + "\n")
        print_out(f"wrote {options.json}")
    if options.treemap is not None:
        plot_treemap(table, options.treemap)
        print_out(f"wrote {options.treemap}")


@dataclass(frozen=True)
class Submit:
    run: Run
    """Run folder, packed and scored."""
    out: Path | None = None
    """Folder to write; default: RUN/submission."""
    author: str = "your name"
    """Author of the submission."""
    github_id: str = "your-github-id"
    """GitHub handle of the author."""
    name: str | None = None
    """Title; default: the preset's name."""
    blurb: str | None = None
    """One or two sentences about it; default: made from the configuration."""
    track: str = "non_record_16mb"
    """Track to submit to."""
    readable: bool = False
    """Write the script's readable source instead of the compressed one, and count its bytes."""


def submit(options: Submit) -> int:
    from pgolf_fast.artifact.submission import About, write_submission

    folder, _ = run_folder(options.run)
    out = options.out or folder.path / "submission"
    about = About(options.author, options.github_id, options.name, options.blurb, options.track)
    written = write_submission(folder, out, about, readable=options.readable)
    print_out(console.table([(what, f"{size:,}") for what, size in written.items()], ("part", "bytes")))
    print_out(f"wrote {out}")
    return 0
