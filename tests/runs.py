"""Small complete runs for tests: a data set of help texts, and configurations that train in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_fast import cli
from pgolf_fast.artifact.load import load
from pgolf_fast.config.fields import flatten, with_fields
from pgolf_fast.config.presets import tiny
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.shards import write_shard
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import Tokenizer, train_tokenizer
from pgolf_fast.distributed import World
from pgolf_fast.evaluation.run import score
from pgolf_fast.train.loop import build_model
from pgolf_fast.train.trainer import Trainer

VOCAB = 384
ALONE = World(0, 1, torch.device("cpu"))


def make_dataset(folder: Path, vocab: int = VOCAB) -> Path:
    """Write shards and a tokenizer of `vocab` pieces from the help topics of this Python."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)][:40]
    train_tokenizer(texts, vocab, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    for split, part in (("train", texts[4:]), ("val", texts[:4])):
        ids = np.concatenate([tokenizer.encode_document(text) for text in part]).astype(np.uint16)
        write_shard(folder / f"help_{split}_000000.bin", ids[:4000] if split == "val" else ids)
    return folder


def run_config(data: Path, **changes: object) -> RunConfig:
    """Return a run of eight steps in float32 with every feature on; `changes` are fields with __ for dots."""
    base = tiny()
    model = replace(
        base.model,
        vocab_size=VOCAB,
        num_layers=3,
        model_dim=32,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=8,
        bigram_vocab_size=64,
        bigram_dim=8,
        ve_dim=8,
        ve_layers=(2,),
        xsa_last_n=3,
        frozen_skips=0,
    )
    train = replace(
        base.train,
        steps=8,
        batch_tokens=128,
        micro_batch_tokens=64,
        seq_len=32,
        compute_dtype="float32",
        warmdown_steps=6,
        warmdown_fraction=None,
        lr_hold_steps=1,
        adaptive_warmdown=False,
        log_every=4,
        checkpoint_minutes=None,
        meta=replace(base.train.meta, every=4),
    )
    config = replace(
        base,
        name="test",
        model=model,
        train=train,
        data=replace(base.data, path=str(data)),
        optim=replace(base.optim, matrix_lr=0.025, embed_lr=0.035, scalar_lr=0.025),
        average=replace(base.average, ema_decay=0.8, ema_every=1, swa_every=1, swa_below=0.2),
        quant=replace(base.quant, calibration_sequences=4, calibration_length=32),
        eval=replace(base.eval, stride=16),
        ttt=TTTConfig(chunk_tokens=1000, batch_seqs=8, epochs=1),
    )
    return with_fields(config, changes)


def words(config: RunConfig) -> list[str]:
    """Return the command-line options that turn preset `tiny` into `config`."""
    before = dict(flatten(tiny()))
    found = []
    for name, value in flatten(config):
        if name == "name" or before.get(name, ...) == value:
            continue
        if isinstance(value, tuple):
            found += [f"--{name}", *map(str, value)]
        elif isinstance(value, bool) and not isinstance(before.get(name), type(None)):
            *groups, last = name.split(".")
            found.append("--" + ".".join([*groups, last if value else f"no-{last}"]))
        else:
            found += [f"--{name}", "None" if value is None else str(value)]
    return found


def pgolf(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pgolf_fast.cli", *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 300, "env": environment}
    return subprocess.run(command, check=False, **{**options, **settings})


def call(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one command in this process."""
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def make_trainer(config, world=ALONE):
    source = open_source(config.data, config.model.vocab_size)
    loader = make_loader(source.train_shards(), config)
    return Trainer(build_model(config, source, world), config, loader, world)


def run_steps(trainer, count):
    losses = [trainer.advance().loss for _ in range(count)]
    trainer.loader.close()
    return losses


def weights_after(config, steps=8):
    trainer = make_trainer(config)
    run_steps(trainer, steps)
    return trainer


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def differs(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


def losses_by_implementation(folder, implementation, names, **fields):
    """Nats per token of a run's artifact for the named scores, without a change to its folder."""
    fields |= {"kernels.implementation": implementation}
    scores = score(load(folder.path, config=with_fields(folder.read_config(), fields))).to_dict()
    return np.array([scores[name]["loss"] for name in names])
