import math

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_matches_float64, assert_strides_do_not_matter, lay_out, results

from pgolf_fast.ops import reference, softcap_cross_entropy

# leading shape of x, width, vocabulary
SHAPES = [((64,), 32, 128), ((3, 7), 17, 53), ((1,), 8, 5), ((1, 1), 1, 1), ((0,), 8, 16), ((2, 0), 8, 16)]
CHUNK = 4096


def make(leading, dim, vocab, dtype=torch.float32, device="cpu", spread=4.0):
    x = torch.randn(*leading, dim, device=device)
    weight = torch.randn(vocab, dim, device=device) * spread * dim**-0.5
    return [x.to(dtype), weight.to(dtype), torch.randint(vocab, leading, device=device)]


def loss(softcap):
    return lambda x, weight, targets: softcap_cross_entropy(x, weight, targets, softcap)


def formula(softcap):
    def run(x, weight, targets):
        flat = reference.softcap_cross_entropy(x.flatten(0, -2), weight, targets.flatten(), softcap)
        return flat.view(targets.shape)

    return run


@pytest.mark.parametrize("softcap", [30.0, 3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("leading", "dim", "vocab"), SHAPES, ids=str)
def test_matches_reference(leading, dim, vocab, dtype, softcap, device):
    inputs = make(leading, dim, vocab, dtype, device)
    assert_matches_float64(loss(softcap), formula(softcap), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_more_rows_than_a_chunk(rows, dtype, device):
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


def test_never_holds_all_logits():
    x, weight, targets = make((3 * CHUNK,), 16, 256)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        torch.autograd.grad(softcap_cross_entropy(*leaves, targets, 30.0).sum(), leaves)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * CHUNK * 256 <= largest <= 2 * 4 * CHUNK * 256


@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, target_dtype, device):
    x, weight, targets = make((3, 7), 12, 20, device=device)
    inputs = lay_out(layout, (x, weight, targets.to(target_dtype)))
    assert not any(t.is_contiguous() for t in inputs)
    assert_strides_do_not_matter(loss(5.0), inputs)


@pytest.mark.parametrize("softcap", [30.0, 100.0])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout, softcap, device):
    x, weight, targets = make((9,), 6, 10, device=device)
    if layout != "contiguous":
        x, weight, targets = lay_out(layout, (x, weight, targets))
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    torch.library.opcheck(torch.ops.pgolf.softcap_cross_entropy, (*leaves, targets, softcap))
    losses, logsumexp = torch.ops.pgolf.softcap_cross_entropy(x, weight, targets, softcap)
    backward = (torch.randn_like(losses), x, weight, targets, logsumexp, softcap)
    torch.library.opcheck(torch.ops.pgolf.softcap_cross_entropy_backward, backward)


@pytest.mark.parametrize("softcap", [2.0, 90.0])
def test_gradcheck(softcap):
    x, weight, targets = make((2, 3), 4, 5, torch.double)
    torch.autograd.gradcheck(
        lambda a, b: softcap_cross_entropy(a, b, targets, softcap),
        (x.requires_grad_(), weight.requires_grad_()),
    )


def test_compiles_without_graph_break(device):
    def run(x, weight, targets):
        return softcap_cross_entropy(x.sin(), weight, targets, 30.0).mean()

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
    for softcap in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"softcap is .*; it must be positive"):
            softcap_cross_entropy(x, weight, targets, softcap)


@pytest.mark.parametrize("wrong", [-1, 9, -100, 2**31 - 1])
def test_rejects_targets_outside_the_vocabulary(wrong):
    x, weight, targets = make((4,), 6, 9)
    targets[2] = wrong
    with pytest.raises(IndexError, match=rf"targets hold {wrong}, but the vocabulary has ids 0 to 8"):
        softcap_cross_entropy(x, weight, targets, 30.0)


def test_is_pytorchs_cross_entropy_without_a_cap(device):
    x, weight, targets = make((30,), 6, 9, device=device)
    torch.testing.assert_close(
        softcap_cross_entropy(x, weight, targets, 1e6),
        F.cross_entropy(x @ weight.T, targets, reduction="none"),
        rtol=1e-4,
        atol=1e-4,
    )
