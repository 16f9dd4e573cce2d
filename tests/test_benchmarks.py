"""The peers that benchmarks compare with are the same network, and the GPU script runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast import ops
from pgolf_fast.model.gpt import GPT

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_plain_pytorch_computes_the_same_network(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from plain import plain_ops

    model = GPT(tiny_config(), torch.arange(96) % 3 == 0)
    randomize_(model, 1)
    tokens, targets = torch.randint(96, (2, 24)), torch.randint(96, (2, 24))
    loss = model.loss(tokens, targets)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    ours = ops.mlp
    with plain_ops():
        assert ops.mlp is not ours
        plain = model.loss(tokens, targets)
        plain.backward()
    assert ops.mlp is ours
    torch.testing.assert_close(plain, loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = grads[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


@pytest.mark.slow
def test_gpu_session_can_be_rehearsed(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu_session.py"), "--device", "cpu", "--preset", "tiny"]
    command += ["--rounds", "1", "--skip-tests", "--out", str(tmp_path)]
    command += ["--ways", "pgolf ops, eager", "plain, eager, flash"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("gpu_session_*.json")
    record = json.loads(path.read_text())
    assert [step["way"] for step in record["steps"]] == ["pgolf ops, eager", "plain, eager, flash"]
    assert all(step["median_ms"] > 0 for step in record["steps"])
    assert record["environment"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_session_says_when_there_is_no_gpu():
    command = [sys.executable, str(FOLDER / "gpu_session.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
