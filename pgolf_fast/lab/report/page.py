"""The page itself."""

from __future__ import annotations

from pathlib import Path

from pgolf_fast import __version__
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.io import write_text
from pgolf_fast.lab.report import html_page
from pgolf_fast.lab.report.run import read_run
from pgolf_fast.lab.report.sections import sections


def write_report(folder: RunFolder, out: Path) -> Path:
    """Write one page about the run in `folder`, from its files, and return its path.

    It says plainly what a run in any state (interrupted, unpacked, unscored, with losses that are not finite)
    does not have. Raises PgolfError when `folder` holds no config.json that can be read.
    """
    run = read_run(folder)
    note = (
        f"Preset `{run.config.name}`, seed {run.config.train.seed}. All figures are read from the run folder "
        f"by pgolf_fast {__version__}; bytes of code that the run does not set are those of that version."
    )
    write_text(out, html_page.page(f"Run {run.name}", sections(run), note))
    return out
