"""C8 and C9: validation data decides nothing before it is scored."""

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
from pgolf_fast.artifact.pack import build_records, unpack
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.shrink import shrink
from pgolf_fast.data.shards import write_shard
from pgolf_fast.io import load_tensors
from pgolf_fast.lab.audit.check import Finding
from pgolf_fast.lab.audit.guard import NETWORK, Seen, run_watched
from pgolf_fast.model.runtime import environment
from pgolf_fast.quant.state import QuantizedState

SHARDS = ("*_val_*.bin", "*_train_*.bin")
_STEPS, _LENGTH = 6, 32

# Trains a configuration into a folder, as `train.loop.train`
Train = Callable[[RunConfig, Path], object]
# Quantises and packs a run folder
Requantize = Callable[[RunFolder], Seen]


def training_ignores_validation(
    train: Train, config: RunConfig, tokens: np.ndarray, tokenizer: Path
) -> Finding:
    """C8: the training program makes the same weights and decisions whatever the validation data are.

    It trains `config`, made tiny, twice, validating after every step: once on the text it learns from, where
    what has learned most looks best, and once on noise over all ids, where what knows nothing does. So
    whatever is chosen by a validation score is chosen differently. The run itself is not trained again.
    """
    small = _tiny(config)
    tokens = tokens[:4096].astype(np.uint16)
    count = min(len(tokens), 16 * _LENGTH + 1)
    noise = np.random.default_rng(8).integers(0, config.model.vocab_size, count).astype(np.uint16)
    found = []
    with TemporaryDirectory() as folder:
        for name, validation in (("text", tokens[:count]), ("noise", noise)):
            data, out = Path(folder) / f"data_{name}", Path(folder) / name
            write_shard(data / "audit_train_000000.bin", tokens)
            write_shard(data / "audit_val_000000.bin", validation)
            source = replace(config.data, path=str(data), tokenizer=str(tokenizer), val_tokens=None)
            with contextlib.redirect_stderr(io.StringIO()):
                train(replace(small, data=source), out)
            weights, _ = load_tensors(RunFolder(out).model_file)
            found.append((weights, *_decisions(RunFolder(out))))
    (first, steps, losses), (second, other_steps, other_losses) = found
    if losses == other_losses:
        return Finding(False, "two validation sets have the same losses: what validates does not read them")
    if steps != other_steps:
        return Finding(False, "training goes another way with other validation data")
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    if different:
        text = f"{len(different)} tensors change with the validation data, first {different[0]}"
        return Finding(False, text)
    shown = f"{losses[-1]:.2f} and {other_losses[-1]:.2f}"
    if np.argmin(losses) == np.argmin(other_losses):
        return Finding(None, f"validation losses {shown} prefer the same weights: no choice would show")
    return Finding(
        True, f"{_STEPS} steps of the run made tiny, validation losses {shown}: the same {len(first)} tensors"
    )


def _tiny(config: RunConfig) -> RunConfig:
    """The configuration at a size that trains in a second, with every switch of it as it was."""
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
    """What each step did, and the validation losses."""
    rows = folder.history()
    steps = [{k: v for k, v in row.items() if k != "elapsed"} for row in rows if row["kind"] == "step"]
    return steps, [row["loss"] for row in rows if row["kind"] == "val"]


_AGAIN = """
import sys
from pgolf_fast.cli import main
sys.exit(main(["quantize", sys.argv[0]]) or main(["pack", sys.argv[0]]))
"""


def requantize(folder: RunFolder) -> Seen:
    """`pgolf quantize` and `pgolf pack` where no token shard opens and nothing can be called."""
    return run_watched(_AGAIN, [folder.path], files=SHARDS, events=NETWORK)


def calibration_ignores_data(folder: RunFolder, again: Requantize = requantize) -> Finding:
    """C9: quantised again, with every token shard unreadable, the run's float weights give its artifact.

    The text of calibration is then what the model writes from the seed in the artifact, for other text would
    give other codes. Where another machine quantised, it writes other text, and the property cannot be asked.
    """
    if not folder.model_file.is_file():
        return Finding(None, "there are no float weights to quantise again")
    values, before = unpack(folder.artifact_file)
    config = run_config_from_dict(values)
    with TemporaryDirectory() as temporary:
        copy = RunFolder(Path(temporary) / "run")
        copy.write_config(config)
        for path in (folder.model_file, folder.tokenizer_file):
            shutil.copyfile(path, copy.path / path.name)
        seen = again(copy)
        refused = [Path(what).name for what in seen.refused]
        if refused:
            return Finding(False, f"quantising opens {', '.join(dict.fromkeys(refused))}")
        if seen.status:
            return Finding(False, f"quantising again failed: {seen.output.strip().splitlines()[-1]}")
        _, after = unpack(copy.artifact_file)
        same = sizes(copy.artifact_file).sha256 == sizes(folder.artifact_file).sha256
    quant = config.quant
    method = f"gptq, seed {quant.seed}" if quant.method == "gptq" else "rounding"
    if same:
        return Finding(True, f"{method}, no shard readable: the same artifact, byte for byte")
    share = _different_numbers(before, after)
    if share == 0:
        return Finding(True, f"{method}, no shard readable: the same tensors, in a file written otherwise")
    elsewhere = _other_machine(folder)
    text = f"{method}, no shard readable: {share:.2%} of all codes and scales are others"
    if elsewhere:
        return Finding(None, f"{text}; ask where the run was made ({elsewhere})")
    return Finding(False, text)


def _different_numbers(before: QuantizedState, after: QuantizedState) -> float:
    """The share of codes, scales and other numbers that differ; 1 where names or shapes do."""
    first, second = ({r.name: r.array for r in build_records(state)} for state in (before, after))
    if {n: a.shape for n, a in first.items()} != {n: a.shape for n, a in second.items()}:
        return 1.0
    different = sum(int((array != second[name]).sum()) for name, array in first.items())
    return different / sum(array.size for array in first.values())


def _other_machine(folder: RunFolder) -> str:
    """What of env.json is not so here."""
    path = folder.path / "env.json"
    there = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    here = environment()
    asked = ("processor", "gpu", "cuda", "torch", "cpu_threads")
    differing = [name for name in asked if name in there and there[name] != here.get(name)]
    return ", ".join(f"{name} {there[name]}" for name in differing)
