"""Hessian products, traces and eigenvalues against the exact Hessian of a small network."""

from itertools import islice

import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast import ops
from pgolf_fast.lab.analysis.surface import LossSurface, _eigenvalue, extremes, random_signs, trace
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import reference

CPU = torch.device("cpu")
# the exact Hessian passes weights that are not leaves, and the model reads their gradient banks
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def network():
    config = tiny_config(
        vocab_size=9,
        num_layers=2,
        model_dim=4,
        num_heads=2,
        mlp_mult=2.0,
        bigram_vocab_size=5,
        bigram_dim=2,
        rope_dims=2,
        ve_dim=2,
        ve_layers=(1,),
        xsa_last_n=1,
    )
    leading = torch.arange(9) % 2 == 0
    return randomize_(GPT(config, leading, compute_dtype=torch.float64), 1).double()


@pytest.fixture(scope="module")
def text():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(9, (3, 7), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.fixture(scope="module")
def exact(text):
    """Hessian (P, P) and gradient by differentiating the reference formulas of the ops twice."""
    model = network()
    names, parameters = zip(*model.named_parameters(), strict=True)
    sizes, shapes = [p.numel() for p in parameters], [p.shape for p in parameters]
    point = torch.cat([p.detach().flatten() for p in parameters])

    def loss(flat):
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return torch.func.functional_call(model, dict(zip(names, parts, strict=True)), text)

    def attention(*args, xsa, num_kv_heads, gate, **unused):
        assert gate is None
        return reference.gqa_attention(*args, num_kv_heads, xsa)

    def hashed(tokens, table, space, scale, boost, *, pos_conditional, trigram, out_dtype):
        return reference.ngram_hash_embed(tokens, table, space, scale, boost, pos_conditional, trigram)

    def cross_entropy(x, weight, targets, softcap, z_loss):
        flat = reference.softcap_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), softcap, z_loss)
        return flat.view(targets.shape)

    plain = {
        "rms_norm": reference.rms_norm,
        "residual_norm": reference.residual_norm,
        "smear_gate": reference.smear_gate,
        "mlp": lambda *args, grad_up, grad_down: reference.mlp(*args),
        "gqa_attention": attention,
        "ngram_hash_embed": hashed,
        "softcap_cross_entropy": cross_entropy,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in plain.items():
            patch.setattr(ops, name, function)
        hessian = torch.autograd.functional.hessian(loss, point, vectorize=True)
        gradient = torch.autograd.functional.jacobian(loss, point)
    return hessian, gradient


@pytest.fixture(scope="module")
def surface(text):
    return LossSurface(network(), *text)


def test_gradient_and_products_match_the_exact_hessian(surface, exact):
    hessian, gradient = exact
    torch.testing.assert_close(surface.gradient, gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(surface._model.qo_bank, network().qo_bank)
    top = torch.linalg.eigh(hessian).eigenvectors[:, -1]
    for vector in (*islice(random_signs(surface.size, 0, CPU), 2), top):
        want = hessian @ vector
        error = (surface.product(vector) - want).norm() / want.norm()
        assert error < 1e-4
    assert torch.equal(surface._model.qo_bank, network().qo_bank), "a product must restore the weights"


def test_ops_have_no_second_derivative(text):
    """Products are differences of gradients because `torch.autograd.grad` cannot be applied twice."""
    model = network()
    (first,) = torch.autograd.grad(model(*text), [model.mlp_up_bank], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), [model.mlp_up_bank])


def test_trace_matches_the_exact_hessian(surface, exact):
    hessian, _ = exact
    blocks = {"first": slice(0, 100), "rest": slice(100, surface.size)}
    vectors = list(islice(random_signs(surface.size, 0, CPU), 40))
    whole, parts = trace(surface.product, vectors, blocks)
    samples = torch.stack([v @ hessian @ v for v in vectors])
    assert whole.value == pytest.approx(float(samples.mean()), rel=1e-5)
    assert whole.error == pytest.approx(float(samples.std() / 40**0.5), rel=1e-4)
    assert abs(whole.value - float(hessian.trace())) < 4 * whole.error
    for name, place in blocks.items():
        assert abs(parts[name].value - float(hessian[place, place].trace())) < 4 * parts[name].error
    assert sum(part.value for part in parts.values()) == pytest.approx(whole.value)


def test_extreme_eigenvalues_match_the_exact_hessian(surface, exact):
    values = torch.linalg.eigvalsh(exact[0])
    start = next(random_signs(surface.size, 0, CPU))
    (top, *next_ones), bottom = extremes(surface.product, start, 25, 3)
    assert top.value == pytest.approx(float(values[-1]), rel=1e-4)
    assert len(next_ones) == 2
    for result, value in zip(next_ones, values.flip(0)[1:3].tolist(), strict=True):
        assert result.value == pytest.approx(value, rel=1e-2)
    assert bottom.value == pytest.approx(float(values[0]), rel=1e-2)
    # after few steps it has not converged, but some eigenvalue is within the residual
    (early,), _ = extremes(surface.product, start, 4)
    assert early.error > 10 * top.error
    assert float((values - early.value).abs().min()) <= 1.001 * early.error


def test_eigenvalues_are_bounds_and_labeled_until_they_converge():
    """With outliers next to a dense bulk, the true value may be far outside ± after few steps."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.linspace(-0.7, 1, 2000).double(), torch.tensor([8.0, 20, 60]).double()])
    start = torch.randn(len(values), generator=generator).double()
    true = values.sort(descending=True).values
    marks = {}
    for steps in (4, 40):
        top, bottom = extremes(lambda v: values * v, start, steps, 3)
        assert all(result.value <= float(value) + 1e-9 for result, value in zip(top, true, strict=False))
        assert bottom.value >= float(true[-1]) - 1e-9
        marks[steps] = [_eigenvalue(vars(result)).endswith("?") for result in (*top, bottom)]
    assert marks[4][2:] == [True, True]
    assert marks[40][:3] == [False] * 3
    early, _ = extremes(lambda v: values * v, start, 4, 3)
    assert abs(early[2].value - 8) > early[2].error, "the residual does not bound the error"


def test_lanczos_stops_when_the_space_is_exhausted():
    """The identity has one eigenvalue; a matrix of rank 2 with a zero eigenspace has three."""
    start = torch.ones(6).double()
    (top,), bottom = extremes(lambda v: v, start, 5, 3)
    assert (top.value, bottom.value, top.error) == (pytest.approx(1), pytest.approx(1), 0)
    matrix = torch.diag(torch.tensor([4.0, -3, 0, 0, 0, 0]).double())
    top, bottom = extremes(lambda v: matrix @ v, start, 6, 2)
    assert [result.value for result in top] == [pytest.approx(4), pytest.approx(0, abs=1e-9)]
    assert bottom.value == pytest.approx(-3)


def test_random_signs_are_signs_and_repeat():
    first, second = islice(random_signs(1000, 3, CPU), 2)
    assert set(first.tolist()) == {-1.0, 1.0}
    assert abs(float(first @ second)) < 5 * 1000**0.5
    assert torch.equal(first, next(random_signs(1000, 3, CPU)))
