"""`pgolf report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast.cli.arguments import existing, parse
from pgolf_fast.cli.output import print_out
from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class _Report:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, in whatever state."""
    out: Path | None = None
    """The page; default RUN/report.html."""
    audit: bool = False
    """Audit the run first, as `pgolf audit` does."""


def report_run(argv: list[str]) -> int:
    """pgolf report RUN [--out FILE.html] [--audit]"""
    from pgolf_fast.cli.audit import audit
    from pgolf_fast.config.run_folder import RunFolder
    from pgolf_fast.lab.report.sections import write_report

    arguments = parse("report", _Report, argv)
    folder = RunFolder(existing(arguments.run, "run folder"))
    folder.read_config()
    status = 0
    if arguments.audit:
        try:
            status = audit([str(folder.path)])
        except PgolfError as error:  # a run that is not packed yet has a page all the same
            print_out(f"not audited: {error}")
            status = 2
    path = write_report(folder, arguments.out or folder.path / "report.html")
    print_out(f"wrote {path}")
    return status
