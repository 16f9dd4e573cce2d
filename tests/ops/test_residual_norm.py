import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_matches_float64, assert_strides_do_not_matter, lay_out, results

from pgolf_fast.ops import cases, reference, residual_norm, rms_norm, smear_gate, tiles
from pgolf_fast.ops.case import Sizes

HAS_KERNELS = True
# interpreted tiles are 32 x 32: wider rows take the kernels' other path; (3, 25, 45) has partial tiles
SHAPES = [(2, 8, 64), (3, 25, 45), (3, 5, 27), (1, 40), (2, 1, 7), (1, 1, 1), (0, 8), (2, 0, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER_SCALE = 0.5773


def make(shape, dtype=torch.float32, device="cpu", scaled=True):
    """x and branch; the two scales in float32, as in the network."""
    x, branch = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x_scale, branch_scale = (torch.randn(shape[-1], device=device) for _ in range(2))
    return [x, branch, x_scale if scaled else None, branch_scale]


def norm(*inputs):
    return residual_norm(*inputs, LAYER_SCALE)


def norm_formula(*inputs):
    return reference.residual_norm(*inputs, LAYER_SCALE)


def make_smear(shape, dtype=torch.float32, device="cpu"):
    return [t.detach() for t in cases.make("smear_gate", Sizes(*shape), dtype, device).inputs.values()]


def residual_norm_module():
    import sys

    return sys.modules["pgolf_fast.ops.residual_norm"]  # the package gives its name to the function


@pytest.mark.pairwise
@pytest.mark.parametrize("scaled", [False, True], ids=["x", "scaled x"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, scaled, device):
    assert_matches_float64(norm, norm_formula, make(shape, dtype, device, scaled))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 3], ids=str)
def test_smear_matches_reference(shape, dtype, device):
    assert_matches_float64(smear_gate, reference.smear_gate, make_smear(shape, dtype, device))


@pytest.mark.parametrize("width", [20, 45, 64])
@pytest.mark.parametrize("programs", [1, 2])
def test_programs_that_walk_through_rows(programs, width, device, monkeypatch):
    """Per-channel gradients from several tiles per program, the last partly or wholly empty."""
    monkeypatch.setattr(residual_norm_module(), "_PROGRAMS", programs)
    shape = (3, 47, width)
    for scaled in (False, True):
        assert_matches_float64(norm, norm_formula, make(shape, device=device, scaled=scaled))
    assert_matches_float64(smear_gate, reference.smear_gate, make_smear(shape, device=device))


@pytest.mark.parametrize("width", [27, 45])
def test_norm_is_of_the_rounded_sum(width, device):
    """`normed` is the norm of `mixed` as stored, not of the sum before rounding."""
    inputs = make((50, width), torch.bfloat16, device)
    mixed, normed = norm(*inputs)
    want = (LAYER_SCALE * F.rms_norm(mixed.float(), (width,), eps=reference.RMS_EPS)).bfloat16()
    assert (normed != want).float().mean() < 0.01


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_matches_pytorch(size, device):
    """F.rms_norm is another definition; near sqrt(eps) the epsilon shows."""
    x, branch, x_scale, branch_scale = make((4, 33), device=device)
    x, branch = size * x, size * branch
    mixed, normed = norm(x, branch, x_scale, branch_scale)
    want = x_scale * x + branch_scale * branch
    torch.testing.assert_close(mixed, want)
    torch.testing.assert_close(normed, LAYER_SCALE * F.rms_norm(want, (33,)))
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (33,)))


def test_zero_rows_are_safe(device):
    x, branch, x_scale, branch_scale = make((2, 8), device=device)
    inputs = (torch.zeros_like(x), torch.zeros_like(branch), x_scale, branch_scale)
    outs, grads, _ = results(norm, inputs)
    assert not any(o.any() for o in outs)
    assert all(torch.isfinite(g).all() for g in grads)


def test_gradient_of_one_output(device):
    """If only one of the two results reaches the loss, the other's gradient is zero."""
    inputs = make((3, 8), device=device)
    for index in range(2):
        got = results(lambda *t, i=index: norm(*t)[i], inputs, [torch.ones(3, 8, device=device)])
        want = results(lambda *t, i=index: norm_formula(*t)[i], inputs, [torch.ones(3, 8, device=device)])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scaled", [False, True], ids=["x", "scaled x"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, scaled, device):
    inputs = lay_out(layout, make((3, 5, 12), device=device, scaled=scaled))
    if scaled:
        inputs[2] = LAYOUTS["transposed"](inputs[2][None].expand(3, 12).contiguous(), 1)[0]
    assert not inputs[0].is_contiguous()
    assert not inputs[1].is_contiguous()
    assert_strides_do_not_matter(norm, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_matches_reference(shape, dtype, device):
    assert_matches_float64(rms_norm, reference.rms_norm, make(shape, dtype, device)[:1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rms_norm_strided_inputs(layout, device):
    assert_strides_do_not_matter(rms_norm, lay_out(layout, make((3, 5, 12), device=device)[:1]))


def test_rms_norm_opcheck():
    for x in (torch.randn(2, 5, 8), torch.randn(2, 5, 8).mT):
        torch.library.opcheck(torch.ops.pgolf.rms_norm, (x.detach().requires_grad_(),))
        normed, rstd = torch.ops.pgolf.rms_norm(x)
        torch.library.opcheck(torch.ops.pgolf.rms_norm_backward, (torch.randn_like(normed), x, rstd))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_smear_strided_inputs(layout, device):
    assert_strides_do_not_matter(smear_gate, lay_out(layout, make_smear((3, 5, 12), device=device)))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("scaled", [False, True], ids=["x", "scaled x"])
def test_opcheck(scaled, layout, device):
    inputs = make((2, 5, 8), device=device, scaled=scaled)
    if layout != "contiguous":
        inputs = lay_out(layout, inputs)
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.pgolf.residual_norm, (*leaves, LAYER_SCALE))
    mixed, normed, rstd = torch.ops.pgolf.residual_norm(*inputs, LAYER_SCALE)
    douts = (torch.randn_like(mixed), torch.randn_like(normed))
    torch.library.opcheck(torch.ops.pgolf.residual_norm_backward, (*douts, *inputs, mixed, rstd, LAYER_SCALE))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_smear_opcheck(layout, device):
    inputs = make_smear((2, 5, 8), device=device)
    if layout != "contiguous":
        inputs = lay_out(layout, inputs)
    torch.library.opcheck(torch.ops.pgolf.smear_gate, [t.detach().requires_grad_() for t in inputs])
    torch.library.opcheck(torch.ops.pgolf.smear_gate_backward, (torch.randn_like(inputs[0]), *inputs))


@pytest.mark.parametrize("scaled", [False, True], ids=["x", "scaled x"])
def test_gradcheck(scaled):
    inputs = [t if t is None else t.double().requires_grad_() for t in make((2, 3, 4), scaled=scaled)]
    torch.autograd.gradcheck(norm, inputs)
    torch.autograd.gradcheck(rms_norm, inputs[:1])


def test_smear_gradcheck():
    torch.autograd.gradcheck(smear_gate, [t.double().requires_grad_() for t in make_smear((2, 3, 4))])


def test_compiles_without_graph_break(device):
    def run(x, branch, x_scale, branch_scale, gate):
        mixed, normed = norm(x, branch, x_scale, branch_scale)
        return rms_norm(smear_gate(mixed.sin() + normed, gate))

    inputs = [*make((2, 5, 8), device=device), torch.randn(8, device=device)]
    want, wants, douts = results(run, inputs)
    got, grads, _ = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, douts)
    torch.testing.assert_close((got, grads), (want, wants))


def test_rejects_bad_input():
    x, branch, x_scale, branch_scale = make((4, 6))
    with pytest.raises(ValueError, match=r"residual_norm: branch\.shape is \(4, 5\), but \(4, 6\) is needed"):
        norm(x, branch[:, :5], x_scale, branch_scale)
    with pytest.raises(ValueError, match=r"branch\.dtype is torch\.float16, but x\.dtype is torch\.float32"):
        norm(x, branch.half(), x_scale, branch_scale)
    with pytest.raises(ValueError, match=r"x_scale\.shape is \(5,\), but \(6,\) is needed"):
        norm(x, branch, x_scale[:5], branch_scale)
    with pytest.raises(ValueError, match=r"branch_scale\.shape is \(1,\), but \(6,\) is needed"):
        norm(x, branch, None, branch_scale[:1])
    with pytest.raises(ValueError, match=r"x_scale\.device is meta, but x\.device is cpu"):
        norm(x, branch, x_scale.to("meta"), branch_scale)
    with pytest.raises(ValueError, match=r"branch\.device is meta, but x\.device is cpu"):
        norm(x, branch.to("meta"), x_scale, branch_scale)
    for op in (rms_norm, lambda t: smear_gate(t[None], x_scale), lambda t: norm(t, t, None, branch_scale)):
        with pytest.raises(
            ValueError, match=r"x\.dtype is torch\.int64, but a floating-point type is needed"
        ):
            op(x.long())
    with pytest.raises(ValueError, match=r"smear_gate: gate\.device is meta, but x\.device is cpu"):
        smear_gate(x[None], x_scale.to("meta"))
    with pytest.raises(ValueError, match=r"smear_gate: x\.shape is \(4, 6\), but \(any, any, any\)"):
        smear_gate(x, x_scale)
    with pytest.raises(ValueError, match=r"smear_gate: gate\.shape is \(5,\), but \(6,\)"):
        smear_gate(x[None], x_scale[:5])


def test_smear_is_causal(device):
    """Position t depends on t and t - 1; the first position on itself and zero."""
    x, gate = make_smear((2, 6, 4), device=device)
    s = torch.sigmoid(gate)
    want = smear_gate(x, gate)
    torch.testing.assert_close(want[:, 0], (1 - s) * x[:, 0])
    for position in range(6):
        changed = x.clone()
        changed[0, position] += 1
        touched = (smear_gate(changed, gate) != want).any(-1)
        assert touched.nonzero().tolist() == [[0, p] for p in range(position, min(position + 2, 6))]


def test_smear_stays_within_sequences(device):
    """Sequences that start and end inside a tile of rows do not mix with their neighbors."""
    x, gate = make_smear((5, 13, 4), device=device)
    whole = results(smear_gate, (x, gate))
    for i in range(5):
        alone = results(smear_gate, (x[i : i + 1], gate), [whole[2][0][i : i + 1]])
        assert torch.equal(whole[0][0][i : i + 1], alone[0][0])
        assert torch.equal(whole[1][0][i : i + 1], alone[1][0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2048, 512), (3, 1001, 511), (2, 5, 5000), (70, 1, 8)], ids=str)
def test_real_tiles_on_a_gpu(shape, dtype):
    for scaled in (False, True):
        assert_matches_float64(norm, norm_formula, make(shape, dtype, "cuda", scaled))
    assert_matches_float64(smear_gate, reference.smear_gate, make_smear(shape, dtype, "cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """The last rows have offsets that exceed 32 bits."""
    x = torch.randn(2**31 // (512 * 1024) + 2, 1024, 512, device="cuda", dtype=torch.bfloat16)
    scale = torch.randn(512, device="cuda")
    assert tiles.uses_kernels("residual_norm", x)
    for op in (lambda t: norm(t, t, scale, scale)[1], lambda t: smear_gate(t, scale)):
        got, (grad,), (dout,) = results(op, (x,))
        want, (want_grad,), _ = results(op, (x[-2:],), [dout[-2:]])
        torch.testing.assert_close(got[0][-2:], want[0], rtol=0, atol=0)
        torch.testing.assert_close(grad[-2:], want_grad, rtol=0, atol=0)
