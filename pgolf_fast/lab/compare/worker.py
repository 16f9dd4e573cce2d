"""Run one job in its own process: `python -m pgolf_fast.lab.compare.worker FOLDER`."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from pgolf_fast.errors import PgolfError


def main() -> int:
    """Run the job in the named folder; the reason of a failure goes to standard output."""
    end_with_parent()
    from pgolf_fast.lab.compare.jobs import run_job

    try:
        run_job(Path(sys.argv[1]))
    except PgolfError as error:
        sys.stdout.write(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def end_with_parent() -> None:
    """End this process when the holder of its standard input ends for any reason.

    Otherwise a run whose parent was killed would continue next to the one started in its place.
    """

    def watch() -> None:
        # Not sys.stdin: this thread would hold its lock when the interpreter shuts down.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
