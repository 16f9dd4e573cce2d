"""Parts of a micro-batch, one thread each, give the gradients of the whole and the same bits each time."""

import os
import signal
import threading
import time

import pytest
import torch
from helpers import randomize_, tiny_config
from runs import assert_same, make_dataset, make_trainer, run_config, run_steps
from safetensors.torch import load_file

from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.loop import train
from pgolf_fast.train.shares import Shares
from pgolf_fast.train.trainer import MicroStep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def same_threads():
    """Use two threads, and afterwards as many as before, with which new threads must begin too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def seen_by_a_new_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_are_those_of_one_share(count):
    tokens, targets = torch.randint(0, 96, (2, 4, 16), generator=torch.Generator().manual_seed(1)).unbind()
    found = []
    for shares in (1, count):
        model = randomize_(GPT(tiny_config(), compute_dtype=torch.float64).double(), seed=3)
        model.allocate_gradient_banks()
        step = MicroStep(model, 0.5) if shares == 1 else Shares(model, 0.5, shares)
        losses = [step(model.loss, x, y, model.banks()) for x, y in ((tokens, targets), (targets, tokens))]
        found.append((losses, {n: p.grad for n, p in model.named_parameters()}))
    (losses, whole), (same_losses, parts) = found
    torch.testing.assert_close(same_losses, losses, rtol=1e-12, atol=0)
    for name, gradient in whole.items():
        assert (gradient is None) == (parts[name] is None), name
        if gradient is not None:
            limit = 1e-11 * float(gradient.abs().max())
            torch.testing.assert_close(parts[name], gradient, rtol=1e-9, atol=limit, msg=name)


def test_results_do_not_depend_on_the_number_of_threads(data):
    """The gradients of two micro-batches, with bfloat16 tables and quantization-aware training."""
    # The same weights: those of orthogonal initialization are rounded as LAPACK's threads divide the work
    weights = make_trainer(run_config(data)).model.state_dict()
    found = []
    for n in (3, 2):
        torch.set_num_threads(n)
        trainer = make_trainer(run_config(data, train__cpu_shares=2))
        trainer.model.load_state_dict(weights)
        trainer.qat = True
        loss, *_ = trainer._accumulate()
        assert torch.get_num_threads() == seen_by_a_new_thread() == n
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        found.append({"loss": loss, **gradients})
    assert_same(*found)


def test_training_goes_on_bit_for_bit_and_as_with_one_share(data, tmp_path):
    config = run_config(data, train__cpu_shares=2, train__checkpoint_minutes=0.0)
    straight = train(config, tmp_path / "straight").folder
    again = train(config, tmp_path / "again").folder
    again.model_file.unlink()
    (again.path / "checkpoints/step_00000008.safetensors").unlink()
    resumed = train(config, again.path, resume=True).folder
    assert_same(load_file(straight.model_file), load_file(resumed.model_file))
    one, two = (make_trainer(run_config(data, train__cpu_shares=n)) for n in (1, 2))
    assert run_steps(one, 6) == pytest.approx(run_steps(two, 6), rel=1e-4)


def test_an_exception_in_a_share_is_raised_once_all_have_ended():
    model = randomize_(GPT(tiny_config()), seed=3)
    model.allocate_gradient_banks()
    ended = []

    def loss(tokens, targets, banks):
        if int(tokens[0, 0]):
            raise ZeroDivisionError("in the second share")
        time.sleep(0.2)
        ended.append(True)
        return model.loss(tokens, targets, banks)

    tokens = torch.arange(2)[:, None].expand(2, 16).contiguous()
    shares = Shares(model, 1.0, 2)
    with pytest.raises(ZeroDivisionError, match="in the second share"):
        shares(loss, tokens, tokens, model.banks())
    assert ended
    assert shares(model.loss, tokens, tokens, model.banks()).isfinite()


def test_an_interrupt_waits_for_the_shares():
    """Ctrl-C in a program of its own; `pgolf train` ends its step first."""
    model = randomize_(GPT(tiny_config()), seed=3)
    model.allocate_gradient_banks()
    begun, ended = [], []

    def loss(tokens, targets, banks):
        begun.append(True)
        if not int(tokens[0, 0]):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        ended.append(True)
        return model.loss(tokens, targets, banks)

    tokens = torch.arange(2)[:, None].expand(2, 16).contiguous()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Shares(model, 1.0, 2)(loss, tokens, tokens, model.banks())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(ended) == len(begun) > 0


def test_parts_are_whole_sequences_on_a_cpu(data):
    def step(**changes):
        return type(
            make_trainer(run_config(data, **{f"train__{name}": v for name, v in changes.items()})).micro_step
        )

    assert step() is step(cpu_shares=4) is Shares
    assert step(cpu_shares=1) is step(cpu_shares=3) is step(compile=True) is MicroStep
    with pytest.raises(PgolfError, match=r"train.cpu_shares"):
        run_config(data, train__cpu_shares=0)
    torch.set_num_threads(1)
    assert step() is MicroStep
