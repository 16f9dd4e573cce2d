import math
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_matches_float64, assert_strides_do_not_matter, lay_out, results

from pgolf_fast.ops import native, reference, softcap_cross_entropy, tiles

HAS_KERNELS = True
# leading shape of x, width, vocabulary; interpreted tiles are 32 in each: (70,) has partial tiles in all
SHAPES = [((64,), 32, 128), ((3, 7), 17, 53), ((70,), 45, 75), ((1,), 8, 5), ((1, 1), 1, 1)]
SHAPES += [((0,), 8, 16), ((2, 0), 8, 16)]
CHUNK = 4096


def make(leading, dim, vocab, dtype=torch.float32, device="cpu", spread=4.0):
    x = torch.randn(*leading, dim, device=device)
    weight = torch.randn(vocab, dim, device=device) * spread * dim**-0.5
    return [x.to(dtype), weight.to(dtype), torch.randint(vocab, leading, device=device)]


def loss(softcap, z_loss=0.0):
    return lambda x, weight, targets: softcap_cross_entropy(x, weight, targets, softcap, z_loss)


def formula(softcap, z_loss=0.0):
    return lambda x, weight, targets: reference.softcap_cross_entropy(x, weight, targets, softcap, z_loss)


@pytest.mark.pairwise
@pytest.mark.parametrize("softcap", [30.0, 3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("leading", "dim", "vocab"), SHAPES, ids=str)
def test_matches_reference(leading, dim, vocab, dtype, softcap, device):
    inputs = make(leading, dim, vocab, dtype, device)
    assert_matches_float64(loss(softcap), formula(softcap), inputs)


@pytest.mark.pairwise
@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("leading", "dim", "vocab"), [SHAPES[0], SHAPES[2], SHAPES[5]], ids=str)
def test_z_loss_matches_reference(leading, dim, vocab, dtype, z_loss, device):
    inputs = make(leading, dim, vocab, dtype, device)
    assert_matches_float64(loss(15.0, z_loss), formula(15.0, z_loss), inputs)


def test_no_z_loss_changes_no_bit(device):
    """Without z-loss the gradient's added factor is exactly 1: training is unchanged."""
    inputs = make((70,), 45, 75, device=device)
    got, grads, douts = results(lambda x, w, t: softcap_cross_entropy(x, w, t, 15.0), inputs)
    same, same_grads, _ = results(loss(15.0, 0.0), inputs, douts)
    more, more_grads, _ = results(loss(15.0, 0.1), inputs, douts)
    for a, b, c in zip(got + grads, same + same_grads, more + more_grads, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def op_module():
    return sys.modules["pgolf_fast.ops.softcap_cross_entropy"]  # the package gives its name to the function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [32, 40, 80, 81, 110])
def test_more_rows_than_the_kernels_hold(rows, dtype, device, monkeypatch):
    """Backward with memory for 40 rows of the vocabulary: exactly full, one more, several times."""
    monkeypatch.setattr(op_module(), "_DLOGITS", 40 * 37 + 5)
    inputs = make((rows,), 8, 37, dtype, device)
    assert_matches_float64(loss(15.0), formula(15.0), inputs)


@pytest.mark.parametrize("softcap", [0.1, 10.0, 1e4])
def test_tanh_of_any_size(softcap, device):
    """Small and large gradients, each to float32 precision relative to itself."""
    raw = torch.logspace(-6, 2, 400, device=device)
    x, weight = torch.stack((raw, -raw)).reshape(-1, 1), torch.tensor([[1.0], [0.0]], device=device)
    targets = torch.zeros(len(x), dtype=torch.long, device=device)
    ones = [torch.ones(len(x), device=device)]
    _, (dx, _), _ = results(loss(softcap), (x, weight, targets), ones)
    _, (want, _), _ = results(formula(softcap), (x.double(), weight.double(), targets), ones)
    seen = want.abs() > 1e-3  # below, softmax - 1 cancels
    torch.testing.assert_close(dx.double()[seen], want[seen], rtol=3e-4, atol=0)


def test_tanh_in_kernels(device):
    """The kernels' own tanh and its derivative against float64, from denormal to saturated arguments."""
    if not tiles.uses_kernels("softcap_cross_entropy", torch.empty(0, device=device)):
        pytest.skip("no kernels on this device")
    values = torch.logspace(-38, 3, 2000, device=device)
    z = torch.cat(
        (values, -values, torch.linspace(-1, 1, 1001, device=device), torch.zeros(1, device=device))
    )
    tanh, slope = torch.empty_like(z), torch.empty_like(z)
    tanh_kernel()[(1,)](z, tanh, slope, len(z), BLOCK=8192)
    torch.testing.assert_close(tanh.double(), z.double().tanh(), rtol=6e-7, atol=0)
    torch.testing.assert_close(slope.double(), 1 / z.double().cosh().square(), rtol=1e-5, atol=1e-30)


def tanh_kernel():
    import triton
    import triton.language as tl
    from pgolf_fast.kernels.softcap_cross_entropy import _tanh

    globals().update(tl=tl, _tanh=_tanh)

    @triton.jit
    def kernel(z_ptr, tanh_ptr, slope_ptr, n, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        tanh, slope = _tanh(tl.load(z_ptr + index, mask=index < n, other=0.0))
        tl.store(tanh_ptr + index, tanh, mask=index < n)
        tl.store(slope_ptr + index, slope, mask=index < n)

    return kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_more_rows_than_a_chunk(rows, dtype, device):
    if device == "cpu" and tiles.uses_kernels("softcap_cross_entropy", torch.empty(0)):
        pytest.skip("PyTorch's chunks; the kernels' own are tested above")
    inputs = make((rows,), 8, 11, dtype, device)
    assert_matches_float64(loss(15.0), formula(15.0), inputs)


@pytest.mark.parametrize("softcap", [30.0, 79.0, 80.0, 500.0])
def test_saturated_logits(softcap, device):
    """Raw logits far beyond the cap: finite losses up to 2 * softcap, and no overflow of exp."""
    x, weight, targets = make((40,), 16, 24, device=device, spread=1.0)
    inputs = (1e4 * x, weight, targets)
    got, grads, _ = results(loss(softcap), inputs)
    exact = formula(softcap)(*(t.double() if t.is_floating_point() else t for t in inputs))
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-5, atol=1e-6 * softcap)
    assert got[0].max() > softcap
    assert got[0].min() >= 0
    assert all(torch.isfinite(g).all() for g in grads)


def test_loss_of_no_knowledge(device):
    losses = softcap_cross_entropy(
        torch.randn(5, 4, device=device),
        torch.zeros(37, 4, device=device),
        torch.arange(5, device=device),
        30.0,
    )
    torch.testing.assert_close(losses, torch.full((5,), math.log(37), device=device))


@pytest.mark.parametrize("kept", [False, True], ids=["again", "kept"])
def test_never_holds_all_logits(kept, monkeypatch):
    """More than `_KEPT` logits are computed a chunk at a time; scoring never holds more."""
    x, weight, targets = make((3 * CHUNK,), 16, 256)
    chunk, total = 4 * CHUNK * 256, 4 * targets.numel() * 256
    monkeypatch.setattr(op_module(), "_KEPT", targets.numel() * 256 - (not kept))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        softcap_cross_entropy(*leaves, targets, 30.0)
    assert chunk <= largest_allocation(profile) <= 2 * chunk
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(softcap_cross_entropy(*leaves, targets, 30.0).sum(), leaves)
    if kept and native.passes("softcap_cross_entropy", x):
        assert largest_allocation(profile) == total
    else:
        assert chunk <= largest_allocation(profile) <= 2 * chunk


def test_kernels_hold_few_dlogits(device, monkeypatch):
    """Forward allocates losses only, backward at most its limit."""
    x, weight, targets = make((300,), 16, 256, device=device)
    if not tiles.uses_kernels("softcap_cross_entropy", x):
        pytest.skip("no kernels on this device")
    monkeypatch.setattr(op_module(), "_DLOGITS", 64 * 256)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.profiler.profile(profile_memory=True) as profile:
        losses = softcap_cross_entropy(*leaves, targets, 30.0)
    assert largest_allocation(profile) <= 4 * 512  # PyTorch rounds up on a GPU
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(losses.sum(), leaves)
    assert largest_allocation(profile) == 4 * 64 * 256


def largest_allocation(profile):
    return max(max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in profile.events())


@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, target_dtype, device):
    x, weight, targets = make((3, 7), 12, 20, device=device)
    inputs = lay_out(layout, (x, weight, targets.to(target_dtype)))
    assert not any(t.is_contiguous() for t in inputs)
    assert_strides_do_not_matter(loss(5.0), inputs)


def test_rows_apart(device):
    """Strided targets and incoming gradients, which the public function would flatten."""
    x, weight, _ = make((70,), 45, 75, device=device)
    targets, dloss = torch.randint(75, (140,), device=device)[::2], torch.randn(210, device=device)[::3]
    op, backward = torch.ops.pgolf.softcap_cross_entropy, torch.ops.pgolf.softcap_cross_entropy_backward
    losses, logsumexp, none = op(x, weight, targets, 30.0)
    assert torch.equal(losses, op(x, weight, targets.contiguous(), 30.0)[0])
    got = backward(dloss, x, weight, targets, logsumexp, none, 30.0, 0.0)
    want = backward(dloss.contiguous(), x, weight, targets.contiguous(), logsumexp, none, 30.0, 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [30.0, 100.0])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout, softcap, device):
    x, weight, targets = make((9,), 6, 10, device=device)
    if layout != "contiguous":
        x, weight, targets = lay_out(layout, (x, weight, targets))
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    z_loss = 0.1
    torch.library.opcheck(torch.ops.pgolf.softcap_cross_entropy, (*leaves, targets, softcap, z_loss))
    losses, logsumexp, none = torch.ops.pgolf.softcap_cross_entropy(x, weight, targets, softcap, z_loss)
    backward = (torch.randn_like(losses), x, weight, targets, logsumexp, none, softcap, z_loss)
    torch.library.opcheck(torch.ops.pgolf.softcap_cross_entropy_backward, backward)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [2.0, 90.0])
def test_gradcheck(softcap, z_loss):
    x, weight, targets = make((2, 3), 4, 5, torch.double)
    torch.autograd.gradcheck(
        lambda a, b: softcap_cross_entropy(a, b, targets, softcap, z_loss),
        (x.requires_grad_(), weight.requires_grad_()),
    )


def test_compiles_without_graph_break(device):
    def run(x, weight, targets):
        return softcap_cross_entropy(x.sin(), weight, targets, 30.0, 0.1).mean()

    inputs = make((3, 7), 12, 20, device=device)
    want, wants, douts = results(run, inputs)
    got, grads, _ = results(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs, douts)
    torch.testing.assert_close((got, grads), (want, wants))


def test_rejects_bad_input():
    x, weight, targets = make((4,), 6, 9)
    with pytest.raises(ValueError, match=r"softcap_cross_entropy: targets\.shape is \(3,\), but \(4,\)"):
        softcap_cross_entropy(x, weight, targets[:3], 30.0)
    with pytest.raises(ValueError, match=r"weight\.shape is \(9, 5\), but \(any, 6\) is needed"):
        softcap_cross_entropy(x, weight[:, :5], targets, 30.0)
    with pytest.raises(ValueError, match=r"weight\.dtype is torch\.float16, but x\.dtype is torch\.float32"):
        softcap_cross_entropy(x, weight.half(), targets, 30.0)
    with pytest.raises(ValueError, match=r"targets\.dtype is torch\.float32; it must be an integer type"):
        softcap_cross_entropy(x, weight, targets.float(), 30.0)
    with pytest.raises(ValueError, match=r"targets\.dtype is torch\.complex64; it must be an integer type"):
        softcap_cross_entropy(x, weight, targets.to(torch.complex64), 30.0)
    with pytest.raises(ValueError, match=r"weight\.device is meta, but x\.device is cpu"):
        softcap_cross_entropy(x, weight.to("meta"), targets, 30.0)
    with pytest.raises(ValueError, match=r"targets\.device is meta, but x\.device is cpu"):
        softcap_cross_entropy(x, weight, targets.to("meta"), 30.0)
    for softcap in (0.0, -1.0, math.nan, math.inf, 1e300):
        with pytest.raises(ValueError, match=r"softcap is .*; it must be positive"):
            softcap_cross_entropy(x, weight, targets, softcap)
    for z_loss in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"z_loss is .*; it must not be negative"):
            softcap_cross_entropy(x, weight, targets, 30.0, z_loss)


@pytest.mark.parametrize("wrong", [-1, 9, -100, 2**31 - 1])
def test_rejects_targets_outside_the_vocabulary(wrong, device):
    """Kernels do not check, which would synchronize: the loss and gradient of that row are NaN."""
    x, weight, targets = make((4,), 6, 9, device=device)
    (want,), (want_dx, _), douts = results(loss(30.0), (x, weight, targets))
    targets[2] = wrong
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"targets hold {wrong}, but the vocabulary has ids 0 to 8"):
            softcap_cross_entropy(x, weight, targets, 30.0)
        if not tiles.uses_kernels("softcap_cross_entropy", x):
            return
    got, logsumexp = op_module()._forward_cuda(x, weight, targets, 30.0, 0.0)
    dx, dweight = op_module()._backward_cuda(douts[0], x, weight, targets, logsumexp, 30.0, 0.0)
    others = torch.tensor([0, 1, 3], device=device)
    assert got[2].isnan()
    assert dx[2].isnan().all()
    assert dweight.isnan().all()
    assert torch.equal(got[others], want[others])
    assert torch.equal(dx[others], want_dx[others])


def test_is_pytorchs_cross_entropy_without_a_cap(device):
    x, weight, targets = make((30,), 6, 9, device=device)
    torch.testing.assert_close(
        softcap_cross_entropy(x, weight, targets, 1e6),
        F.cross_entropy(x @ weight.T, targets, reduction="none"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "dim", "vocab"), [(2048, 512, 1024), (1001, 515, 1023), (130, 64, 5000)])
def test_real_tiles_on_a_gpu(rows, dim, vocab, dtype):
    assert_matches_float64(loss(30.0), formula(30.0), make((rows,), dim, vocab, dtype, "cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """The last rows have offsets that exceed 32 bits."""
    x, weight, targets = make((2**31 // 512 + 1000,), 512, 256, torch.bfloat16, "cuda")
    (losses,), (dx, _), (dout,) = results(loss(30.0), (x, weight, targets))
    last = (x[-1000:], weight, targets[-1000:])
    (want,), (want_dx, _), _ = results(loss(30.0), last, [dout[-1000:]])
    torch.testing.assert_close(losses[-1000:], want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx[-1000:], want_dx, rtol=1e-2, atol=1e-6)
