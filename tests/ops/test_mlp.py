import pytest
import torch
from helpers import (
    LAYOUTS,
    assert_adds_to_banks,
    assert_matches_float64,
    assert_strides_do_not_matter,
    lay_out,
    results,
)

from pgolf_fast.ops import mlp, reference
from pgolf_fast.ops.mlp import ACTIVATIONS

# shape of x, hidden channels
SHAPES = [((2, 16, 32), 64), ((3, 5, 27), 19), ((1, 24), 7), ((1, 1, 1), 1), ((0, 8), 6), ((2, 0, 8), 6)]
SLOTS, SLOT = 3, 1


def make(shape, hidden, activation, dtype=torch.float32, device="cpu"):
    dim, rows = shape[-1], hidden * (2 if activation == "swiglu" else 1)
    x = torch.randn(shape, device=device)
    up = torch.randn(SLOTS, rows, dim, device=device) * dim**-0.5
    down = torch.randn(SLOTS, dim, hidden, device=device) * hidden**-0.5
    return [t.to(dtype) for t in (x, up, down)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_matches_reference(shape, hidden, dtype, activation, device):
    inputs = make(shape, hidden, activation, dtype, device)
    assert_matches_float64(
        lambda *t: mlp(*t, SLOT, activation), lambda *t: reference.mlp(*t, SLOT, activation), inputs
    )


@pytest.mark.parametrize("slot", range(SLOTS))
def test_reads_its_slot(slot, device):
    x, up, down = make((4, 8), 6, "swiglu", device=device)
    _, (_, dup, ddown), _ = results(lambda *t: mlp(*t, slot, "swiglu"), (x, up, down))
    torch.testing.assert_close(mlp(x, up, down, slot, "swiglu"), reference.mlp(x, up, down, slot, "swiglu"))
    for grad in (dup, ddown):
        assert [bool(g.any()) for g in grad] == [s == slot for s in range(SLOTS)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, activation, device):
    inputs = lay_out(layout, make((3, 5, 12), 10, activation, device=device))
    assert not any(t.is_contiguous() for t in inputs)
    assert_strides_do_not_matter(lambda *t: mlp(*t, SLOT, activation), inputs)


@pytest.mark.parametrize("banked", [False, True], ids=["dense", "banked"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout, banked, device):
    x, up, down = make((2, 5, 8), 6, "swiglu", device=device)
    if layout != "contiguous":
        x, up, down = lay_out(layout, (x, up, down))
    banks = (torch.ones_like(up), torch.ones_like(down)) if banked else (None, None)
    leaves = [t.detach().requires_grad_() for t in (x, up, down)]
    torch.library.opcheck(torch.ops.pgolf.mlp, (*leaves, SLOT, "swiglu", *banks))
    out, pre = torch.ops.pgolf.mlp(x, up, down, SLOT, "swiglu", None, None)
    args = (torch.randn_like(out), x, pre, up, down, SLOT, "swiglu", *banks)
    torch.library.opcheck(torch.ops.pgolf.mlp_backward, args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = [t.requires_grad_() for t in make((2, 3, 4), 5, activation, torch.double)]
    torch.autograd.gradcheck(lambda *t: mlp(*t, SLOT, activation), inputs)


@pytest.mark.parametrize("banked", [False, True], ids=["dense", "banked"])
def test_compiles_without_graph_break(banked, device):
    inputs = make((2, 5, 8), 6, "swiglu", device=device)
    eager_banks = [torch.randn_like(t) for t in inputs[1:]] if banked else [None, None]
    compiled_banks = [t if t is None else t.clone() for t in eager_banks]
    before = [t if t is None else t.clone() for t in eager_banks]

    def run(x, up, down, grad_up, grad_down):
        return mlp(x, up, down, SLOT, "swiglu", grad_up=grad_up, grad_down=grad_down).sin()

    def outcome(function, banks):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves, *banks)
        out.sum().backward()
        return out.detach(), [t.grad for t in leaves], banks

    want = outcome(run, eager_banks)
    got = outcome(torch.compile(run, fullgraph=True, backend="aot_eager"), compiled_banks)
    torch.testing.assert_close(got, want)
    if banked:
        assert want[1][1:] == [None, None]
        assert not any(torch.equal(a[SLOT], b[SLOT]) for a, b in zip(compiled_banks, before, strict=True))


def test_rejects_bad_input():
    x, up, down = make((4, 6), 5, "relu_squared")
    with pytest.raises(ValueError, match=r"activation is 'gelu'; use one of leaky_relu_squared"):
        mlp(x, up, down, 0, "gelu")
    with pytest.raises(ValueError, match=r"mlp: slot is 3, but the bank has layers 0 to 2"):
        mlp(x, up, down, 3, "relu_squared")
    with pytest.raises(ValueError, match=r"slot is -1"):
        mlp(x, up, down, -1, "relu_squared")
    with pytest.raises(ValueError, match=r"up_bank\.shape is \(3, 5, 6\), but \(any, any, 7\) is needed"):
        mlp(torch.ones(4, 7), up, down, 0, "relu_squared")
    with pytest.raises(ValueError, match=r"down_bank\.shape is \(3, 6, 5\), but \(3, 6, 2\) is needed"):
        mlp(x, up, down, 0, "swiglu")
    with pytest.raises(ValueError, match=r"down_bank\.shape is \(2, 6, 5\)"):
        mlp(x, up, down[:2], 0, "relu_squared")
    with pytest.raises(ValueError, match=r"up_bank\.dtype is torch\.float16, but x\.dtype is torch\.float32"):
        mlp(x, up.half(), down, 0, "relu_squared")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_banks(activation, dtype, device):
    inputs = make((3, 5, 12), 10, activation, dtype, device)

    def op(x, up, down, grad_up, grad_down):
        return mlp(x, up, down, SLOT, activation, grad_up=grad_up, grad_down=grad_down)

    assert_adds_to_banks(op, inputs, banks=(1, 2), slots=((SLOT,), (SLOT,)))


def test_one_gradient_bank_is_not_enough():
    """With only one bank given, both gradients go to autograd and the bank is left alone."""
    x, up, down = (t.requires_grad_() for t in make((3, 8), 6, "swiglu"))
    grad_up = torch.ones_like(up)
    out = mlp(x, up, down, SLOT, "swiglu", grad_up=grad_up)
    grads = torch.autograd.grad(out.sum(), (up, down))
    assert all(g[SLOT].any() for g in grads)
    assert bool((grad_up == 1).all())
