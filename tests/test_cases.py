"""Faults that people have reported in public, each as the script that showed it.

The scripts lie outside the repository, beside the real data; without them these tests are skipped.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
# By the number of a case: what its output must hold, and what it must not; counts are of matching lines
EXPECTED = {
    "01": ([r"pgolf: .*(U\+2581|space)"], [r"^bytes +\d"]),
    "02": ([r"fineweb_val_000000"], [r"fineweb_val_bytes_\S+ +val"]),
    "03": (["rc 0\n(.|\n)*rc 0\n(.|\n)*rc 0\n(.|\n)*rc 0", "train.seed|SEED"], ["rc [^0]"]),
    "05": (["(rc 0(.|\n)*){8}"], ["no known variables", "rc [^0]"]),
    "06": (["pgolf train"], ["not.a.real"]),
    "07": (["--command"], []),
    "09": (["(rc 0(.|\n)*){3}"], ["rc [^0]"]),
    "10": (["(rc 0(.|\n)*){3}"], ["rc [^0]"]),
    "11": (["(rc 0(.|\n)*){4}"], ["rc [^0]"]),
    "12": (["(pgolf: .*empty.*\nrc 2(.|\n)*){2}"], []),
    "14": (["(pgolf: .*\n.*rc 2(.|\n)*){3}", "NaN", "inf", "int8"], []),
    "15": (["(pgolf: .*\n.*rc 2(.|\n)*){2}"], []),
    "16": (["(pgolf: .*\n.*rc 2(.|\n)*){2}", "alone of two: rc [^0]"], []),
    "17": (["ascii rc 0", "cp1252 rc 0"], []),
    "19": (["rc 0"], []),
    "20": (["big.jsonl.*21.*\nbig rc 2", "deep.jsonl.*21.*\ndeep rc 2"], []),
    "22": (["rc 0"], []),
    "23": (["in the training shards|overlap"], []),
    "26": (["(documents(.|\n)*){6}"], ["pgolf"]),
    "27": (["--out"], []),
    "29": (["does not look like text"], []),
}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="the scripts are not here")
@pytest.mark.parametrize("case", sorted(EXPECTED))
def test_case(case, tmp_path):
    (folder,) = (SHARED / "cases").glob(f"{case}_*")
    environment = {
        **os.environ,
        "PGOLF": f"{sys.executable} -m pgolf_fast.cli",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "DATA": str(SHARED / "data"),
        "OUT": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", folder / "cmd.sh"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
        check=False,
    )
    said = done.stdout.partition("bytes of the text")[0]  # what follows imports a module by its former name
    assert "Traceback" not in said
    holds, lacks = EXPECTED[case]
    for pattern in holds:
        assert re.search(pattern, said, re.MULTILINE), said
    for pattern in lacks:
        assert not re.search(pattern, said, re.MULTILINE), said
