"""Commands that study finished runs: audit, report, analyze."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgolf_fast import console
from pgolf_fast.cli.evaluate import TTT_FIELDS
from pgolf_fast.cli.options import DataFolder, Fields, Run, TokenizerFile, Words, existing, run_folder
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.fields import flip
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import PackConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.summary import Options as AnalysisOptions

Models = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...", help_behavior_hint="")
]


@dataclass(frozen=True)
class Audit:
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_ARTIFACT")]
    """Run folder, or artifact file."""
    fields: Annotated[Words, Fields(("eval", "ttt"), brief=("eval.*", *TTT_FIELDS))]
    tokens: int | None = None
    """Targets to score, from the start of the validation data; default: eight windows."""
    only: tuple[str, ...] = ()
    """Run only these checks, for example C2 C5."""
    limit_bytes: int = PackConfig.limit_bytes
    """Limit for the bytes of artifact and script together."""
    train_limit: float | None = None
    """Limit for the training time, in seconds."""
    eval_limit: float | None = None
    """Limit for the evaluation time, in seconds."""
    data: DataFolder = None
    """Folder of validation shards; default: the run's."""
    tokenizer: TokenizerFile = None
    """Tokenizer of those shards; default: the one that belongs to them."""
    json: Path | None = None
    """File for the findings; default: audit.json in the run folder, if all checks run."""


def audit(options: Audit) -> int:
    from pgolf_fast.artifact.container import sizes
    from pgolf_fast.io import write_text
    from pgolf_fast.lab.audit.check import broken, findings_table, run_checks
    from pgolf_fast.lab.audit.rules import checks
    from pgolf_fast.lab.audit.target import open_target, settings

    path = existing(options.run, "run or artifact")
    config = flip(settings(path), options.fields)
    if options.tokens is not None and options.tokens < config.eval_seq_len:
        raise PgolfError(
            f"--tokens is {options.tokens}; it must be at least one window of {config.eval_seq_len}"
        )
    target = open_target(
        path,
        tokens=options.tokens,
        evaluation=config.eval,
        ttt=config.ttt,
        data=options.data,
        tokenizer=options.tokenizer,
    )
    limits = {name: getattr(options, name) for name in ("limit_bytes", "train_limit", "eval_limit")}
    target = replace(target, **limits)
    known = checks(target)
    if unknown := set(options.only) - {check.id for check in known}:
        raise PgolfError(f"there is no check {', '.join(sorted(unknown))}; they are C1 to C{len(known)}")
    results = run_checks(check for check in known if not options.only or check.id in options.only)
    findings = [{**asdict(result), "verdict": result.verdict} for result in results]
    print_out(findings_table(findings).text())
    out = options.json
    if out is None and target.folder is not None and not options.only:
        out = target.folder.audit_file
    if out is not None:
        content = {
            "audited": str(path),
            "artifact_sha256": None if target.artifact is None else sizes(target.artifact).sha256,
            "tokens": len(target.tokens) - 1,
            "findings": findings,
        }
        write_text(out, json.dumps(content, indent=2) + "\n")
        print_out(f"wrote {out}")
    wrong = broken(results)
    if wrong:
        print_out(f"{len(wrong)} of {len(results)} do not hold: {', '.join(wrong)}")
    return 1 if wrong else 0


@dataclass(frozen=True)
class Report:
    run: Run
    """Run folder, finished or not."""
    out: Path | None = None
    """HTML file; default: RUN/report.html."""
    audit: bool = False
    """First audit the run, as `pgolf audit` does."""


def report(options: Report) -> int:
    from pgolf_fast.lab.report.sections import write_report

    folder, _ = run_folder(options.run)
    status = 0
    if options.audit:
        try:
            status = audit(Audit(folder.path, ()))
        except PgolfError as error:  # a run that is not packed yet still gets a page
            print_out(f"not audited: {error}")
            status = 2
    path = write_report(folder, options.out or folder.path / "report.html")
    print_out(f"wrote {path}")
    return status


@dataclass(frozen=True)
class Analyze:
    models: Models = ()
    """Run folders, checkpoints (.safetensors), artifacts (.pgolf), community .pt files."""
    only: tuple[str, ...] = ()
    """Analyses to run, for example deltas quant; default: all that these models and their data allow."""
    out: Path = Path("runs/analysis")
    """Folder for analysis.json, the plots and report.html."""
    weights: Literal["auto", "float", "artifact"] = "auto"
    """Weights to read from a run folder; auto takes the float weights if they are there."""
    preset: str | None = None
    """Preset of files that hold no configuration, such as .pt files."""
    data: DataFolder = None
    """Folder of validation shards; default: that of the first model's run."""
    tokenizer: TokenizerFile = None
    """Tokenizer of those shards; default: the one that belongs to them."""
    tokens: int = AnalysisOptions.tokens
    """Validation targets to take losses over."""
    hash_rows: tuple[int, ...] = AnalysisOptions.hash_rows
    """Rows of additional hash tables whose buckets are counted, for example 3072 4096 10240."""
    calibration_tokens: int = AnalysisOptions.calibration_tokens
    """Inputs, of those targets, that weight rounding errors."""
    points: int = AnalysisOptions.points
    """Points on the line between two models where the loss is measured."""
    curvature_tokens: int = AnalysisOptions.curvature_tokens
    """Validation targets whose loss is the error surface."""
    probes: int = AnalysisOptions.probes
    """Random vectors for the trace of the Hessian."""
    lanczos_steps: int = AnalysisOptions.lanczos_steps
    """Hessian-vector products for its extreme eigenvalues."""
    seed: int = AnalysisOptions.seed
    """Seed of all random vectors."""


def analyze(options: Analyze) -> int:
    import torch

    from pgolf_fast.lab.analysis.models import open_models
    from pgolf_fast.lab.analysis.registry import check_names, run_analyses, write_results

    if not options.models:
        raise PgolfError("give at least one model: a run folder, a checkpoint, an artifact or a .pt file")
    check_names(options.only)
    if options.out.exists() and not options.out.is_dir():
        raise PgolfError(f"--out {options.out} is a file; give a folder")
    console.setup_logging()
    config = None if options.preset is None else preset(options.preset)
    if options.data is not None:
        existing(options.data, "data folder")
    shared = {f.name for f in fields(AnalysisOptions)} & {f.name for f in fields(options)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = AnalysisOptions(device=device, **{name: getattr(options, name) for name in shared})
    models = open_models(options.models, options.weights, config)
    results = run_analyses(options.only, models, settings, lambda summary: print_out(f"{summary.text()}\n"))
    if results.skipped:
        reasons = (f"  {name}: {why}" for name, why in results.skipped.items())
        print_out("\n".join(["skipped:", *reasons]) + "\n")
    print_out(results.time_table().text())
    write_results(options.out, results)
    print_out(f"wrote {options.out / 'analysis.json'} and {options.out / 'report.html'}")
    return 0
