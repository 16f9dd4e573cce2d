"""Resuming: one process a folder, the newest checkpoint that is whole, the run's own settings, moved data."""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_same, make_dataset, read_json, run_config, words
from safetensors.torch import load_file, save_file

from pgolf_fast import cli
from pgolf_fast.config.run_folder import RunFolder, stale
from pgolf_fast.console import read_metrics
from pgolf_fast.data.shards import find_shards, write_shard
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors, save_tensors
from pgolf_fast.train import loop
from pgolf_fast.train.checkpoint import check_folder, checkpoints, newest_whole
from pgolf_fast.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run with checkpoints of steps 7 and 8, which the tests below copy."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(run_config(data, train__checkpoint_minutes=0.0), out).folder


@pytest.fixture
def run(trained, tmp_path):
    return RunFolder(Path(shutil.copytree(trained.path, tmp_path / "my run")))


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(loop.console.logger, "warning", found.append)
    return found


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def foreign(path):
    """A whole file of tensors, of no training run."""
    save_tensors(path, {"x": torch.zeros(2)}, {})


def of_another_seed(path):
    tensors, metadata = load_tensors(path)
    metadata["config"]["train"]["seed"] = 7
    save_tensors(path, tensors, metadata)


def changed(path, tensor=None, **values):
    tensors, metadata = load_tensors(path)
    if tensor is not None:
        tensors[tensor].view(-1)[3] = float("nan")
    save_tensors(path, tensors, {**metadata, **values})


DAMAGES = {
    "of a diverged run": (lambda path: changed(path, "model.qo_bank"), "qo_bank: 1 of .* values are NaN"),
    "an endless clock": (lambda path: changed(path, elapsed=float("inf")), "elapsed: 1 of 1 values"),
    "a step of text": (lambda path: changed(path, step="8"), "is not a checkpoint of a training run"),
    "no schedule": (lambda path: changed(path, schedule=None), "is not a checkpoint of a training run"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged or another kind"),
    "empty": (lambda path: path.write_bytes(b""), "damaged or another kind"),
    # without a checksum both would train on: the file is as well-formed as before
    "flipped weight": (lambda path: flip_bit(path, -5), "do not match their checksum"),
    "flipped clock": (
        lambda path: flip_bit(path, path.read_bytes().index(b"elapsed") + 14),
        "do not match their checksum|damaged",
    ),
    "another program's": (foreign, "is not a checkpoint of a training run"),
    "a text": (lambda path: path.write_text("<html>not found</html>"), "damaged or another kind"),
    # two trainings in one folder left this: one run's settings with another's weights
    "another seed's": (of_another_seed, "other settings: train.seed was 7 and is 42"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_aloud(run, warnings, damage):
    spoil, reason = DAMAGES[damage]
    older, newest = checkpoints(run.checkpoints)
    spoil(newest)
    found = newest_whole(run, run.read_config())
    assert (found.path, found.metadata["step"], found.damaged) == (older, 7, (newest,))
    (warning,) = warnings
    assert warning.startswith(f"{newest} ")
    assert warning.endswith(f"; continuing from {older} instead")
    shutil.copy(newest, older)
    with pytest.raises(
        PgolfError, match=rf"(?s)no checkpoint of .*my run can be used: .*step_00000008.*{reason}"
    ) as all_bad:
        newest_whole(run, run.read_config())
    assert "remove them to train from the start" in str(all_bad.value)
    assert "\n" not in str(all_bad.value)


def test_after_falling_back_the_run_ends_as_if_nothing_had_happened(run, trained, capsys):
    newest = checkpoints(run.checkpoints)[-1]
    os.truncate(newest, 5000)
    run.model_file.unlink()
    assert cli.main(["train", "--resume", str(run.path)]) == 0
    log = capsys.readouterr().err
    assert f"instead\nresumed from {run.checkpoints}/step_00000007.safetensors at step 7\n" in log
    assert_same(load_file(run.model_file), load_file(trained.model_file))
    # set aside: by its name it would be the newest, and keep better ones from being kept
    assert newest.with_name(f"{newest.name}.damaged").exists()


def test_checkpoints_of_earlier_versions_have_no_checksum(run):
    newest = checkpoints(run.checkpoints)[-1]
    tensors, metadata = load_tensors(newest)
    del metadata["loader"]["tokens"]
    save_file(tensors, newest, metadata={"metadata": json.dumps(metadata)})
    assert train(run.read_config(), run.path, resume=True).steps == 8


def test_damaged_final_weights_are_an_error_for_later_commands(run, capsys):
    """A flipped bit in a weight would be quantized, packed and scored like any other."""
    flip_bit(run.model_file, -5)
    assert cli.main(["quantize", str(run.path)]) == 2
    err = capsys.readouterr().err
    assert "model.safetensors is damaged: its contents do not match their checksum" in err
    assert len(err.splitlines()) == 1


def test_one_process_trains_in_a_folder(data, run, capsys):
    """Without a lock both trainings succeed: one's configuration stays with the other's weights."""
    before = run.config_file.read_bytes()
    with run.lock():
        for resume in ([], ["--resume"]):
            changed = words(run_config(data, train__seed=7))
            assert cli.main(["train", "tiny", *changed, *resume, "--out", str(run.path)]) == 2
            err = capsys.readouterr().err
            assert f"my run is in use: process {os.getpid()} on {socket.gethostname()} has held" in err
            assert len(err.splitlines()) == 1
    assert run.config_file.read_bytes() == before
    (run.path / ".step_x.4321.tmp").touch()  # of a process that was killed
    assert train(run.read_config(), run.path, resume=True).steps == 8
    assert not (run.path / ".step_x.4321.tmp").exists()


def test_the_lock_is_held_to_the_end(data, tmp_path, monkeypatch):
    seen = []
    finish = loop._Run._finish

    def finish_and_try(self):
        result = finish(self)
        with pytest.raises(PgolfError, match="is in use"):
            train(run_config(data), tmp_path / "run", resume=True)
        seen.append(result)
        return result

    monkeypatch.setattr(loop._Run, "_finish", finish_and_try)
    train(run_config(data, train__steps=1), tmp_path / "run")
    assert seen


def test_resuming_without_a_checkpoint_says_that_it_starts_anew(run, capsys):
    """Final weights that are still there are kept under another name."""
    shutil.rmtree(run.checkpoints)
    assert cli.main(["train", "--resume", str(run.path), "--train.steps", "1"]) == 0
    err = capsys.readouterr().err
    assert f"{run.path} has no checkpoint to resume from: training starts anew" in err
    assert stale(run.model_file).exists()
    assert [row["step"] for row in run.history() if row["kind"] == "step"] == [1]


def test_settings_are_free_while_there_is_nothing_to_keep(data, tmp_path):
    """After a run that ran out of memory in its first step, smaller sizes need no new folder."""
    folder = RunFolder(tmp_path)
    folder.write_config(run_config(data))
    assert check_folder(folder, run_config(data, train__seq_len=16), resume=True)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "step_00000001.safetensors").touch()
    with pytest.raises(PgolfError, match=r"other settings: train.seq_len was 32 and is 16"):
        check_folder(folder, run_config(data, train__seq_len=16), resume=True)
    assert check_folder(folder, run_config(data, train__micro_batch_tokens=32), resume=True)
    folder.config_file.unlink()
    with pytest.raises(PgolfError, match="already holds a run"):  # whose checkpoints would be taken for ours
        check_folder(folder, run_config(data), resume=False)


def resumed(capsys, *arguments):
    """Status and standard error of `pgolf train` with these arguments."""
    status = cli.main(["train", *map(str, arguments)])
    return status, capsys.readouterr().err


def test_every_way_to_name_the_run_that_continues(data, run, capsys, monkeypatch):
    seen = []

    def fake(config, out, **options):
        seen.append((config, Path(out), options["resume"]))
        raise PgolfError("enough")

    monkeypatch.setattr(loop, "train", fake)
    config, out = run.read_config(), run.path
    for arguments in (["--resume", out], [out, "--resume"], ["--resume", "--out", out]):
        resumed(capsys, *arguments)
        assert seen.pop() == (config, out, True)
    resumed(capsys, "--resume", out, "--train.steps", "9", "--data.path", "elsewhere")
    longer = replace(
        config, train=replace(config.train, steps=9), data=replace(config.data, path="elsewhere")
    )
    assert seen.pop()[0] == longer
    resumed(capsys, "tiny", "--resume", "--out", out)
    assert seen.pop()[0].name == "tiny"
    monkeypatch.chdir(run.path.parent)
    run.path.rename("tiny")
    _, *command = RunFolder(Path("tiny")).resume_command().split()
    assert command == ["train", "--resume", "./tiny"]
    cli.main(command)
    assert seen.pop()[1] == Path("tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "run folder nowhere does not exist"),
        (["--resume", "."], "is not a run folder: it has no config.json"),
        (["--resume"], "train needs PRESET"),
        (["--resume", "RUN", "--shrink", "tiny"], "takes no --shrink and no other --out"),
        (["--resume", "RUN", "--out", "b"], "takes no --shrink and no other --out"),
        (["RUN"], "unknown preset"),
        (
            ["--resume", "RUN", "--train.seq-len", "16"],
            "cannot be resumed with other settings: train.seq_len",
        ),
    ],
)
def test_a_run_that_cannot_be_continued_so(run, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, err = resumed(capsys, *(str(run.path) if word == "RUN" else word for word in arguments))
    assert (status, len(err.splitlines())) == (2, 1), err
    assert message in err


def test_data_that_moved_is_accepted_and_other_data_is_refused(data, run, tmp_path, capsys):
    """Same sizes are no proof: shards of one length are common, and so are tokenizers of one size."""
    before = run.config_file.read_bytes()
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    other = Path(shutil.copytree(data, tmp_path / "other"))
    (shard,) = find_shards(other, "train")
    write_shard(shard.path, shard.tokens[::-1].copy())
    status, err = resumed(capsys, "--resume", run.path, "--data.path", other)
    assert (status, run.config_file.read_bytes()) == (2, before)
    assert "cannot resume the data: tokens was" in err.splitlines()[-1]
    write_shard(shard.path, shard.tokens[:-1].copy())
    assert (
        "total_tokens was 126061 and is now 126060"
        in resumed(capsys, "--resume", run.path, "--data.path", other)[1]
    )
    other = Path(shutil.copytree(data, tmp_path / "third"))
    tokenizer = other / "tokenizer.model"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\x1a\x00")  # an empty field more
    status, err = resumed(capsys, "--resume", run.path, "--data.path", other)
    assert status == 2
    assert f"{tokenizer} is not the tokenizer of this run: set data.tokenizer to " in err.splitlines()[-1]
    assert run.config_file.read_bytes() == before
    assert resumed(capsys, "--resume", run.path, "--data.path", moved, "--train.steps", "9")[0] == 0
    assert run.read_config().data.path == str(moved)
    assert (
        read_metrics(run.metrics_file)[-5]["changed"][0]
        == f"data.path was {str(data)!r} and is {str(moved)!r}"
    )


CONFIGS = {
    "empty object": (lambda text: "{}", "has lost model, data, train, quant, eval"),
    "list": (lambda text: "[]", "holds a JSON list"),
    "lost group": (
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "quant"}),
        "lost quant",
    ),
    "truncated": (lambda text: text[:100], "is not valid JSON"),
    "wrong type": (
        lambda text: text.replace('"seed": 42', '"seed": "x"'),
        "train.seed is 'x'; it must be int",
    ),
    "newer": (lambda text: text.replace('"seed": 42', '"sed": 42'), "unknown field train.sed"),
    "not UTF-8": (lambda text: text.replace("test", "tëst").encode("latin-1"), "not valid JSON in UTF-8"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_configuration_is_one_line_that_names_the_file(run, capsys, damage):
    """`{}` alone would be read as exp101."""
    change, message = CONFIGS[damage]
    content = change(run.config_file.read_text())
    run.config_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in (["train", "--resume", str(run.path)], ["report", str(run.path)]):
        assert cli.main(arguments) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "config.json" in err
        assert message in err


def test_damaged_lines_of_metrics_are_left_out_with_a_warning(run, warnings):
    whole = run.history()
    wrong = ['{"kind": "step", "step": "abc", "loss": 1}', '{"kind": "step", "step": 9, "elapsed": "1"}']
    wrong += [f'{{"kind": "step", "step": 9, "elapsed": 1{"0" * 400}}}']
    wrong += ['{"step": 3}', '{"kind": [], "step": 3}', "[" * 9999]
    with run.metrics_file.open("ab") as file:
        file.write("\n".join(wrong).encode() + b'\n{"kind": "\xff"}\n\xff\xfe\n')
    assert run.history() == whole
    assert warnings == [f"{run.metrics_file}: 5 damaged lines are left out"]
    assert train(run.read_config(), run.path, resume=True).steps == 8  # appends to it
    ends = [row for row in run.history() if row["kind"] == "end"]
    assert len(ends) == 1  # that of the process which went on


def test_a_full_disk_names_the_metrics_and_leaves_a_checkpoint(data, tmp_path, monkeypatch, capsys):
    """Every write to metrics.jsonl fails from step 3 on, and no other one does."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    read = loop._Run._read

    def limited(self, pending, before, after, *, last):
        if self.trainer.step == 3:
            size = self.folder.metrics_file.stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
        try:
            read(self, pending, before, after, last=last)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(loop._Run, "_read", limited)
    out = tmp_path / "run"
    assert cli.main(["train", "tiny", *words(run_config(data)), "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(
        f"pgolf: cannot write {out}/metrics.jsonl: it is larger than this process may write"
    )
    assert last.endswith(f"step_00000003.safetensors is kept: `pgolf train --resume {out}` continues from it")
    monkeypatch.undo()
    assert train(run_config(data), out, resume=True).steps == 8
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "step"]
    assert steps == [1, 2, 4, 5, 6, 7, 8]  # the truncated line is skipped, and the next one is whole


def test_a_shard_that_is_cut_short_ends_the_run_with_one_line(data, tmp_path, capsys):
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    (shard,) = find_shards(copy, "train")
    original = loop.Trainer.launch

    def launch(self):
        if self.step == 2:
            os.truncate(shard.path, 5000)
        return original(self)

    config = run_config(copy, train__checkpoint_minutes=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "launch", launch)
        assert cli.main(["train", "tiny", *words(config), "--out", str(tmp_path / "run")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"pgolf: {shard.path} was changed while it was being read: put back the shard")
    assert "safetensors is kept: `pgolf train --resume" in last
    shutil.copy(data / shard.path.name, shard.path)
    assert read_json(tmp_path / "run" / "config.json")["data"]["path"] == str(copy)
    assert train(config, tmp_path / "run", resume=True).steps == 8
