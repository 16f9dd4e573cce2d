"""pgolf::muon_momentum, pgolf::muon_apply: in place, against formulas in float64."""

import math

import pytest
import torch
from helpers import assert_as_accurate, lay_out

from pgolf_fast.ops import muon_update, tiles
from pgolf_fast.ops.muon_update import muon_apply, muon_momentum
from pgolf_fast.optim.muon import Muon

HAS_KERNELS = True
SHAPES = [(2, 32, 32), (3, 7, 53), (1, 1, 1), (5,), (0, 4), (2, 0, 3)]
LR, MOMENTUM, DECAY, SCALE = 0.025, 0.95, 0.04, math.sqrt(3)


def momentum_formula(grad, buffer, momentum):
    buffer = momentum * buffer + grad
    return buffer, grad + momentum * buffer


def apply_formula(master, update, lr, weight_decay, scale):
    return (1 - lr * weight_decay) * master - lr * scale * update


def make(shape, device, buffer_dtype=torch.bfloat16, grad_dtype=torch.float32):
    grad, buffer = torch.randn(shape, device=device), torch.randn(shape, device=device)
    return grad.to(grad_dtype), buffer.to(buffer_dtype)


def judge(got, low, exact):
    rounding = torch.finfo(got.dtype).eps * (exact.abs().max().item() if exact.numel() else 0)
    assert_as_accurate(got, low, exact, atol=1e-6 + rounding)


@pytest.mark.pairwise
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_momentum_matches_formula(shape, dtype, grad_dtype, device):
    grad, buffer = make(shape, device, dtype, grad_dtype)
    rounded = grad.to(dtype)
    low = momentum_formula(rounded, buffer.clone(), MOMENTUM)
    exact = momentum_formula(rounded.double(), buffer.double(), MOMENTUM)
    before = grad.clone()
    update = muon_momentum(grad, buffer, MOMENTUM)
    assert (update.dtype, buffer.dtype) == (dtype, dtype)
    assert update.is_contiguous()
    assert torch.equal(grad, before), "the gradient was changed"
    judge(buffer, low[0], exact[0])
    judge(update, low[1], exact[1])


@pytest.mark.pairwise
@pytest.mark.parametrize("shadow_dtype", [None, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apply_matches_formula(shape, dtype, shadow_dtype, device):
    update, master = make(shape, device, dtype, torch.bfloat16)
    shadow = None if shadow_dtype is None else torch.full(shape, 7.0, dtype=shadow_dtype, device=device)
    low = apply_formula(master.clone(), update.to(dtype), LR, DECAY, SCALE)
    exact = apply_formula(master.double(), update.double(), LR, DECAY, SCALE)
    before = update.clone()
    muon_apply(master, update, LR, weight_decay=DECAY, scale=SCALE, shadow=shadow)
    assert torch.equal(update, before), "the update was changed"
    judge(master, low, exact)
    if shadow is not None:
        assert torch.equal(shadow, master.to(shadow_dtype))


def test_cpu_path_is_the_arithmetic_of_pr_1501():
    """Bitwise the arithmetic of PR 1501."""
    grad, buffer = make((3, 40, 24), "cpu")
    master, old_buffer = torch.randn(3, 40, 24), buffer.clone()
    old_master, low = master.clone(), grad.bfloat16()
    old_buffer.mul_(MOMENTUM).add_(low)
    want = low.add_(old_buffer, alpha=MOMENTUM)
    update = muon_momentum(grad, buffer, MOMENTUM)
    assert torch.equal(update, want)
    assert torch.equal(buffer, old_buffer)
    old_master.mul_(1 - LR * DECAY)
    old_master.add_(want.to(torch.float32), alpha=-LR * SCALE)
    muon_apply(master, update, LR, weight_decay=DECAY, scale=SCALE)
    assert torch.equal(master, old_master)


def test_rounds_gradient_product_and_sum_to_the_buffers_dtype(device):
    """Bitwise: products with 0.75 are exact in float32, so only the intended roundings remain."""
    grad, buffer = make((3, 40, 24), device)
    if not tiles.uses_kernels("muon", buffer):
        pytest.skip("PyTorch's path is compared with eager above")
    low = grad.bfloat16().float()
    new = ((buffer.float() * 0.75).bfloat16().float() + low).bfloat16()
    assert torch.equal(muon_momentum(grad, buffer, 0.75), (low + new.float() * 0.75).bfloat16())
    assert torch.equal(buffer, new)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_numbers_may_be_tensors(shape, device):
    """The kernel reads the tensor; the result is that of the same number."""
    grad, buffer = make((2, 9, 11), device)
    master, again, other = torch.randn(2, 9, 11, device=device), buffer.clone(), buffer.clone()
    twin = master.clone()
    number = torch.full(shape, 0.75, device=device)  # exact in every dtype
    update = muon_momentum(grad, buffer, 0.75)
    assert torch.equal(muon_momentum(grad, again, number), update)
    assert torch.equal(again, buffer)
    number.fill_(0.5)
    assert not torch.equal(muon_momentum(grad, other, number), update)
    muon_apply(master, update, 0.5, weight_decay=DECAY, scale=SCALE)
    muon_apply(twin, update, number, weight_decay=DECAY, scale=SCALE)
    torch.testing.assert_close(twin, master, rtol=2e-7, atol=0)


def test_numbers_that_must_not_be_read():
    """PyTorch's path on a GPU, with the learning rate in a tensor on it."""
    grad, buffer = make((3, 40, 24), "cpu")
    low, master = grad.bfloat16(), torch.randn(3, 40, 24)
    exact = momentum_formula(low.double(), buffer.double(), MOMENTUM)
    eager = momentum_formula(low, buffer.clone(), MOMENTUM)
    update = muon_update._momentum_unread(low, buffer, torch.tensor(MOMENTUM))
    judge(buffer, eager[0], exact[0])
    judge(update, eager[1], exact[1])
    exact = apply_formula(master.double(), update.double(), LR, DECAY, SCALE)
    eager = apply_formula(master.clone(), update.float(), LR, DECAY, SCALE)
    muon_update._apply_unread(master, update, torch.tensor(LR), DECAY, SCALE)
    judge(master, eager, exact)


@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_strided_inputs(layout, device):
    plain = [torch.randn(3, 7, 12, device=device) for _ in range(5)]
    plain[1] = plain[1].bfloat16()
    strided = lay_out(layout, plain)
    assert not any(t.is_contiguous() for t in strided)
    outcomes = []
    for grad, buffer, master, other, shadow in (plain, strided):
        update = muon_momentum(grad, buffer, MOMENTUM)
        assert update.is_contiguous()
        muon_apply(master, other, LR, weight_decay=DECAY, scale=SCALE, shadow=shadow)
        outcomes.append([t.contiguous() for t in (update, buffer, master, shadow)])
    # PyTorch rounds bfloat16 once more where it does not vectorize
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0.016, atol=0.02)
    (grad,) = lay_out("expanded", [torch.randn(3, 7, 12, device=device)])
    again = outcomes[0][1].clone()
    assert torch.equal(muon_momentum(grad, outcomes[0][1], 0.5), muon_momentum(grad.contiguous(), again, 0.5))


def test_nothing_around_a_slice_is_touched(device):
    around = torch.full((4, 50), 3.0, device=device)
    master = around[1:3, 5:40]
    muon_apply(master, torch.ones(2, 35, device=device), LR, weight_decay=0.0, scale=1.0)
    assert int((around != 3.0).sum()) == 70


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout, device):
    grad, buffer = make((2, 5, 8), device)
    master, update, shadow = (torch.randn(2, 5, 8, device=device) for _ in range(3))
    if layout != "contiguous":
        grad, buffer, master, update, shadow = lay_out(layout, [grad, buffer, master, update, shadow])
    share = torch.tensor(0.9, device=device)
    torch.library.opcheck(torch.ops.pgolf.muon_momentum, (grad, buffer, share))
    for given in (None, shadow):
        torch.library.opcheck(torch.ops.pgolf.muon_apply, (master, update, given, share, DECAY, SCALE))


def test_compiles_without_graph_break(device):
    def run(grad, buffer, master, shadow, lr, momentum):
        update = muon_momentum(grad * 2, buffer, momentum)
        muon_apply(master, update.cos(), lr, weight_decay=DECAY, scale=SCALE, shadow=shadow)
        return master + 1

    grad, buffer = make((2, 5, 8), device)
    start = [grad, buffer, torch.randn(2, 5, 8, device=device), torch.zeros(2, 5, 8, device=device)]
    numbers = [torch.tensor(0.1, device=device), torch.tensor(0.9, device=device)]
    want, got = ([t.clone() for t in start] for _ in range(2))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*got, *numbers), run(*want, *numbers))
    torch.testing.assert_close(got, want)
    assert not torch.equal(got[2], start[2])


def test_changes_count_as_versions(device):
    """The model refreshes its compute-dtype banks when a version counter has changed."""
    grad, buffer = make((2, 5, 8), device)
    master = torch.nn.Parameter(torch.randn(2, 5, 8, device=device))
    before = (buffer._version, master._version)
    with torch.no_grad():
        muon_apply(master, muon_momentum(grad, buffer, 0.5), LR, weight_decay=DECAY, scale=SCALE)
    assert buffer._version > before[0]
    assert master._version > before[1]


def test_optimizer_takes_tensors_and_fills_shadows(device):
    """A step with numbers in tensors is the same step, and writes the new weights to the shadow banks."""
    start, grads = torch.randn(2, 9, 7, device=device), torch.randn(2, 2, 9, 7, device=device)
    banks = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    muons = [Muon({"b": bank}, weight_decay=0.5, newton_schulz_steps=2) for bank in banks]
    shadow = torch.zeros(2, 9, 7, dtype=torch.bfloat16, device=device)
    lr, momentum = torch.tensor(0.25, device=device), torch.tensor([0.5], device=device)
    for grad in grads:
        for bank in banks:
            bank.grad = grad.clone()
        muons[0].step(lr=0.25, momentum=0.5)
        muons[1].step(lr=lr, momentum=momentum, shadows={"b": shadow})
        torch.testing.assert_close(banks[1], banks[0], rtol=2e-7, atol=0)
        assert torch.equal(shadow, banks[1].bfloat16())
        assert torch.equal(bank.grad, grad), "the gradient was changed"
    assert not torch.equal(banks[0], start)


def test_rejects_bad_input(device):
    grad, buffer = make((2, 5, 8), device)
    with pytest.raises(ValueError, match=r"muon_momentum: grad\.shape is \(2, 5, 7\), but \(2, 5, 8\) is"):
        muon_momentum(grad[..., :7], buffer, 0.9)
    with pytest.raises(ValueError, match=r"muon_momentum: buffer\.dtype is torch\.int8, but a floating"):
        muon_momentum(grad, buffer.to(torch.int8), 0.9)
    with pytest.raises(ValueError, match=r"muon_momentum: momentum has 2 elements, but one is needed"):
        muon_momentum(grad, buffer, torch.ones(2))
    with pytest.raises(ValueError, match=r"muon_momentum: grad\.device is meta, but buffer\.device is"):
        muon_momentum(grad.to("meta"), buffer, 0.9)
    with pytest.raises(ValueError, match=r"muon_momentum: momentum\.device is meta, but buffer\.device is"):
        muon_momentum(grad, buffer, torch.ones((), device="meta"))
    with pytest.raises(ValueError, match=r"muon_apply: update\.shape is \(2, 5\), but \(2, 5, 8\) is needed"):
        muon_apply(grad, buffer[..., 0], LR, weight_decay=0.0, scale=1.0)
    with pytest.raises(ValueError, match=r"muon_apply: shadow\.shape is \(5, 8\), but \(2, 5, 8\) is needed"):
        muon_apply(grad, buffer, LR, weight_decay=0.0, scale=1.0, shadow=grad[0])
    with pytest.raises(ValueError, match=r"muon_apply: lr\.dtype is torch\.int64, but a floating"):
        muon_apply(grad, buffer, torch.tensor(1, device=device), weight_decay=0.0, scale=1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_two_to_the_31_elements_on_a_gpu():
    n = 2**31 + 1000
    master = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    update = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    assert tiles.uses_kernels("muon", master)
    muon_apply(master, update, 0.5, weight_decay=0.0, scale=1.0)
    assert bool((master == -0.5).all())
    out = muon_momentum(update, master, 0.5)
    assert bool((master == 0.75).all())
    assert bool((out == 1.375).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graph_replays_with_new_numbers():
    grad, buffer = make((2, 64, 64), "cuda")
    master, number = torch.randn(2, 64, 64, device="cuda"), torch.tensor(0.5, device="cuda")

    def step():
        update = muon_momentum(grad, buffer, number)
        muon_apply(master, update, number, weight_decay=DECAY, scale=SCALE)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    twins = [t.clone() for t in (buffer, master)]
    number.fill_(0.25)
    graph.replay()
    update = muon_momentum(grad, twins[0], 0.25)
    muon_apply(twins[1], update, 0.25, weight_decay=DECAY, scale=SCALE)
    torch.testing.assert_close([buffer, master], twins)
