"""The fused CPU passes: every instruction set that this CPU runs, any number of threads, wrong operands."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_matches_float64, results

from pgolf_fast.ops import cases, judge, native, reference, rms_norm, softcap_cross_entropy, tiles

_C = pytest.importorskip("pgolf_fast._C", reason="the C++ extension is not built")
CSRC = Path(__file__).parents[2] / "csrc"
TABLES = _C.runnable_passes()
OPS = ("mlp-leaky_relu_squared", "mlp-relu_squared", "mlp-swiglu", "residual_norm", "residual_norm-unscaled")
OPS += ("rms_norm", "smear_gate", "softcap_cross_entropy", "softcap_cross_entropy-z_loss")
# narrower than a vector; odd; several blocks of rows
SIZES = {
    "narrow": cases.Sizes(2, 3, dim=3, hidden=5, gated_hidden=3, vocab=2),
    "odd": cases.Sizes(3, 37, dim=45, hidden=75, gated_hidden=51, vocab=83),
    "large": cases.Sizes(2, 300, dim=129, hidden=258, gated_hidden=172, vocab=1027),
}


@pytest.fixture(params=TABLES)
def table(request):
    _C.choose_passes(request.param)
    yield request.param
    _C.choose_passes("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_every_instruction_set_agrees(name, sizes, dtype, table):
    assert _C.passes() == table
    case = cases.make(name, SIZES[sizes], dtype)
    verdict = judge.judge(case, case.ours(), judge.truth_of(case))
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
def test_the_number_of_threads_changes_no_bit(name, dtype, monkeypatch):
    """PyTorch's products and sums stay on one thread, whose own results depend on it."""
    case = cases.make(name, SIZES["large"], dtype)
    douts = judge.truth_of(case).douts
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        outs, grads = case.ours(banks=False).results(douts)
        found.append([t.clone() for t in (*outs, *grads.values())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["mlp", "residual_norm", "smear_gate", "softcap_cross_entropy"])
def test_is_used_unless_pytorch_is_chosen(op):
    x = torch.zeros(1)
    try:
        tiles.choose(op, "torch")
        assert native.passes(op, x) is None
    finally:
        tiles.choose(op, "auto")
    assert native.passes(op, x) is native.passes(op, x.bfloat16()) is _C
    for other in (x.double(), x.half(), x.to("meta")):
        assert native.passes(op, other) is None
    with tiles.kernels_on_cpu("interpreter"):
        assert native.passes(op, x) is None


@pytest.mark.parametrize("vocab", [8191, 8192, 8193, 12_345])
def test_vocabularies_beyond_what_a_row_keeps(vocab, table):
    targets = torch.tensor([0, vocab - 1, 8191 % vocab])
    inputs = [torch.randn(3, 5), torch.randn(vocab, 5), targets]
    assert_matches_float64(
        lambda *t: softcap_cross_entropy(*t, 30.0, 0.1),
        lambda *t: reference.softcap_cross_entropy(*t, 30.0, 0.1),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "again"])
def test_losses_weighted_row_by_row(kept, dtype, monkeypatch):
    """Incoming gradients that differ, some of them zero, as token weights and meta-learning steps give."""
    if not kept:
        monkeypatch.setattr(sys.modules["pgolf_fast.ops.softcap_cross_entropy"], "_KEPT", 0)
    weights = torch.randn(70) * torch.arange(70).remainder(3) / 1000
    inputs = [torch.randn(70, 45).to(dtype), torch.randn(75, 45).to(dtype), torch.randint(75, (70,))]
    assert_matches_float64(
        lambda *t: softcap_cross_entropy(*t, 15.0, 1e-3) * weights,
        lambda *t: reference.softcap_cross_entropy(*t, 15.0, 1e-3) * weights,
        inputs,
    )


def test_what_is_not_a_number_stays_visible(table):
    """A diverged run must not get finite losses."""
    x, targets = torch.ones(3, 4), torch.tensor([0, 1, 2])
    x[1, 2] = torch.nan
    (got,), (dx, dweight), _ = results(
        lambda *t: softcap_cross_entropy(*t, 30.0), (x, torch.ones(9, 4), targets)
    )
    assert got.isnan().tolist() == dx.isnan().all(1).tolist() == [False, True, False]
    assert dweight.isnan().all()
    assert rms_norm(x).isnan().all(1).tolist() == [False, True, False]


def floats(*shape):
    return np.ones(shape, np.float32)


def bits(*shape):
    return np.ones(shape, np.uint16)


IDS = np.zeros(2, np.int64)
LOSS = {"logits": floats(2, 3), "targets": IDS, "loss": floats(2), "logsumexp": floats(2)}
LOSS |= {"softcap": 30.0, "z_loss": 0.0, "gradient": True}
NORM = {"x": floats(2, 3), "branch": floats(2, 3), "x_scale": None, "branch_scale": floats(3)}
BACK = {"dmixed": floats(2, 3), "dnormed": floats(2, 3), **NORM, "mixed": floats(2, 3), "rstd": floats(2)}
BACK |= {"dx": floats(2, 3), "dbranch": floats(2, 3), "dscales": floats(1, 3), "scale": 1.0}
NORM |= {"mixed": floats(2, 3), "normed": floats(2, 3), "rstd": floats(2), "scale": 1.0}
SMEAR = {"x": bits(2, 5, 3), "gate": floats(3), "out": bits(2, 5, 3)}
SMEAR_BACK = {"dout": bits(2, 5, 3), "x": bits(2, 5, 3), "gate": floats(3), "dx": bits(2, 5, 3)}
SMEAR_BACK |= {"dsum": floats(3)}
ACT = {"pre": floats(8), "hidden": floats(4), "activation": "swiglu"}
ACT_BACK = {
    "dhidden": floats(4),
    "pre": floats(8),
    "dpre": floats(8),
    "hidden": floats(4),
    "activation": "swiglu",
}
GOOD = {"activate": ACT, "activate_backward": ACT_BACK, "softcap_loss": LOSS, "residual_norm": NORM}
GOOD |= {"residual_norm_backward": BACK, "smear_gate": SMEAR, "smear_gate_backward": SMEAR_BACK}
ARRAYS = [(run, name) for run, good in GOOD.items() for name, v in good.items() if isinstance(v, np.ndarray)]


@pytest.mark.parametrize("run", GOOD)
def test_good_operands_are_taken(run):
    getattr(_C, run)(**GOOD[run])


@pytest.mark.parametrize(("run", "name"), ARRAYS)
def test_wrong_operands_are_named(run, name):
    """Of every array: the dtype, a stride, a row too many, and the absence."""
    good = GOOD[run]
    array = good[name]
    longer = np.ones((len(array) + 1, *array.shape[1:]), array.dtype)
    strided = np.repeat(array, 2, axis=-1)[..., ::2]
    for wrong in (array.astype(np.float64), strided, longer):
        with pytest.raises(ValueError, match=r"^\w+(\.dtype is| has| is) .*(needed|but )") as error:
            getattr(_C, run)(**{**good, name: wrong})
        if wrong is not longer:  # the lengths of two arrays may differ either way
            assert str(error.value).startswith(name)
    with pytest.raises((TypeError, ValueError)):
        getattr(_C, run)(**{**good, name: None})


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ("activate", {"hidden": bits(4)}, r"pre\.dtype is float32, but hidden\.dtype is uint16"),
        ("activate", {"pre": floats(7)}, "pre has 7 elements, but 8 are needed"),
        ("activate", {"activation": "gelu"}, "activation is gelu: use leaky_relu_squared"),
        ("softcap_loss", {"logits": floats(6)}, "logits has 1 dimensions, but 2 are needed"),
        ("softcap_loss", {"loss": bits(2)}, r"loss\.dtype is uint16; float32 is needed"),
        (
            "softcap_loss",
            {"targets": IDS[:1]},
            "targets is int64 with 1 elements; 2 adjacent int64 are needed",
        ),
        ("softcap_loss", {"targets": IDS + 3}, "targets hold 3; ids from 0 to below 3 are needed"),
        ("softcap_loss", {"targets": IDS - 1}, "targets hold -1; ids from 0 to below 3 are needed"),
        ("residual_norm", {"branch": None}, "branch_scale is given, but branch is None"),
        ("residual_norm_backward", {"dscales": None}, "dscales is None, but branch is given"),
        ("smear_gate", {"x": bits(10, 3)}, "x has 2 dimensions, but 3 are needed"),
    ],
)
def test_messages_say_what_came_and_what_is_needed(run, changes, message):
    with pytest.raises(ValueError, match=message):
        getattr(_C, run)(**{**GOOD[run], **changes})


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"no instruction set mmx on this CPU: use one of auto, .*portable"):
        _C.choose_passes("mmx")
    assert _C.passes() == TABLES[0]


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_no_function_for_newer_cpus_can_be_linked_into_other_code(name, tmp_path):
    """Inline functions are merged by name: one compiled for AVX must not replace another's."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not shutil.which(compiler) or not shutil.which("nm"):
        pytest.skip("no C++ compiler and nm")
    target = tmp_path / "passes.o"
    source = CSRC / f"passes_{name}.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-Wno-psabi", "-c", source, "-o", target], check=True)
    listed = subprocess.run(
        ["nm", "--defined-only", target], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-2:] for line in listed.splitlines()]
    shared = [symbol for kind, symbol in symbols if kind in "TWVuDRB" and name not in symbol]
    shared = [symbol for symbol in shared if not symbol.startswith("DW.ref.")]  # addresses, not code
    assert symbols or os.uname().machine != "x86_64"
    assert shared == []
