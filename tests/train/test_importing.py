"""`pgolf import` on files as others save them, and what the commands after it make of them."""

from __future__ import annotations

import shlex

import pytest
import torch
from runs import make_dataset, run_config, words
from safetensors.torch import save_file

from pgolf_fast import cli
from pgolf_fast.artifact.load import load
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.console import close_logging
from pgolf_fast.data.source import open_source
from pgolf_fast.distributed import SINGLE
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors
from pgolf_fast.quant.state import unbank
from pgolf_fast.train.loop import build_model


@pytest.fixture(autouse=True)
def logging():
    """Detach the log from the standard error of a test that has ended."""
    yield
    close_logging()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return run_config(make_dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def state(config):
    torch.manual_seed(0)
    return build_model(config, open_source(config.data, config.model.vocab_size), SINGLE).state_dict()


def imported(capsys, config, file, out, *more):
    """Exit status, standard output and standard error of `pgolf import`."""
    status = cli.main(["import", str(file), "tiny", *words(config), "--out", str(out), *more])
    captured = capsys.readouterr()
    return status, captured.out, captured.err.strip()


def test_the_next_command_can_be_typed_as_printed(capsys, config, state, tmp_path):
    """Unquoted, the shell would read three words and a command substitution."""
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "w.ckpt")
    out = tmp_path / "it's $(id) mine"
    status, text, _ = imported(capsys, config, tmp_path / "w.ckpt", out)
    assert status == 0
    command = text.partition("continue with `")[2].strip().removesuffix("`")
    assert shlex.split(command) == ["pgolf", "quantize", str(out)]
    tensors, metadata = load_tensors(out / "model.safetensors")
    assert all(torch.equal(tensors[name], state[name]) for name in state)
    assert metadata["imported"] == "w.ckpt"  # and no path of this machine
    assert "already holds a run" in imported(capsys, config, tmp_path / "w.ckpt", out)[2]


def test_unbanked_names_and_averages_can_be_imported(capsys, config, state, tmp_path):
    """The community's names were called those of another model."""
    average = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": unbank(state), "ema": unbank(average)}, tmp_path / "w")
    status, _, err = imported(capsys, config, tmp_path / "w", tmp_path / "a")
    assert status == 0
    assert "took the weights under 'model'; it also holds 'ema'" in err
    assert torch.equal(load_tensors(tmp_path / "a" / "model.safetensors")[0]["kv_bank"], state["kv_bank"])
    assert imported(capsys, config, tmp_path / "w", tmp_path / "b", "--key", "ema")[0] == 0
    kept = load_tensors(tmp_path / "b" / "model.safetensors")[0]
    assert torch.equal(kept["kv_bank"], average["kv_bank"])


def test_refusals_leave_no_run_behind(capsys, config, state, tmp_path):
    """NaN, an overflow and another size were imported, and `quantize` was what failed."""
    broken = {
        "6 of 3,072 values are NaN": {"mlp_up_bank": torch.full((1, 6), torch.nan)},
        "1 of 3,072 values are infinite": {"mlp_up_bank": torch.full((1, 1), 1e300, dtype=torch.float64)},
    }
    for message, changes in broken.items():
        wrong = {name: tensor.clone().double() for name, tensor in state.items()}
        for name, values in changes.items():
            wrong[name].view(-1)[: values.numel()] = values.flatten().double()
        save_file(wrong, tmp_path / "w")
        status, _, err = imported(capsys, config, tmp_path / "w", tmp_path / "out")
        assert status == 2
        count = wrong["mlp_up_bank"].numel()
        assert message.replace("3,072", f"{count:,}") in err
        assert err.startswith(f"pgolf: {tmp_path / 'w'}: mlp_up_bank: ")
        assert len(err.splitlines()) == 1
    save_file({name: tensor for name, tensor in state.items() if "smear" not in name}, tmp_path / "w")
    status, _, err = imported(capsys, config, tmp_path / "w", tmp_path / "out")
    assert status == 2
    assert err.splitlines()[-1].split() == ["smear.gate", "nothing"]
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_input(capsys, config, tmp_path):
    folder, empty = tmp_path / "run", tmp_path / "w.pt"
    RunFolder(folder).write_config(config)
    empty.touch()
    for file, message in ((folder, "is a folder, not a file of weights"), (empty, "is empty: download")):
        status, _, err = imported(capsys, config, file, tmp_path / "out")
        assert status == 2
        assert message in err
        assert len(err.splitlines()) == 1
    assert cli.main(["analyze", str(empty), "--out", str(tmp_path / "page")]) == 2
    assert "is empty: download or copy it again" in capsys.readouterr().err


def test_float_weights_with_nan_are_not_scored(config, state, tmp_path):
    """`eval --weights float` printed nan and ended with status 0."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    wrong = {name: tensor.clone() for name, tensor in state.items()}
    wrong["tok_emb.weight"][3, 0] = torch.inf
    save_file(wrong, folder.model_file)
    with pytest.raises(PgolfError, match=r"tok_emb.weight: 1 of 12,288 values are infinite"):
        load(folder, "float")
