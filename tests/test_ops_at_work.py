"""Every op is called by training, export, scoring or generation: what only tests call is no op."""

from dataclasses import replace

import torch
from runs import call, make_dataset, run_config, words
from torch._ops import OpOverload, OpOverloadPacket

from pgolf_fast.artifact.load import load
from pgolf_fast.bench.doctor import public_ops
from pgolf_fast.model.decoding import generate


def record(monkeypatch):
    """Return the set of names of our ops that fills as they are called, from any thread."""
    called = set()
    for kind in (OpOverload, OpOverloadPacket):
        original = kind.__call__

        def watched(self, /, *args, original=original, **kwargs):
            name = getattr(self, "_qualified_op_name", None) or self._name
            if name.startswith("pgolf::"):
                called.add(name.removeprefix("pgolf::").partition(".")[0])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", watched)
    return called


def test_every_op_is_called(capsys, tmp_path, monkeypatch):
    called, run = record(monkeypatch), tmp_path / "run"
    config = run_config(make_dataset(tmp_path))
    for command in (
        ("train", "tiny", "--out", run, *words(config)),
        ("quantize", run),
        ("pack", run),
        ("eval", run, "--weights", "packed"),
        ("eval", run, "--ttt.adapter", "lora"),
        ("generate", run, "--tokens", "3"),
    ):
        assert call(capsys, *command)[0] == 0
    # blocks in C++ decode float32; bfloat16 and more texts than they take are decoded op by op
    low = replace(config, train=replace(config.train, compute_dtype="bfloat16"))
    for settings, texts in ((low, 2), (config, 65)):
        model = load(run, config=settings, packed=True).model
        assert generate(model, torch.ones(texts, 1, dtype=torch.long), 1).shape == (texts, 2)
    assert set(public_ops()) - called == set()
