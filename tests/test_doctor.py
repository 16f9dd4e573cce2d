"""`pgolf doctor`: the coverage table says what is so, and a wrong op is refused by name."""

import ast
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_fast import ops
from pgolf_fast.bench import doctor_checks
from pgolf_fast.bench.doctor import examine, implementations
from pgolf_fast.bench.doctor_checks import CHECKS, check_ops
from pgolf_fast.bench.doctor_coverage import COLUMNS, coverage, kernels_of, public_ops, read_tests
from pgolf_fast.ops import tiles

TESTS = Path(__file__).parent / "ops"
CPU = torch.device("cpu")


def checked_ops(name):
    return name.split(",")[0].split(" + ")


def table(tests=TESTS):
    rows, _ = coverage(tests)
    return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows}


def test_every_op_is_covered():
    """No hole is left in the table, and every op of the launch table is asked for by some op."""
    holes = [
        f"{op}: {column}" for op, cells in table().items() for column, cell in cells.items() if cell == "no"
    ]
    assert holes == []
    inside_others = {"weight_grad"}  # products into gradient banks
    assert {kernels_of(op) for op in public_ops()} - {None} == set(tiles.DEFAULTS) - inside_others


def test_every_op_is_checked():
    assert {op for name in CHECKS for op in checked_ops(name)} == set(public_ops())


@pytest.mark.parametrize("name", CHECKS)
def test_fake_and_autograd_columns_are_true(name):
    """Each op is run on fake tensors, and asked for a gradient."""
    check, cells = CHECKS[name](), [table()[op] for op in checked_ops(name)]
    nothing = [None] * len(check.banks)
    if "lzma" not in name:  # the size of its result depends on the data
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [t if t is None else mode.from_tensor(t) for t in check.inputs]
            out = check.op(*fakes, *nothing)
        assert type(out[0] if isinstance(out, tuple) else out).__name__ == "FakeTensor"
    assert all(c["fake"] == "yes" for c in cells)
    if any(getattr(torch.ops.pgolf, op).default._schema.is_mutable for op in checked_ops(name)):
        assert not any(c["autograd"] == "yes" for c in cells)
        return
    leaves = [t if t is None else t.requires_grad_(t.is_floating_point()) for t in check.inputs]
    if any(t is not None and t.requires_grad for t in leaves):
        differentiable = True
        try:
            out = check.op(*leaves, *nothing)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        except (NotImplementedError, RuntimeError):
            differentiable = False
        assert [c["autograd"] == "yes" for c in cells] == [differentiable] * len(cells)


@pytest.mark.parametrize(
    ("file", "test", "op", "column"),
    [
        ("test_mlp.py", "test_gradcheck", "mlp", "gradcheck"),
        ("test_mlp.py", "test_opcheck", "mlp", "opcheck"),
        ("test_residual_norm.py", "test_smear_opcheck", "smear_gate", "opcheck"),
        ("test_newton_schulz.py", "test_compiles_without_graph_break", "newton_schulz", "compile"),
        ("test_muon_update.py", "test_strided_inputs", "muon_apply", "strided"),
    ],
)
def test_table_misses_a_test_that_is_gone(file, test, op, column, tmp_path):
    tests = shutil.copytree(TESTS, tmp_path / "ops")
    path = tests / file
    tree = ast.parse(path.read_text())
    kept = [node for node in tree.body if getattr(node, "name", None) != test]
    assert len(kept) == len(tree.body) - 1
    path.write_text(ast.unparse(ast.Module(kept, [])))
    before, after = table(), table(tests)
    changed = {(o, c) for o in before for c in COLUMNS if before[o][c] != after[o][c]}
    assert (op, column) in changed
    assert after[op][column] == "no"
    assert all(c == column for _, c in changed)


def test_interpreter_column_wants_the_flag_and_the_fixture(tmp_path):
    text = "HAS_KERNELS = True\n\ndef test_a(device):\n    mlp()\n\ndef test_b():\n    mlp()\n"
    path = tmp_path / "test_x.py"
    path.write_text(text)
    assert [(t.name, t.interpreted) for t in read_tests(path)] == [("test_a", True), ("test_b", False)]
    path.write_text(text.replace("True", "False"))
    assert not any(t.interpreted for t in read_tests(path))


def test_calls_are_followed_through_the_file_and_references_do_not_count(tmp_path):
    path = tmp_path / "test_x.py"
    path.write_text(
        "def op(t):\n    return mlp(t)\n\nRUN = op\n\n"
        "def test_a():\n    torch.library.opcheck(RUN)\n\ndef test_b():\n    opcheck(reference.mlp)\n"
    )
    through, reference = read_tests(path)
    assert {"mlp", "opcheck"} <= through.words
    assert "mlp" not in reference.words


def test_without_tests_the_table_says_what_it_cannot_know(tmp_path):
    rows, notes = coverage(tmp_path)
    cells = {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows}["mlp"]
    assert cells["opcheck"] == cells["gradcheck"] == cells["interpreter"] == "?"
    assert cells["fake"] == cells["autograd"] == "yes"
    assert "not installed" in " ".join(notes)


def test_every_op_is_right_here():
    rows = check_ops(CPU, torch.bfloat16)
    assert {row[1] for row in rows if row[0].startswith("mlp")} == {"float32", "bfloat16"}
    assert [row for row in rows if row[-1] != "ok"] == []
    assert {row[3] for row in rows if row[0].startswith("mlp")} == {"1 forward, 3 backward, 2 banks"}


@pytest.mark.parametrize("what", ["forward", "backward", "banks", "raises", "nan"])
def test_a_wrong_op_is_refused_by_name(what, monkeypatch):
    right = ops.mlp

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.01

    def wrong(x, up, down, slot, kind, *, grad_up, grad_down):
        if what == "raises":
            raise RuntimeError("no such instruction")
        if what == "banks" and grad_up is not None:
            grad_up = grad_up[[1, 0, 2]].clone()
        out = right(
            Wrong.apply(x) if what == "backward" else x,
            up,
            down,
            slot,
            kind,
            grad_up=grad_up,
            grad_down=grad_down,
        )
        return out * 1.01 if what == "forward" else out / 0 if what == "nan" else out

    monkeypatch.setattr(doctor_checks.ops, "mlp", wrong)
    text, healthy = examine(check=True)
    assert not healthy
    assert text.splitlines()[-1] == "do not use: mlp"
    if what == "raises":
        assert "FAILED: no such instruction" in text


def test_report_says_what_runs_here():
    assert dict(implementations(CPU, torch.float32))["mlp"] == "PyTorch"
    with tiles.kernels_on_cpu("interpreter"):
        assert dict(implementations(CPU, torch.float32))["mlp"] == "Triton"
        assert dict(implementations(CPU, torch.float64))["mlp"] == "PyTorch"


def test_table_is_printed():
    text, healthy = examine(check=False, table=True)
    assert healthy
    assert text.splitlines()[0].split() == ["op", *COLUMNS]
    assert len(text.splitlines()) >= 2 + len(public_ops())
