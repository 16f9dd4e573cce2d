"""Every case of the catalog agrees with its reference: the one place where op agreement is checked."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_fast.bench.doctor import public_ops
from pgolf_fast.ops import cases, judge, tiles

HAS_KERNELS = True
KERNELS = [name for name, entry in cases.CASES.items() if entry.kernels]
# narrower, or the interpreter would take seconds for each
SIZES = cases.Sizes(length=19, dim=36, heads=2, kv_heads=1, hidden=40, gated_hidden=34, up_rows=44, layers=1)


def assert_agrees(name, dtype, device, sizes=SIZES):
    case = cases.make(name, sizes, dtype, device)
    truth = judge.truth_of(case)
    for banks in (True, False) if case.grad_banks else (True,):
        verdict = judge.judge(case, case.ours(banks=banks), truth)
        assert verdict.ok, f"{'banks' if banks else 'dense'}: {verdict}"


@pytest.mark.parametrize("name", cases.CASES)
def test_agrees_with_the_reference(name, device):
    assert_agrees(name, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KERNELS)
def test_agrees_in_low_precision(name, dtype):
    assert_agrees(name, dtype, "cuda" if torch.cuda.is_available() else "cpu")


def test_every_op_has_a_case_and_every_case_is_an_op():
    assert {op for entry in cases.CASES.values() for op in entry.ops} == set(public_ops())


def test_inputs_depend_on_the_seed_alone():
    first, again, other = (cases.make("mlp-swiglu", seed=seed).inputs for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_every_kernel_is_launched(monkeypatch):
    """In the interpreter: the catalog reaches every kernel that can be tuned."""
    monkeypatch.setitem(tiles._chosen, "weight_grad", "triton")  # the library's product is the default
    pytest.importorskip("triton")
    import interpreter

    interpreter.install()
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU")
    with tiles.kernels_on_cpu("interpreter"), tiles.recorded() as launched:
        for name in KERNELS:
            for dtype in (torch.float32, torch.bfloat16):
                assert_agrees(name, dtype, "cpu")
    elsewhere = {name for name in tiles.kernels() if name.endswith("_128")}  # heads of 128 channels
    elsewhere |= {"int6_matmul", "weight_grad_sum"}  # larger sizes, such as exp101's
    assert set(launched) >= set(tiles.kernels()) - elsewhere


def test_every_op_with_kernels_is_chosen_by_name(monkeypatch):
    """The names in `tiles.DEFAULTS` are those that ops ask for."""
    asked, uses = set(), tiles.uses_kernels
    monkeypatch.setattr(tiles, "uses_kernels", lambda op, t: asked.add(op) or uses(op, t))
    for name in cases.CASES:
        assert_agrees(name, torch.float32, "cpu")
    assert asked == set(tiles.DEFAULTS)


@pytest.mark.parametrize("name", cases.CASES)
def test_runs_on_fake_tensors_and_has_the_gradients_it_declares(name):
    case = cases.make(name)
    if name != "lzma":  # the size of its result depends on the data
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {n: t if t is None else mode.from_tensor(t) for n, t in case.inputs.items()}
            assert all(type(out).__name__ == "FakeTensor" for out in case.op(**fakes))
    if case.mutated or case.trained:
        return  # in place, or judged above
    leaves = {n: t.requires_grad_(t.is_floating_point()) for n, t in case.inputs.items()}
    if any(t.requires_grad for t in leaves.values()):
        with pytest.raises((NotImplementedError, RuntimeError)):
            sum(out.double().sum() for out in case.op(**leaves)).backward()
