"""Run one job in a process of its own: `python -m pgolf_fast.lab.compare.ablation.worker FOLDER`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from pgolf_fast.errors import PgolfError


def main() -> int:
    """Run the job in the folder that is named; why it failed goes to standard output."""
    end_with_parent()
    from pgolf_fast.lab.compare.ablation.job import run_job

    try:
        run_job(Path(sys.argv[1]))
    except PgolfError as error:
        sys.stdout.write(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def end_with_parent() -> None:
    """End this process when the one that holds its standard input ends, however that happens.

    Else a run whose parent was killed would go on beside the one that is started in its place.
    """

    def watch() -> None:
        while os.read(0, 1):  # sys.stdin has a lock that this thread would hold when the process ends
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
