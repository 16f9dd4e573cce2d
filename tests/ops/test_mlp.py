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

from pgolf_fast.ops import mlp, reference, tiles
from pgolf_fast.ops.mlp import ACTIVATIONS

HAS_KERNELS = True
# shape of x, hidden channels; interpreted tiles are 32 wide, so the second has several in every dimension
SHAPES = [
    ((2, 16, 32), 64),
    ((5, 14, 45), 70),
    ((3, 5, 27), 19),
    ((1, 24), 7),
    ((1, 1, 1), 1),
    ((0, 8), 6),
    ((2, 0, 8), 6),
    ((3, 8), 0),
]
SLOTS, SLOT = 3, 1


def make(shape, hidden, activation, dtype=torch.float32, device="cpu"):
    dim, rows = shape[-1], hidden * (2 if activation == "swiglu" else 1)
    x = torch.randn(shape, device=device)
    up = torch.randn(SLOTS, rows, dim, device=device) * dim**-0.5
    down = torch.randn(SLOTS, dim, hidden, device=device) * max(1, hidden) ** -0.5
    return [t.to(dtype) for t in (x, up, down)]


@pytest.mark.pairwise
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_matches_reference(shape, hidden, dtype, activation, device):
    inputs = make(shape, hidden, activation, dtype, device)
    assert_matches_float64(
        lambda *t: mlp(*t, SLOT, activation), lambda *t: reference.mlp(*t, SLOT, activation), inputs
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_activations(activation, device):
    """Zeros of both signs, tiny and large pre-activations; a gate of every size."""
    values = torch.tensor([0.0, 1e-15, 1e-4, 1.0, 30.0, 3e15])
    pre = torch.cat([values, -values])
    if activation == "swiglu":
        pre = torch.cartesian_prod(
            torch.cat([values, -values]).clamp(-80, 80), torch.tensor([-2.0, 0.0, 3.0])
        ).flatten()
    size = len(pre) // (2 if activation == "swiglu" else 1)
    up, down = torch.eye(len(pre)), torch.zeros(len(pre), size)
    down[:size] = torch.eye(size)
    inputs = [pre[None].to(device), up[None].to(device), down[None].to(device)]
    (got,), (dx, _, _), douts = results(lambda *t: mlp(*t, 0, activation), inputs)
    (want,), (want_dx, _, _), _ = results(
        lambda *t: reference.mlp(*t, 0, activation), [t.double() for t in inputs], douts
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(dx.double(), want_dx, rtol=1e-5, atol=1e-18)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wide_tiles(activation, device, monkeypatch):
    """Tiles of 64 columns, whose epilogue works on halves as on a GPU."""
    monkeypatch.setattr(tiles, "_INTERPRETER", tiles.Tile(32, 64, 32, 1, 1))
    inputs = make((3, 14, 20), 150, activation, torch.float32, device)
    assert_matches_float64(
        lambda *t: mlp(*t, SLOT, activation), lambda *t: reference.mlp(*t, SLOT, activation), inputs
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saves_one_tensor_and_a_bit(activation, device):
    x, up, down = make((3, 13), 45, activation, device=device)
    _, saved, signs = torch.ops.pgolf.mlp(x, up, down, SLOT, activation, None, None)
    pre = x @ up[SLOT].T
    if not tiles.uses_kernels("mlp", x) or activation == "swiglu":
        torch.testing.assert_close(saved, pre)
    else:
        torch.testing.assert_close(saved, reference.activation(pre, activation))
    assert signs.dtype == torch.int32
    if not tiles.uses_kernels("mlp", x) or activation != "leaky_relu_squared":
        assert signs.numel() == 0
        return
    assert signs.shape == (3, 2)
    channels = torch.arange(45, device=device)
    assert torch.equal((signs[:, channels // 32] >> (channels % 32)) & 1, (pre >= 0).int())


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


@pytest.mark.pairwise
@pytest.mark.parametrize("banked", [False, True], ids=["dense", "banked"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("activation", ["swiglu", "leaky_relu_squared"])
def test_opcheck(activation, layout, banked, device):
    x, up, down = make((2, 5, 8), 6, activation, device=device)
    if layout != "contiguous":
        x, up, down = lay_out(layout, (x, up, down))
    banks = (torch.ones_like(up), torch.ones_like(down)) if banked else (None, None)
    leaves = [t.detach().requires_grad_() for t in (x, up, down)]
    torch.library.opcheck(torch.ops.pgolf.mlp, (*leaves, SLOT, activation, *banks))
    out, saved, signs = torch.ops.pgolf.mlp(x, up, down, SLOT, activation, None, None)
    args = (torch.randn_like(out), x, saved, signs, up, down, SLOT, activation, *banks)
    torch.library.opcheck(torch.ops.pgolf.mlp_backward, args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs = [t.requires_grad_() for t in make((2, 3, 4), 5, activation, torch.double)]
    torch.autograd.gradcheck(lambda *t: mlp(*t, SLOT, activation), inputs)


@pytest.mark.parametrize("banked", [False, True], ids=["dense", "banked"])
@pytest.mark.parametrize("activation", ["swiglu", "leaky_relu_squared"])
def test_compiles_without_graph_break(activation, banked, device):
    inputs = make((2, 5, 8), 6, activation, device=device)
    eager_banks = [torch.randn_like(t) for t in inputs[1:]] if banked else [None, None]
    compiled_banks = [t if t is None else t.clone() for t in eager_banks]
    before = [t if t is None else t.clone() for t in eager_banks]

    def run(x, up, down, grad_up, grad_down):
        return mlp(x, up, down, SLOT, activation, grad_up=grad_up, grad_down=grad_down).sin()

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
    with pytest.raises(ValueError, match=r"up_bank has 5 rows; swiglu needs an even number"):
        mlp(x, up, down[..., :2], 0, "swiglu")
    with pytest.raises(ValueError, match=r"x\.dtype is torch\.int64, but a floating-point type is needed"):
        mlp(x.long(), up.long(), down.long(), 0, "relu_squared")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays(activation):
    x, up, down = make((4, 6), 5, activation)
    x[1, 2] = torch.nan
    x.requires_grad_()
    out = mlp(x, up, down, SLOT, activation)
    (dx,) = torch.autograd.grad(out.sum(), x)
    for rows in (out, dx):
        assert rows.isnan().all(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_banks(activation, dtype, device):
    inputs = make((3, 5, 12), 10, activation, dtype, device)

    def op(x, up, down, grad_up, grad_down):
        return mlp(x, up, down, SLOT, activation, grad_up=grad_up, grad_down=grad_down)

    assert_adds_to_banks(op, inputs, banks=(1, 2), slots=((SLOT,), (SLOT,)))


def test_one_gradient_bank_is_not_enough():
    """With only one bank, both gradients go to autograd and the bank is unchanged."""
    x, up, down = (t.requires_grad_() for t in make((3, 8), 6, "swiglu"))
    grad_up = torch.ones_like(up)
    out = mlp(x, up, down, SLOT, "swiglu", grad_up=grad_up)
    grads = torch.autograd.grad(out.sum(), (up, down))
    assert all(g[SLOT].any() for g in grads)
    assert bool((grad_up == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_offsets_beyond_32_bits(activation):
    """The last rows of a batch whose hidden layer has more than 2^31 elements, 2,097,152 rows of 1,024."""
    x, up, down = make((2_097_152 + 300, 64), 1024, activation, torch.bfloat16, "cuda")
    dout = torch.randn_like(x)
    tail = slice(-200, None)
    outcomes = []
    for part in (slice(None), tail):
        leaf = x[part].clone().requires_grad_()
        out = mlp(leaf, up, down, SLOT, activation)
        (dx,) = torch.autograd.grad(out, leaf, dout[part])
        outcomes.append((out[tail].detach(), dx[tail]))
    torch.testing.assert_close(*outcomes, rtol=2e-2, atol=2e-2)
