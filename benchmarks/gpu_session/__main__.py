"""`python benchmarks/gpu_session` or `python -m benchmarks.gpu_session`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # the package need not be installed

from benchmarks.gpu_session.runner import main  # noqa: E402 - after the path is set

sys.exit(main())
