"""`pgolf analyze`: its arguments, its tables, its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pgolf_fast import console
from pgolf_fast.cli.arguments import existing, parse
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.presets import preset
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.models import Weights, open_models
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.registry import check_names, run_analyses, write_results


@dataclass(frozen=True)
class _Data:
    path: Path | None = Options.data
    """Folder of validation shards; default: that of the first model's run."""
    tokenizer: Path | None = Options.tokenizer
    """Tokenizer of those shards; default: the one that belongs to them."""


@dataclass(frozen=True)
class _Analyze:
    models: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders, checkpoints (.safetensors), artifacts (.pgolf), community .pt files."""
    only: tuple[str, ...] = ()
    """Analyses to run, say deltas quant; default: all that these models and their data allow."""
    out: Path = Path("runs/analysis")
    """Folder for analysis.json, the pictures and report.html."""
    weights: Weights = "auto"
    """Which of a run folder: auto takes the float weights if they are there."""
    preset: str | None = None
    """The network of files that do not say, as .pt files do not."""
    data: _Data = field(default_factory=_Data)
    tokens: int = Options.tokens
    """Validation targets that losses are taken over."""
    hash_rows: tuple[int, ...] = Options.hash_rows
    """Rows of further hash tables whose buckets are counted, say 3072 4096 10240."""
    calibration_tokens: int = Options.calibration_tokens
    """Of these, inputs that rounding errors are weighted by."""
    points: int = Options.points
    """Places on the line between two models where the loss is measured."""
    curvature_tokens: int = Options.curvature_tokens
    """Validation targets whose loss is the error surface."""
    probes: int = Options.probes
    """Random vectors of the Hessian's trace."""
    lanczos_steps: int = Options.lanczos_steps
    """Hessian-vector products of its extreme eigenvalues."""
    seed: int = Options.seed
    """Seed of all random vectors."""


def analyze(argv: list[str]) -> int:
    """pgolf analyze A [B ...] [--only deltas quant ...] [--out DIR] [--data.path DIR] [--tokens N]"""
    a = parse("analyze", _Analyze, argv, _Analyze())
    if not a.models:
        raise PgolfError("give at least one model: a run folder, a checkpoint, an artifact or a .pt file")
    check_names(a.only)
    if a.out.exists() and not a.out.is_dir():
        raise PgolfError(f"--out {a.out} is a file; give a folder")
    console.setup_logging()
    config = None if a.preset is None else preset(a.preset)
    options = Options(
        data=None if a.data.path is None else existing(a.data.path, "data folder"),
        tokenizer=a.data.tokenizer,
        tokens=a.tokens,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        hash_rows=a.hash_rows,
        calibration_tokens=a.calibration_tokens,
        points=a.points,
        curvature_tokens=a.curvature_tokens,
        probes=a.probes,
        lanczos_steps=a.lanczos_steps,
        seed=a.seed,
    )
    models = open_models(a.models, a.weights, config)
    results = run_analyses(a.only, models, options, lambda summary: print_out(f"{summary.text()}\n"))
    if results.skipped:
        reasons = (f"  {name}: {why}" for name, why in results.skipped.items())
        print_out("\n".join(["skipped:", *reasons]) + "\n")
    print_out(results.time_table().text())
    write_results(a.out, results)
    print_out(f"wrote {a.out / 'analysis.json'} and {a.out / 'report.html'}")
    return 0
