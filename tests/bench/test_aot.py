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
        if multiplies[row["kernel"]]:
            assert row["tensor_core"] > 0, row
            assert row["cp.async"] > 0, row
            assert row["16-bit_loads_in_loops"] == 0, row


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
    assert {row["case"] for row in rows} == {*FEW, "mlp-leaky_relu_squared with our weight gradients"}
    kernels = {row["kernel"]: row for row in rows}
    assert kernels["mlp_dpre_kernel"]["blocks_per_SM"] == 2  # 221 registers and one block if dout is expanded


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


@pytest.mark.slow
def test_expanded_gradients_take_the_fast_kernel():
    """The gradient of `sum()` has strides of 0: the op copies it, since the kernel itself would be slow."""
    code = """
import torch
from pgolf_fast import ops
from pgolf_fast.bench import aot
from pgolf_fast.kernels.mlp import launch_mlp_dpre
from pgolf_fast.ops import tiles
def make(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16)
x, up, down = make(256, 128).requires_grad_(), make(1, 256, 128), make(1, 128, 256)
kind = "leaky_relu_squared"
with aot.compile_only(90) as compiled, tiles.kernels_on_cpu("sm90"):
    ops.mlp(x, up, down, 0, kind).sum().backward()
    (quick,) = [aot.Row("op", c, tiles.per_sm["mlp_dpre"]) for c in compiled if "dpre" in c.kernel]
    signs, saved, expanded = torch.zeros(256, 8, dtype=torch.int32), make(256, 256), make(1).expand(256, 128)
    launch_mlp_dpre(expanded, down[0], saved, signs, saved, saved, kind, tiles.row("mlp_dpre", "sm90"))
slow = aot.Row("kernel", compiled[-1], quick.wanted)
assert aot.problems([quick]) == [], aot.problems([quick])
assert quick.compiled.narrow == 0 < slow.compiled.narrow, (quick.compiled.narrow, slow.compiled.narrow)
lines = aot.problems([slow])
assert "1 blocks on a multiprocessor, its tile is for 2" in lines[0], lines
assert lines[1].endswith("loads of 16 bits in a loop"), lines
"""
    done = without_interpreter(code)
    assert done.returncode == 0, done.stderr


def test_loads_in_loops_are_counted():
    """Between a label and a jump back to it; not after it, and not in a jump onto itself."""
    code = """
        /*0080*/              @P1 LDG.E.U16 R1, desc[UR16][R18.64] ;
.L_x_2:
        /*0090*/              @P1 BRA `(.L_x_0) ;
        /*00a0*/              @P3 LDG.E.U16 R188, desc[UR16][R18.64] ;
        /*00b0*/                  LDG.E.128 R4, desc[UR16][R18.64] ;
.L_x_1:
        /*00c0*/                  LDG.E.S16.CONSTANT R183, desc[UR16][R20.64] ;
        /*00d0*/              @P0 BRA `(.L_x_1) ;
        /*00e0*/             @!P1 BRA `(.L_x_2) ;
.L_x_0:
        /*00f0*/                  LDG.E.U16 R2, desc[UR16][R18.64] ;
.L_x_3:
        /*0100*/                  BRA `(.L_x_3);
"""
    assert aot.narrow_loads(code) == 2
    assert aot.opcodes(code) == {"LDG": 5, "BRA": 4}


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "wants"),
    [
        (90, 8, 128, 98_304, 2),
        (90, 8, 129, 98_304, 1),  # registers
        (90, 4, 128, 57_344, 4),
        (90, 8, 64, 147_456, 1),  # shared memory
        (90, 8, 32, 0, 8),  # threads
        (90, 1, 16, 0, 32),  # blocks
        (80, 8, 64, 81_920, 2),
        (86, 8, 32, 0, 6),
    ],
)
def test_blocks_on_a_multiprocessor(arch, warps, registers, shared, wants):
    assert Compiled("a_kernel", arch, warps, 3, registers, 0, shared).per_sm == wants


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
    good.instructions.update(HGMMA=8, LDGSTS=4)
    assert aot.problems([aot.Row("case", good, 2)]) == []
    assert aot.unreached([aot.Row("case", good)]) == ["b_kernel"]
    spilling = Compiled("b_kernel", 90, 4, 3, 255, 24, SHARED_LIMIT[90] + 1)
    scalar = Compiled("a_kernel", 90, 4, 3, 200, 0, 1000)
    scalar.instructions["HMMA"] = 8
    scalar.narrow = 3
    lines = aot.problems([aot.Row("case", spilling), aot.Row("case", scalar, 3)])
    assert [line.split(":")[0].split(" ")[0] for line in lines] == ["b_kernel"] * 3 + ["a_kernel"] * 4
    assert "spill" in lines[1]
    assert "0 blocks" in lines[2]
    assert "2 blocks on a multiprocessor, its tile is for 3" in lines[3]
    assert "without HGMMA" in lines[4]
    assert "without cp.async" in lines[5]
    assert "3 loads of 16 bits in a loop" in lines[6]


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
