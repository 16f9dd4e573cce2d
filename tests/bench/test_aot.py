"""`pgolf aot`: every kernel compiles for Hopper without spilling, and multiplies on its tensor cores."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from pgolf_fast.bench import aot
from pgolf_fast.bench.aot import SHARED_LIMIT, Compiled
from pgolf_fast.errors import PgolfError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")


def pgolf_aot(*words, interpret=False):
    """Run in another process: this one has imported Triton with its interpreter on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", "pgolf_fast.cli", "aot", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# Products with an epilogue, rows, the loss. Attention takes a minute, so only the slow tests compile it.
FEW = ("mlp-leaky_relu_squared", "residual_norm", "softcap_cross_entropy")


def without_interpreter(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


def assert_no_problem(rows):
    """No spills, shared memory within the limit, HGMMA in every kernel that multiplies."""
    multiplies = aot.kernels_in_source()
    for row in rows:
        assert row["arch"] == "sm_90"
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255, row
        assert row["shared_bytes"] <= SHARED_LIMIT[90], row
        assert row["warps"] >= 1, row
        assert row["stages"] >= 1, row
        assert not multiplies[row["kernel"]] or row["tensor_core"] > 0, row


@pytest.mark.slow
def test_representative_kernels_compile_for_hopper():
    code = f"""
import json
from pgolf_fast.bench import aot
rows, misfits = aot.compile_presets(["exp101"], [90], {FEW!r})
assert misfits == [] and aot.problems(rows) == [], (misfits, aot.problems(rows))
print(json.dumps([row.record() for row in rows]))
"""
    done = without_interpreter(code)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert_no_problem(rows)
    assert {row["case"] for row in rows} == {*FEW}


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    done = pgolf_aot("--arch", 90, "--out", path)
    assert path.exists(), done.stderr
    return done, json.loads(path.read_text())


@pytest.mark.slow
def test_hopper_gate(hopper):
    done, table = hopper
    assert done.returncode == 0, done.stdout[done.stdout.index("wrote ") :] + done.stderr
    assert_no_problem(table["kernels"])


@pytest.mark.slow
def test_every_kernel_is_compiled(hopper):
    """A kernel that no case of ops/cases.py reaches fails here by name."""
    compiled = {row["kernel"] for row in hopper[1]["kernels"]}
    assert set(aot.kernels_in_source()) - compiled == set()


@pytest.mark.slow
def test_table_names_versions_and_shapes(hopper):
    done, table = hopper
    assert table["torch"] == torch.__version__
    assert table["triton"]
    assert table["presets"] == ["exp101", "exp101_swiglu"]
    assert table["tokens"] == 2048
    assert "newton_schulz_gram_kernel" in done.stdout


def test_refuses_the_interpreter_in_one_line():
    done = pgolf_aot("--arch", 90, interpret=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "TRITON_INTERPRET=1 is set" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--arch", "70"], "no architecture sm_70: use one of 80, "), (["exp102"], "exp102")],
)
def test_bad_input_is_one_line(words, message):
    done = pgolf_aot(*words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_products_are_seen_through_device_functions(tmp_path, monkeypatch):
    (tmp_path / "shared.py").write_text("@triton.jit\ndef product(a, b):\n    return tl.dot(a, b)\n")
    (tmp_path / "x.py").write_text(
        "@triton.jit\ndef middle(a):\n    return product(a, a)\n\n"
        "@triton.jit\ndef far_kernel(a):\n    middle(a)\n\n"
        "@triton.jit\ndef near_kernel(a):\n    tl.dot(a, a)\n\n"
        "@triton.jit\ndef plain_kernel(a):\n    tl.sum(a)\n\n"
        "def host_kernel(a):\n    tl.dot(a, a)\n"
    )
    monkeypatch.setattr(aot, "kernel_files", lambda: sorted(tmp_path.glob("*.py")))
    assert aot.kernels_in_source() == {"far_kernel": True, "near_kernel": True, "plain_kernel": False}


def test_problems_are_named(monkeypatch):
    monkeypatch.setattr(aot, "kernels_in_source", lambda: {"a_kernel": True, "b_kernel": False})
    good = Compiled("a_kernel", 90, 4, 3, 200, 0, 1000)
    good.instructions["HGMMA"] = 8
    assert aot.problems([aot.Row("case", good)]) == []
    assert aot.unreached([aot.Row("case", good)]) == ["b_kernel"]
    spilling = Compiled("b_kernel", 90, 4, 3, 255, 24, SHARED_LIMIT[90] + 1)
    scalar = Compiled("a_kernel", 90, 4, 3, 200, 0, 1000)
    scalar.instructions["HMMA"] = 8
    lines = aot.problems([aot.Row("case", spilling), aot.Row("case", scalar)])
    assert [line.split(":")[0].split(" ")[0] for line in lines] == ["b_kernel", "b_kernel", "a_kernel"]
    assert "spill" in lines[1]
    assert "without HGMMA" in lines[2]


def test_a_case_that_does_not_fit_is_named():
    """In a process without the interpreter: tiles of 256 x 256 x 256 in three stages take 768 KiB."""
    code = """
from pgolf_fast.bench import aot
from pgolf_fast.ops import tiles
tiles.set_tiles({"newton_schulz_apply": {"sm90": tiles.Tile(256, 256, 256, num_warps=8, num_stages=3)}})
rows, misfits = aot.compile_presets(["tiny"], [90], ["newton_schulz-mlp", "muon_apply"])
assert {"muon_apply_kernel", "newton_schulz_gram_kernel"} <= {row.compiled.kernel for row in rows}
assert len(misfits) == 1 and misfits[0].startswith("newton_schulz-mlp does not fit sm_90: "), misfits
"""
    done = without_interpreter(code)
    assert done.returncode == 0, done.stderr


def test_without_triton_it_says_so(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PgolfError, match="Triton is not installed"):
        aot.compile_presets(["exp101"], [90])
