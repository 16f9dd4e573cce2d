"""A short run of the fuzz of the command line, always with the same examples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_odd_command_lines_end_in_one_line(tmp_path):
    program = [sys.executable, str(Path(__file__).with_name("fuzz.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*program, "--minutes", "10", "--examples", "40", "--seed", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "seed 1: 40 examples" in done.stdout
