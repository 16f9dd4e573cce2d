"""Weights from files as people save them: found by content and by name, or refused in one line."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import randomize_, tiny_config
from safetensors.torch import save_file

from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import load_weights, need_finite, not_finite, read_weights

MODEL = randomize_(GPT(tiny_config()), 0)
STATE = dict(MODEL.state_dict())
PREFIXES = (
    *("_orig_mod.", "module.", "model.", "module._orig_mod.", "module.module.", "_orig_mod.module.model."),
    "generator.",  # a prefix that nobody listed is found by the names behind it
)


def assert_state(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], STATE[name]) for name in STATE)


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in STATE.items()}


def refusal(path: Path, content: object, **options: object) -> str:
    """The message for a file of these bytes, or of what torch.save makes of an object."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, **options)
    with pytest.raises(PgolfError) as error:
        read_weights(path)
    text = str(error.value)
    assert "\n" not in text
    assert "weights_only" not in text
    assert "\x1b" not in text
    assert error.value.__cause__ is None, "a traceback would show torch's advice to load unsafely"
    return text.replace(str(path), "FILE")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT", ".safetensors", ""])
def test_the_content_decides_and_not_the_suffix(tmp_path, suffix):
    """By suffix, five of the seven were called damaged."""
    path = tmp_path / f"weights{suffix}"
    torch.save(STATE, path)
    assert_state(read_weights(path))
    save_file(STATE, path)
    assert_state(read_weights(path))
    torch.save(STATE, path, _use_new_zipfile_serialization=False)  # before PyTorch 1.6
    assert_state(read_weights(path))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off(tmp_path, prefix):
    torch.save(renamed(prefix), tmp_path / "w")
    assert_state(read_weights(tmp_path / "w"))


def test_wrappers_inside_names_are_taken_off(tmp_path):
    """Compiling blocks one by one puts `_orig_mod.` in the middle, where a prefix is not looked for."""
    inside = {name.replace("blocks.1.", "blocks.1._orig_mod."): t for name, t in STATE.items()}
    assert inside.keys() != STATE.keys()
    save_file(inside, tmp_path / "w")
    assert_state(read_weights(tmp_path / "w"))


@pytest.mark.parametrize(
    "keys", [("model",), ("state_dict",), ("model_state",), ("weights",), ("params",), ("checkpoint", "net")]
)
def test_weights_inside_a_training_checkpoint(tmp_path, keys):
    """Depth and name of the entry are free; optimizer state and settings beside it are no weights."""
    tree: object = renamed("module.")
    for key in reversed(keys):
        moments = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        tree = {"step": 7, "optimizer": moments, key: tree, "config": {"lr": 0.1}}
    torch.save(tree, tmp_path / "w")
    assert_state(read_weights(tmp_path / "w"))


def test_of_several_sets_the_first_that_is_no_average_is_taken_and_named(tmp_path, caplog, monkeypatch):
    """A plain search takes whichever comes first: here the average."""
    monkeypatch.setattr("pgolf_fast.model.weights.logger.propagate", True)
    average = {name: tensor + 1 for name, tensor in STATE.items()}
    momentum = {f"muon.{name}": tensor for name, tensor in average.items()}
    torch.save({"ema": average, "optimizer": momentum, "net": renamed("module.")}, tmp_path / "w")
    with caplog.at_level("INFO"):
        assert_state(read_weights(tmp_path / "w"))
    assert "took the weights under 'net.module'; it also holds 'ema', 'optimizer.muon'" in caplog.text
    assert torch.equal(read_weights(tmp_path / "w", "ema")["qo_bank"], STATE["qo_bank"] + 1)
    with pytest.raises(PgolfError, match=r"no weights under 'best', only under 'ema', 'optim"):
        read_weights(tmp_path / "w", "best")


def test_one_file_that_holds_itself(tmp_path):
    """Following every entry would not end."""
    tree: dict[str, object] = dict(STATE)
    tree["self"] = tree
    torch.save(tree, tmp_path / "w")
    assert_state(read_weights(tmp_path / "w"))


FILES = {
    b"": "is empty: download or copy it again",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "is a Git LFS pointer",
    b"<!DOCTYPE html><html>": "is an HTML or XML page, not weights: download the file itself",
    b"\n  <html lang='de'>": "is an HTML or XML page",
    b'{"error": "not found"}': "is JSON, not weights",
    b"not found\n": "is text, not weights",
    b"\x89PGOLF\r\n\x01\x00\x00\x00": "is an artifact, which holds no float weights: `pgolf eval`",
    b"GGUF\x03\x00": "is of GGUF, NumPy or HDF5: give named tensors of torch.save or safetensors",
    b"\x1f\x8b\x08\x00": "is compressed: unpack it first",
    b"PK\x03\x04\x00\x00\x08": "is damaged, truncated or not of torch.save",
    b"\x00\x01\x02\xff" * 40: "is damaged, truncated or not of torch.save",
    pickle.dumps(STATE): "is damaged, truncated or not of torch.save",
}


@pytest.mark.parametrize("content", FILES, ids=[f"{content[:12]!r}" for content in FILES])
def test_other_files_are_named(tmp_path, content):
    """torch's own text for most of them advises to load with weights_only=False."""
    assert FILES[content] in refusal(tmp_path / "w.pt", content)


def test_zip_files_that_are_no_weights(tmp_path):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    assert "it is a zip file, such as TorchScript, but no state_dict()" in refusal(path, path.read_bytes())
    torch.save(STATE, path)
    for legacy in (False, True):
        torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
        assert "it is damaged, truncated" in refusal(path, path.read_bytes()[: path.stat().st_size // 2])
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PgolfError, match="cannot be read as tensors: it is damaged"):
        read_weights(path)
    with pytest.raises(PgolfError, match="is a folder, not a file of weights; `pgolf quantize` continues"):
        read_weights(tmp_path)


class Runs:
    """Pickled as a call."""

    def __init__(self, function: object, argument: str):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
def test_no_pickled_code_runs(tmp_path, legacy):
    """Loading it as a plain pickle would create the file; torch's first line hides what was asked for."""
    trap, path = tmp_path / "trap", tmp_path / "w.pt"
    attacks = {
        "system": Runs(os.system, f"touch {trap}"),
        "eval": Runs(eval, f"open({str(trap)!r}, 'w')"),
        "GPT": MODEL,
    }
    for name, attack in attacks.items():
        content = {"model": STATE, "step": attack}
        text = refusal(path, content, _use_new_zipfile_serialization=not legacy)
        assert f"{name}, and no code of a file is run" in text
        assert not trap.exists()


ODD = {
    "int8 codes without their scales": lambda t: (t * 30).to(torch.int8),
    "int64": lambda t: t.long(),
    "bool": lambda t: t > 0,
    "complex64": lambda t: t.to(torch.complex64),
    "sparse_coo": lambda t: t.to_sparse(),
    "no values": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_no_weights_are_named(tmp_path, kind):
    """Copied into the model, codes and the real part of complex numbers would pass for weights."""
    text = refusal(tmp_path / "w", {**STATE, "kv_bank": ODD[kind](STATE["kv_bank"])})
    assert text == f"FILE: kv_bank holds {kind}: give dense floating-point weights"


def test_a_tensor_larger_than_its_file(tmp_path):
    """4 bytes that claim to be a matrix of 4 TB: converting them would take all memory."""
    huge = torch.zeros(()).expand(10**6, 10**6)
    assert "kv_bank is larger than its values" in refusal(tmp_path / "w", {**STATE, "kv_bank": huge})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_types_and_parameters_are_weights(tmp_path, dtype):
    torch.save({n: torch.nn.Parameter(t.to(dtype)) for n, t in STATE.items()}, tmp_path / "w")
    model = GPT(tiny_config())
    load_weights(model, read_weights(tmp_path / "w"), "w")
    assert torch.equal(model.qo_bank, STATE["qo_bank"].to(dtype).float())


def test_values_that_are_not_finite_are_counted():
    tensor = torch.ones(4, 1024, dtype=torch.float64)
    assert not_finite(tensor) is None
    tensor[0, :5] = torch.nan
    tensor[1, 0] = 1e39  # finite, but not in float32
    assert not_finite(tensor) == "5 of 4,096 values are NaN and 1 of 4,096 values are infinite as float32"
    with pytest.raises(PgolfError, match=r"w: b: 5 of 4,096 values are NaN and .* use an earlier checkpoint"):
        need_finite({"a": torch.ones(2), "b": tensor}, "w")
    assert not_finite(torch.zeros(0)) is None


def test_a_difference_is_shown_in_two_columns(tmp_path):
    """Only missing names were shown, so that it could not be seen how the others are called."""
    names = {name: name.replace("blocks.", "layers.") for name in STATE}
    other = {names[name]: tensor for name, tensor in STATE.items()} | {"skip_weights": torch.zeros(1, 32)}
    with pytest.raises(PgolfError) as error:
        load_weights(MODEL, other, "w.pt", table=True)
    head, header, _, first, *rest = str(error.value).splitlines()
    assert head == "w.pt holds another model, is it of another preset or --shrink? 17 differences: "
    assert header.split() == ["expected", "in", "the", "file"]
    assert first.split() == ["blocks.0.attn_scale", "layers.0.attn_scale"]
    assert len(rest) == 15
    with pytest.raises(PgolfError, match=r"17 differences: blocks.0.attn_scale / layers.0.attn_scale; "):
        load_weights(MODEL, other, "w.pt")


def test_files_without_weights_say_what_they_hold(tmp_path):
    assert refusal(tmp_path / "w", {"step": 1}) == "FILE is not a state dict of tensors: it holds only step"
    assert refusal(tmp_path / "w", [STATE]) == "FILE is not a state dict of tensors: it holds only list"
    torch.save({"model": {"module.wte.weight": torch.zeros(2)}, "step": 1}, tmp_path / "w")
    assert list(read_weights(tmp_path / "w")) == ["module.wte.weight"]
