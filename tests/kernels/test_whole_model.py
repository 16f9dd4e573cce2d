"""The whole network on interpreted Triton kernels agrees with PyTorch and with the original programs."""

import pytest
import torch
from helpers import randomize_, tiny_config
from test_golden import FILES, assert_gradients, golden_model, read

from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import tiles
from pgolf_fast.ops.tiles import Tile

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")
GOLDEN = ("forward_bigram_only", "forward_even_layers_no_ve")


@pytest.fixture
def interpreted():
    import interpreter

    interpreter.install()
    return lambda: tiles.kernels_on_cpu("interpreter")


def make(activation):
    config = tiny_config(num_layers=2, ve_layers=(1,), xsa_last_n=1, mlp_activation=activation)
    spaces = torch.arange(config.vocab_size) % 3 == 0
    return randomize_(GPT(config, spaces), seed=1)


def outcome(model, tokens, targets, banked):
    """Loss and every gradient by name."""
    model.zero_grad(set_to_none=True)
    if banked:
        model.allocate_gradient_banks()
    loss = model.loss(tokens, targets)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# both activations and both kinds of gradient by default; the op tests cover their combinations
@pytest.mark.parametrize(
    ("activation", "banked"),
    [
        ("leaky_relu_squared", True),
        ("swiglu", False),
        pytest.param("leaky_relu_squared", False, marks=pytest.mark.slow),
        pytest.param("swiglu", True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_agree_with_pytorch(activation, banked, interpreted):
    model = make(activation)
    tokens, targets = torch.randint(0, model.config.vocab_size, (2, 2, 40))
    want, want_grads = outcome(model, tokens, targets, banked)
    with interpreted():
        got, got_grads = outcome(model, tokens, targets, banked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for name, grad in want_grads.items():
        assert grad.any(), f"{name} has no gradient to compare"
        error = (got_grads[name] - grad).abs().max() / grad.abs().max()
        assert error <= 1e-4, f"{name}: off by {error:.1e} of its maximum"


def test_kernels_really_ran(interpreted, monkeypatch):
    """Every op of a training step whose default is a kernel runs it, forward and backward."""
    asked = {}
    uses = tiles.uses_kernels

    def record(op, x):
        asked[op] = uses(op, x)
        return asked[op]

    monkeypatch.setattr(tiles, "uses_kernels", record)
    model = make("leaky_relu_squared")
    tokens, targets = torch.randint(0, model.config.vocab_size, (2, 1, 20))
    with interpreted():
        outcome(model, tokens, targets, banked=True)
    kernels = {op for op, default in tiles.DEFAULTS.items() if default == "triton"}
    training = kernels - {"newton_schulz", "muon", "int6_matmul"}
    assert {op for op, taken in asked.items() if taken} >= training


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_forward(name, interpreted, monkeypatch):
    """Logits, loss and all gradients of the original program, in float32, within the same tolerances."""
    # the interpreter's time depends on the number of programs and products, not on their size
    monkeypatch.setattr(tiles, "_INTERPRETER", Tile(128, 128, 128, 1, 1))
    path = next((path for path in FILES if path.stem == name), None)
    if path is None:
        pytest.skip(f"{name}.npz is not among the golden files")
    meta, values = read(path)
    model = golden_model(meta, values)
    tokens, targets = torch.tensor(values["input_ids"]), torch.tensor(values["target_ids"])
    model.allocate_gradient_banks()
    states = []
    hidden = model.hidden

    def keep(*arguments, **settings):
        states.append(hidden(*arguments, **settings))
        return states[-1]

    monkeypatch.setattr(model, "hidden", keep)
    with interpreted():
        loss = model.loss(tokens, targets)
        loss.backward()
        logits = model.head(states[0].detach()).detach()
    assert (logits - torch.tensor(values["logits"])).abs().max() <= 2e-4
    assert abs(float(loss.detach()) - float(values["loss"])) <= 1e-5
    assert_gradients(model, values)
