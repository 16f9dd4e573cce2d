"""`pgolf doctor` says what runs here, and a wrong op is reported by name."""

from pathlib import Path

import pytest
import torch

from pgolf_fast.bench import doctor
from pgolf_fast.cli.kernels import Doctor
from pgolf_fast.ops import cases, native, tiles

CPU = torch.device("cpu")


def rows(table):
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_check_names_dtypes_and_results():
    found = doctor.check_ops(CPU, torch.bfloat16)
    assert [row for row in found if row[-1] != "ok"] == []
    assert {row[1] for row in found if row[0].startswith("mlp")} == {"float32", "bfloat16"}
    assert {row[3] for row in found if row[0].startswith("mlp")} == {"1 forward, 3 backward, 2 banks"}
    assert {row[0] for row in found} == set(cases.CASES)


@pytest.mark.parametrize("what", ["forward", "backward", "banks", "raises", "nan"])
def test_a_wrong_op_is_refused_by_name(what, monkeypatch):
    right = cases.ops.mlp

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.01

    def wrong(x, grad_up=None, **rest):
        if what == "raises":
            raise RuntimeError("no such instruction")
        if what == "banks" and grad_up is not None:
            grad_up = grad_up[[1, 0, 2]].clone()
        out = right(Wrong.apply(x) if what == "backward" else x, grad_up=grad_up, **rest)
        return out * 1.01 if what == "forward" else out / 0 if what == "nan" else out

    names = ("mlp-swiglu", "smear_gate")
    monkeypatch.setattr(cases, "CASES", {name: cases.CASES[name] for name in names})
    monkeypatch.setattr(cases.ops, "mlp", wrong)
    text, healthy = doctor.examine(check=True)
    assert not healthy
    assert text.splitlines()[-1] == "do not use: mlp"
    if what == "raises":
        assert "FAILED: no such instruction" in text


def test_implementations_follow_device_and_dtype():
    found = rows(doctor.implementations(CPU, torch.float32))
    extension = native.extension()
    fused = "PyTorch" if extension is None else f"C++, SIMD: {extension.passes()}"
    assert found["mlp"]["implementation"] == found["newton_schulz"]["implementation"] == fused
    assert found["muon"]["implementation"] == "PyTorch"
    with tiles.kernels_on_cpu("interpreter"):
        assert rows(doctor.implementations(CPU, torch.float32))["mlp"]["implementation"] == "Triton"
        assert rows(doctor.implementations(CPU, torch.float64))["mlp"]["implementation"] == "PyTorch"


@pytest.mark.skipif(native.extension() is None, reason="no C++ passes")
def test_attention_on_a_cpu_is_the_fused_pass_unless_pytorch_is_chosen():
    def here():
        return {name: state for name, _, state in doctor.attention(CPU, torch.float32)}

    found = here()
    assert found.pop("C++") == "chosen"
    assert "chosen" not in found.values()
    assert found["flash"] == "available"
    try:
        tiles.choose("gqa_attention", "torch")
        assert here() == {**found, "flash": "chosen"}
    finally:
        tiles.choose("gqa_attention", "auto")
    assert doctor.attention(CPU, torch.float64)[0][0] == "triton"


def test_table_of_ops():
    found = rows(doctor.ops_table())
    assert list(found) == doctor.public_ops()
    assert all(row["cpu"] == row["fake"] == "yes" for row in found.values())
    assert found["mlp"] == {"op": "mlp", "cpu": "yes", "cuda": "triton", "fake": "yes", "autograd": "yes"}
    assert found["lzma_compress"]["cuda"] == found["lzma_compress"]["autograd"] == "-"
    differentiable = {entry.ops[0] for name, entry in cases.CASES.items() if cases.make(name).trained}
    assert {name for name, row in found.items() if row["autograd"] == "yes"} == differentiable


def test_table_is_printed():
    text, healthy = doctor.examine(check=False, table=True)
    assert healthy
    assert text.splitlines()[0].split() == ["op", "cpu", "cuda", "fake", "autograd"]


def test_flash_attention_is_fetched_before_the_report(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "fetch_fa3", lambda: Path("fa3/__init__.py"))
    monkeypatch.setattr(doctor, "examine", lambda **_: ("the report", True))
    assert Doctor(fetch_fa3=True).main() == 0
    assert capsys.readouterr().out.split() == ["wrote", "fa3/__init__.py", "the", "report"]
