"""C8 and C9: validation data has no influence on training and calibration."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.load import unpack
from pgolf_fast.artifact.pack import build_records
from pgolf_fast.config.presets import shrink
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.shards import write_shard
from pgolf_fast.io import load_tensors
from pgolf_fast.lab.audit.check import AuditFinding
from pgolf_fast.lab.audit.guard import NETWORK, GuardedRun, run_guarded
from pgolf_fast.model.runtime import environment
from pgolf_fast.quant.state import QuantizedState

SHARDS = ("*_val_*.bin", "*_train_*.bin")
_STEPS, _LENGTH = 6, 32

# Trains a configuration into a folder, like `train.loop.train`
Train = Callable[[RunConfig, Path], object]
# Quantizes and packs a run folder
Requantize = Callable[[RunFolder], GuardedRun]


def training_ignores_validation(
    train: Train, config: RunConfig, tokens: np.ndarray, tokenizer: Path
) -> AuditFinding:
    """C8: check that training makes the same weights and decisions with other validation data.

    Trains a tiny version of `config` twice, validating after every step: once on the training text, where the
    last weights score best, and once on noise over all ids, where the first ones do. Any choice by validation
    score then differs. The run itself is not trained again.
    """
    small = _tiny(config)
    tokens = tokens[:4096].astype(np.uint16)
    count = min(len(tokens), 16 * _LENGTH + 1)
    noise = np.random.default_rng(8).integers(0, config.model.vocab_size, count).astype(np.uint16)
    runs = []
    with TemporaryDirectory() as folder:
        for name, validation in (("text", tokens[:count]), ("noise", noise)):
            data, out = Path(folder) / f"data_{name}", Path(folder) / name
            write_shard(data / "audit_train_000000.bin", tokens)
            write_shard(data / "audit_val_000000.bin", validation)
            source = replace(config.data, path=str(data), tokenizer=str(tokenizer), val_tokens=None)
            with contextlib.redirect_stderr(io.StringIO()):
                train(replace(small, data=source), out)
            weights, _ = load_tensors(RunFolder(out).model_file)
            runs.append((weights, *_decisions(RunFolder(out))))
    (first, steps, losses), (second, other_steps, other_losses) = runs
    if losses == other_losses:
        return AuditFinding(False, "two validation sets have the same losses: validation does not read them")
    if steps != other_steps:
        return AuditFinding(False, "training steps change with the validation data")
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    if different:
        text = f"{len(different)} tensors change with the validation data, first {different[0]}"
        return AuditFinding(False, text)
    shown = f"{losses[-1]:.2f} and {other_losses[-1]:.2f}"
    if np.argmin(losses) == np.argmin(other_losses):
        return AuditFinding(
            None, f"validation losses {shown} prefer the same weights: a choice would not be detected"
        )
    return AuditFinding(
        True, f"{_STEPS} steps of a tiny version, validation losses {shown}: the same {len(first)} tensors"
    )


def _tiny(config: RunConfig) -> RunConfig:
    """Return the configuration at a size that trains in a second, with every feature still on or off."""
    small = shrink(config, "tiny")
    meta = config.train.meta and replace(config.train.meta, every=2, freeze_blocks=1, above=0.0)
    reptile = config.train.reptile and replace(config.train.reptile, share=0.5)
    train = replace(
        config.train,
        steps=_STEPS,
        max_seconds=None,
        schedule="steps",
        seq_len=_LENGTH,
        batch_tokens=4 * _LENGTH,
        micro_batch_tokens=2 * _LENGTH,
        warmdown_steps=_STEPS - 1,
        warmdown_fraction=None,
        lr_hold_steps=1,
        adaptive_min_step=1,
        adaptive_every=1,
        compute_dtype="float32",
        compile=False,
        cuda_graph=False,
        val_every=1,
        log_every=1,
        checkpoint_minutes=None,
        meta=meta,
        reptile=reptile,
    )
    average = replace(config.average, ema_decay=0.8, ema_every=1, swa_every=config.average.swa_every and 2)
    evaluation = replace(config.eval, seq_len=None, stride=min(config.eval.stride, _LENGTH))
    return replace(small, train=train, average=average, eval=evaluation)


def _decisions(folder: RunFolder) -> tuple[list[dict], list[float]]:
    """Return the metrics of every step, without times, and the validation losses."""
    rows = folder.history()
    steps = [{k: v for k, v in row.items() if k != "elapsed"} for row in rows if row["kind"] == "step"]
    return steps, [row["loss"] for row in rows if row["kind"] == "val"]


_AGAIN = """
import sys
from pgolf_fast.cli import main
sys.exit(main(["quantize", sys.argv[0]]) or main(["pack", sys.argv[0]]))
"""


def requantize(folder: RunFolder) -> GuardedRun:
    """Run `pgolf quantize` and `pgolf pack` without access to token shards and network."""
    return run_guarded(_AGAIN, [folder.path], files=SHARDS, events=NETWORK)


def calibration_ignores_data(folder: RunFolder, again: Requantize = requantize) -> AuditFinding:
    """C9: check that quantizing the run's float weights again, without token shards, gives its artifact.

    The calibration text is then generated by the model from the seed in the artifact: other text would give
    other codes. A model on another machine generates other text, so the property cannot be decided there.
    """
    if not folder.model_file.is_file():
        return AuditFinding(None, "there are no float weights to quantize again")
    config, before = unpack(folder.artifact_file)
    with TemporaryDirectory() as temporary:
        copy = RunFolder(Path(temporary) / "run")
        copy.write_config(config)
        for path in (folder.model_file, folder.tokenizer_file):
            shutil.copyfile(path, copy.path / path.name)
        seen = again(copy)
        refused = [Path(what).name for what in seen.refused]
        if refused:
            return AuditFinding(False, f"quantizing opens {', '.join(dict.fromkeys(refused))}")
        if seen.status:
            return AuditFinding(False, f"quantizing again failed: {seen.output.strip().splitlines()[-1]}")
        _, after = unpack(copy.artifact_file)
        same = sizes(copy.artifact_file).sha256 == sizes(folder.artifact_file).sha256
    quant = config.quant
    method = f"gptq, seed {quant.seed}" if quant.method == "gptq" else "rounding"
    if same:
        return AuditFinding(True, f"{method}, no shard readable: the same artifact, byte for byte")
    share = _different_numbers(before, after)
    if share == 0:
        return AuditFinding(True, f"{method}, no shard readable: the same tensors, in a different file")
    elsewhere = _other_machine(folder)
    text = f"{method}, no shard readable: {share:.2%} of all codes and scales differ"
    if elsewhere:
        return AuditFinding(None, f"{text}; run the audit where the run was made ({elsewhere})")
    return AuditFinding(False, text)


def _different_numbers(before: QuantizedState, after: QuantizedState) -> float:
    """Return the share of codes, scales and other numbers that differ; 1 if names or shapes differ."""
    first, second = ({r.name: r.array for r in build_records(state)} for state in (before, after))
    if {n: a.shape for n, a in first.items()} != {n: a.shape for n, a in second.items()}:
        return 1.0
    different = sum(int((array != second[name]).sum()) for name, array in first.items())
    return different / sum(array.size for array in first.values())


def _other_machine(folder: RunFolder) -> str:
    """Return the entries of env.json that differ on this machine, as text."""
    path = folder.path / "env.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    here = environment()
    names = ("processor", "gpu", "cuda", "torch", "cpu_threads")
    differing = [name for name in names if name in there and there[name] != here.get(name)]
    return ", ".join(f"{name} {there[name]}" for name in differing)
