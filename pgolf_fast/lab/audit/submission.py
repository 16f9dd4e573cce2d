"""C8 to C12 and C18: training and calibration data; size, self-containment and time of a submission."""

import ast
import contextlib
import io
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pgolf_fast import console
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.load import unpack
from pgolf_fast.artifact.pack import build_records
from pgolf_fast.artifact.submission import build_script
from pgolf_fast.config.presets import shrink
from pgolf_fast.config.run_folder import RunFolder, absolute
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.shards import shard_paths, write_shard
from pgolf_fast.io import load_tensors, read_json
from pgolf_fast.lab.audit.check import AuditFinding, fails, holds, undecided
from pgolf_fast.lab.audit.guard import NETWORK, PROGRAMS, GuardedRun, run_guarded
from pgolf_fast.lab.audit.overlap import find_overlap
from pgolf_fast.model.runtime import environment
from pgolf_fast.quant.state import QuantizedState

SHARDS = ("*_val_*.bin", "*_train_*.bin")
_STEPS, _LENGTH = 6, 32
Train = Callable[[RunConfig, Path], object]  # trains a configuration into a folder, like `train.loop.train`
Requantize = Callable[[RunFolder], GuardedRun]  # quantizes and packs a run folder
ALLOWED = frozenset({"torch", "numpy", "sentencepiece"})
_SCRIPT = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__')"
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib")
_COMPARE_SECONDS = 30.0
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


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
            rows = RunFolder(out).history()
            steps = [{k: v for k, v in r.items() if k != "elapsed"} for r in rows if r["kind"] == "step"]
            runs.append((weights, steps, [row["loss"] for row in rows if row["kind"] == "val"]))
    (first, steps, losses), (second, other_steps, other_losses) = runs
    if losses == other_losses:
        return fails("two validation sets have the same losses: validation does not read them")
    if steps != other_steps:
        return fails("training steps change with the validation data")
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    if different:
        return fails(f"{len(different)} tensors change with the validation data, first {different[0]}")
    shown = f"{losses[-1]:.2f} and {other_losses[-1]:.2f}"
    if np.argmin(losses) == np.argmin(other_losses):
        return undecided(f"validation losses {shown} prefer the same weights: a choice would not be detected")
    trained = f"{_STEPS} steps of a tiny version, validation losses {shown}"
    return holds(f"{trained}: the same {len(first)} tensors")


def _tiny(config: RunConfig) -> RunConfig:
    """Return the configuration at a size that trains in a second, with every feature still on or off."""
    small = shrink(config, "tiny")
    changes: dict[str, Any] = {"steps": _STEPS, "schedule": "steps", "compute_dtype": "float32"}
    changes |= {"seq_len": _LENGTH, "batch_tokens": 4 * _LENGTH, "micro_batch_tokens": 2 * _LENGTH}
    changes |= {"warmdown_steps": _STEPS - 1, "compile": False, "cuda_graph": False}
    changes |= dict.fromkeys(("max_seconds", "warmdown_fraction", "checkpoint_minutes"))
    each_step = ("lr_hold_steps", "adaptive_min_step", "adaptive_every", "val_every", "log_every")
    changes |= dict.fromkeys(each_step, 1)
    if config.train.meta:
        changes["meta"] = replace(config.train.meta, every=2, freeze_blocks=1, above=0.0)
    if config.train.reptile:
        changes["reptile"] = replace(config.train.reptile, share=0.5)
    train = replace(config.train, **changes)
    average = replace(config.average, ema_decay=0.8, ema_every=1, swa_every=config.average.swa_every and 2)
    evaluation = replace(config.eval, seq_len=None, stride=min(config.eval.stride, _LENGTH))
    return replace(small, train=train, average=average, eval=evaluation)


_AGAIN = """
import sys
from pgolf_fast.cli import main
sys.exit(main(["quantize", sys.argv[0]]) or main(["pack", sys.argv[0]]))
"""


def requantize(folder: RunFolder) -> GuardedRun:
    """Run `pgolf quantize` and `pgolf pack` without access to network and shards, except calibration's."""
    files = SHARDS if folder.read_config().quant.calibration == "generated" else SHARDS[:1]
    return run_guarded(_AGAIN, [folder.path], files=files, events=NETWORK, cwd=folder.path)


def calibration_ignores_data(folder: RunFolder | None, again: Requantize = requantize) -> AuditFinding:
    """C9: check that quantizing the run's float weights again, without token shards, gives its artifact.

    The calibration text is then generated by the model from the seed in the artifact: other text would give
    other codes. With quant.calibration shards, training shards may be read. A model on another machine
    generates other text, so the property cannot be decided there.
    `folder` is None for an artifact alone and for a run without one.
    """
    if folder is None:
        return undecided("only a packed run has the weights from before quantization")
    if not folder.model_file.is_file():
        return undecided("there are no float weights to quantize again")
    config, before = unpack(folder.artifact_file, finite=False)
    with TemporaryDirectory() as temporary:
        copy = RunFolder(Path(temporary) / "run")
        copy.write_config(absolute(replace(config, data=folder.read_config().data)))
        for path in (folder.model_file, folder.tokenizer_file):
            shutil.copyfile(path, copy.path / path.name)
        seen = again(copy)
        if refused := [Path(what).name for what in seen.refused]:
            return fails(f"quantizing opens {', '.join(dict.fromkeys(refused))}")
        if seen.status:
            return fails(f"quantizing again failed: {seen.output.strip().splitlines()[-1]}")
        _, after = unpack(copy.artifact_file)
        same = sizes(copy.artifact_file).sha256 == sizes(folder.artifact_file).sha256
    text = f"gptq, seed {config.quant.seed}" if config.quant.method == "gptq" else "rounding"
    kept = "shard" if config.quant.calibration == "generated" else "validation shard"
    text += f", no {kept} readable"
    if same:
        return holds(f"{text}: the same artifact, byte for byte")
    share = _different_numbers(before, after)
    if share == 0:
        return holds(f"{text}: the same tensors, in a different file")
    text += f": {share:.2%} of all codes and scales differ"
    if elsewhere := _other_machine(folder):
        return undecided(f"{text}; run the audit where the run was made ({elsewhere})")
    return fails(text)


def _different_numbers(before: QuantizedState, after: QuantizedState) -> float:
    """Return the share of codes, scales and other numbers that differ; 1 if names or shapes differ."""
    first, second = ({r.name: r.array for r in build_records(state)} for state in (before, after))
    if {n: a.shape for n, a in first.items()} != {n: a.shape for n, a in second.items()}:
        return 1.0
    different = sum(int((array != second[name]).sum()) for name, array in first.items())
    return different / sum(array.size for array in first.values())


def _other_machine(folder: RunFolder) -> str:
    """Return the entries of env.json that differ on this machine, as text."""
    path, here = folder.path / "env.json", environment()
    there = read_json(path) if path.is_file() else {}
    names = ("processor", "gpu", "cuda", "torch", "cpu_threads")
    return ", ".join(f"{n} {there[n]}" for n in names if n in there and there[n] != here.get(n))


def within_bytes(artifact: Path | None, limit: int) -> AuditFinding:
    """C10: check the size of the artifact plus its evaluation script, as they would be submitted."""
    if artifact is None:
        return undecided("the run is not packed")
    weights, code = artifact.stat().st_size, len(build_script(sizes(artifact).sha256).wrapped.encode())
    text, over = f"artifact {weights:,} + script {code:,} = {weights + code:,} bytes", weights + code - limit
    return fails(f"{text}, {over:,} over {limit:,}") if over > 0 else holds(f"{text} of {limit:,}")


def self_contained(artifact: Path | None, tokenizer: Path, tokens: np.ndarray) -> AuditFinding:
    """C11: check that the script scores the artifact with only the tokenizer and a validation shard.

    tokens: (N,), the content of the shard. The script runs without this package, network and other programs,
    and may open files only in its own folder, in Python's and in the system's.
    """
    if artifact is None:
        return undecided("the run is not packed")
    script = build_script(sizes(artifact).sha256)
    foreign = sorted(_imported(script.readable) - ALLOWED - sys.stdlib_module_names)
    if foreign:
        return fails(f"the script imports {', '.join(foreign)}")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        (folder / "train_gpt.py").write_text(script.wrapped, encoding="utf-8")
        shutil.copyfile(artifact, folder / "model.pgolf")
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        write_shard(folder / "audit_val_000000.bin", tokens.astype(np.uint16))
        words = (folder / "train_gpt.py", "--data", folder, "--tokenizer", folder / "tokenizer.model")
        denied = {"modules": ("pgolf_fast",), "events": (*NETWORK, *PROGRAMS)}
        seen = run_guarded(_SCRIPT, words, **denied, cwd=folder, needs=ALLOWED)
        own = sorted(path.name for path in seen.opened if path.parent == folder and path.is_file())
        outside = [path for path in seen.opened if folder not in path.parents and not _is_installed(path)]
    if seen.refused:
        return fails(f"the script needs {', '.join(dict.fromkeys(seen.refused))}")
    if seen.status:
        return fails(f"the script fails: {seen.output.strip().splitlines()[-1]}")
    if outside:
        return fails(f"the script opens {', '.join(map(str, outside[:3]))}")
    return holds(f"imports {', '.join(sorted(ALLOWED))}; scores, opening {', '.join(own)}")


def _imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
    return names


def _is_installed(path: Path) -> bool:
    """Return whether a file belongs to Python, an installed package, or the system."""
    packages = [str(Path(str(s.origin)).parents[1]) for s in map(find_spec, ALLOWED) if s]
    roots = {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, *_SYSTEM, *packages}
    # importing PyTorch reads the entry points of all distributions on the path, wherever they are
    entry_points = path.name == "entry_points.txt" and path.parent.suffix in (".egg-info", ".dist-info")
    return entry_points or any(path.is_relative_to(Path(root).resolve()) for root in roots)


def within_time(
    folder: RunFolder | None, training_limit: float | None, evaluation_limit: float | None
) -> AuditFinding:
    """C12: check, from the run's logs, the seconds of training and of evaluation (all three scores)."""
    if folder is None:
        return undecided("an artifact does not record how long it took")
    training = max((row["elapsed"] for row in folder.history() if row["kind"] == "step"), default=None)
    evaluation, evidence, passed = _evaluation_seconds(folder), [], []
    limits = (("training", training, training_limit), ("evaluation", evaluation, evaluation_limit))
    for what, took, limit in limits:
        of = "" if limit is None else f" of {console.duration(limit)}"
        evidence.append(f"{what} {'not logged' if took is None else console.duration(took)}{of}")
        passed += [] if limit is None else [took is not None and took <= limit]
    if not passed:
        return undecided(f"{', '.join(evidence)}; no limit given (--train-limit, --eval-limit)")
    return AuditFinding(all(passed), ", ".join(evidence))


def validation_is_unseen(data: Path, seconds: float = _COMPARE_SECONDS) -> AuditFinding:
    """C18: check that the training shards hold no validation document, and few near copies of one."""
    if not shard_paths(data, "train"):
        return undecided(f"no training shards in {data}")
    found = find_overlap(data, seconds=seconds)
    if not found.by_chance:
        return fails(found.text)
    if found.complete:
        return undecided(f"{found.text}: this may be chance") if found.copies else holds(found.text)
    return undecided(f"{found.text}, in {seconds:g} s; `pgolf data info --overlap` compares all")


def _evaluation_seconds(folder: RunFolder) -> float | None:
    """Return the seconds of the last evaluation in the log, or None if it is not complete."""
    text = folder.log_file.read_text(encoding="utf-8", errors="replace") if folder.log_file.is_file() else ""
    last = {}
    names = r"^(?:\S+ [\d:]{8} )?(non-overlapping|sliding|sliding \+ TTT): done in (\S+)$"  # after the time
    for name, words in re.findall(names, text, re.M):
        last[name] = sum(float(n) * _SECONDS[u] for n, u in re.findall(r"([\d.]+)([hms])", words))
    return sum(last.values()) if len(last) == 3 else None
