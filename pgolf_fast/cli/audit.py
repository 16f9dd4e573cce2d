"""`pgolf audit`: its arguments, its table and its exit status."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast.cli.arguments import existing, parse
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.schema import EvalConfig, PackConfig, TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text


@dataclass(frozen=True)
class _Audit:
    target: Annotated[Path, tyro.conf.Positional]
    """Run folder, or artifact file."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Window settings; default: the run's."""
    ttt: TTTConfig = field(default_factory=TTTConfig)
    """Test-time training settings; default: the run's."""
    tokens: int | None = None
    """Targets that are scored, from the beginning of the validation data; default: eight windows."""
    only: tuple[str, ...] = ()
    """Check only these, say C2 C5."""
    limit_bytes: int = PackConfig.limit_bytes
    """What artifact and script together may weigh."""
    train_limit: float | None = None
    """Seconds that training may have taken."""
    eval_limit: float | None = None
    """Seconds that evaluation may have taken."""
    data: Path | None = None
    """Folder of validation shards; default: the run's."""
    tokenizer: Path | None = None
    """Tokenizer of those shards; default: the one that belongs to them."""
    json: Path | None = None
    """File for the findings; default: audit.json in a run folder that all checks are made of."""


def audit(argv: list[str]) -> int:
    """pgolf audit RUN_OR_ARTIFACT [--tokens N] [--only C1 C2 ...] [--json FILE] [--ttt.field value]"""
    from pgolf_fast.artifact.container import sizes
    from pgolf_fast.lab.audit.check import broken, findings_table, run_checks
    from pgolf_fast.lab.audit.subject import checks, open_subject, settings

    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            parse("audit", _Audit, argv)
        raise PgolfError("give a run folder or an artifact file first")
    target = existing(Path(argv[0]), "run or artifact")
    config = settings(target)
    a = parse("audit", _Audit, argv, _Audit(target, config.eval, config.ttt))
    if a.tokens is not None and a.tokens < config.eval_seq_len:
        raise PgolfError(f"--tokens is {a.tokens}; it must be at least a window of {config.eval_seq_len}")
    subject = open_subject(
        target, tokens=a.tokens, evaluation=a.eval, ttt=a.ttt, data=a.data, tokenizer=a.tokenizer
    )
    subject = replace(subject, limit_bytes=a.limit_bytes, train_limit=a.train_limit, eval_limit=a.eval_limit)
    found = checks(subject)
    unknown = set(a.only) - {check.id for check in found}
    if unknown:
        raise PgolfError(f"there is no check {', '.join(sorted(unknown))}; they are C1 to C{len(found)}")
    results = run_checks(check for check in found if not a.only or check.id in a.only)
    findings = [{**asdict(r), "verdict": r.verdict} for r in results]
    print_out(findings_table(findings).text())
    path = a.json
    if path is None and subject.folder is not None and not a.only:
        path = subject.folder.audit_file
    if path is not None:
        story = {
            "audited": str(target),
            "artifact_sha256": None if subject.artifact is None else sizes(subject.artifact).sha256,
            "tokens": len(subject.tokens) - 1,
            "findings": findings,
        }
        write_text(path, json.dumps(story, indent=2) + "\n")
        print_out(f"wrote {path}")
    wrong = broken(results)
    if wrong:
        print_out(f"{len(wrong)} of {len(results)} do not hold: {', '.join(wrong)}")
    return 1 if wrong else 0
