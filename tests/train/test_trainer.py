"""Steps read late and micro-batches replayed from a CUDA graph give the same results."""

import pytest
import torch
from helpers import randomize_, tiny_config
from runs import make_dataset, run_config
from safetensors.torch import load_file

from pgolf_fast.console import read_metrics
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.compiled import tag_compile_cache
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import tiles
from pgolf_fast.train import loop
from pgolf_fast.train.loop import train
from pgolf_fast.train.trainer import MicroStep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def steps_of(run):
    return [
        {k: v for k, v in row.items() if k not in ("elapsed", "time")}
        for row in read_metrics(run.folder.metrics_file)
        if row["kind"] == "step"
    ]


def test_reading_a_step_late_changes_nothing(data, tmp_path, monkeypatch):
    config = run_config(data, train__val_every=3)
    now = train(config, tmp_path / "now")
    monkeypatch.setattr(loop, "_lag", lambda world: 1)
    late = train(config, tmp_path / "late")
    assert steps_of(late) == steps_of(now)
    assert len(steps_of(now)) == config.train.steps
    one, two = load_file(now.folder.model_file), load_file(late.folder.model_file)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_number_that_is_not_finite_stops_a_run_read_late(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_lag", lambda world: 1)
    config = run_config(data, optim__matrix_lr=1e30, optim__embed_lr=1e30, optim__grad_clip=None)
    with pytest.raises(PgolfError, match=r"at step .* is (nan|inf)"):
        train(config, tmp_path / "run")


def test_compile_cache_is_separate_for_each_implementation():
    """PyTorch's cache on disk must not return a graph of another implementation."""
    tags = []
    for implementation in ("auto", "torch", "auto"):
        tiles.choose("mlp", implementation)
        tag_compile_cache()
        tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] == tags[2] != tags[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_micro_step_adds_the_same_gradients():
    tokens, targets = torch.randint(0, 96, (2, 3, 16), device="cuda").unbind()
    found = []
    for cuda_graph in (False, True):
        model = randomize_(GPT(tiny_config()), seed=3).to("cuda")
        model.allocate_gradient_banks()
        step = MicroStep(model, 0.5, cuda_graph=cuda_graph)
        losses = [
            float(step(model.loss, x, y, model.banks()))
            for x, y in ((tokens, targets), (targets, tokens), (tokens, targets))
        ]
        found.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (a, ga), (b, gb) = found
    assert a == pytest.approx(b, rel=1e-6)
    assert ga.keys() == gb.keys()
    for name in ga:
        torch.testing.assert_close(ga[name], gb[name], rtol=1e-4, atol=1e-5, msg=name)
