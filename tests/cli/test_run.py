"""Commands from start to finish: what they print, write and refuse."""

import os
import re
import shutil
import string
from dataclasses import replace

import pytest
import torch
from data_helpers import real_data
from runs import call, make_dataset, pgolf, read_json, run_config, words

from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.load import load
from pgolf_fast.artifact.pack import read_quantized
from pgolf_fast.config.presets import tiny
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import train_tokenizer
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import plain_score
from pgolf_fast.quant.state import dequantize_state, unbank
from pgolf_fast.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A trained run that the commands below share; each gets its own files."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(run_config(data), folder)
    return folder


def refused(capsys, *arguments):
    """The one line that a rejected command prints."""
    status, out, err = call(capsys, *arguments)
    assert status == 2
    assert out == ""
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("pgolf: ")
    return lines[0]


def test_unknown_field_of_a_run(capsys, run):
    assert "did you mean --quant.bits?" in refused(capsys, "quantize", run, "--quant.bitz", "3")


def test_config_prints_every_field_and_the_count(capsys):
    status, out, _ = call(capsys, "config", "exp101", "--train.steps", "77", "--train.meta", "none")
    assert status == 0
    fields = dict(line.split(None, 1) for line in out.splitlines())
    assert fields["train.steps"] == "77"
    assert fields["train.meta"] == "none"
    assert fields["model.ve_layers"] == "[7, 8, 9, 10]"
    assert fields["parameters"] == "26,960,991"


def test_config_diff_shows_only_differences(capsys):
    _, out, _ = call(capsys, "config", "exp105a", "--diff", "exp101")
    rows = [line.split()[0] for line in out.splitlines()[2:]]
    assert rows
    assert all(row.startswith("train.meta") for row in rows)
    assert "do not differ" in call(capsys, "config", "exp101", "--diff", "exp101")[1]


def test_config_from_env(capsys, tmp_path):
    script = tmp_path / "run.sh"
    script.write_text("export ITERATIONS=123 STRANGE=1\nTRIGRAM=1 python train_gpt.py\n")
    _, out, _ = call(capsys, "config", "--from-env", script)
    assert "train.steps" in out
    assert "unknown, not translated: STRANGE" in out
    assert "model.trigram" in out


def test_doctor_checks_every_op(capsys):
    status, out, _ = call(capsys, "doctor", "--check")
    assert status == 0
    assert "gqa_attention" in out
    assert "WRONG" not in out
    assert out.count(" ok") >= 8


def test_data_info_on_the_real_files(capsys):
    folder = real_data() / "datasets"
    _, out, _ = call(capsys, "data", "info", folder / "webmix_sp1024")
    assert "1,256,769" in out
    assert "524,320" in out
    _, out, _ = call(capsys, "data", "info", folder / "smoke_sp1024")
    assert "90,060" in out


def test_tokenizer_of_another_size_is_refused(capsys, tmp_path, data):
    config = run_config(data)
    line = refused(
        capsys, "train", "tiny", "--out", tmp_path / "r", *words(config), "--model.vocab_size", "512"
    )
    assert "384" in line
    assert "512" in line
    assert not (tmp_path / "r" / "model.safetensors").exists()


def in_memory_bpb(folder):
    """The non-overlapping score of the quantized weights before they are packed."""
    config = folder.read_config()
    model = load(folder, "float", config=config).model
    model.load_state_dict(dequantize_state(read_quantized(folder)[0]), strict=True)
    source = open_source(config.data, config.model.vocab_size)
    stream = Stream(source.validation(config.eval_seq_len), source.table, torch.device("cpu"))
    return plain_score(model, stream, config).bpb


def test_from_training_to_text(capsys, run):
    """quantize, pack, eval and generate on one run; each refuses to run before the one it depends on."""
    folder = RunFolder(run)
    assert "run `pgolf quantize" in refused(capsys, "pack", run)
    assert "run `pgolf pack" in refused(capsys, "eval", run)
    status, out, _ = call(capsys, "quantize", run)
    assert status == 0
    assert "int6" in out
    status, out, _ = call(capsys, "pack", run, "--table", "--measure", "raw", "--json", run / "bytes.json")
    assert status == 0
    assert "blocks.0.mlp.fc.weight" in out
    packed = sizes(folder.artifact_file)
    assert read_json(run / "bytes.json")["total_bytes"] == packed.total_bytes
    assert f"{packed.total_bytes:,}" in out
    assert folder.artifact_file.stat().st_size == packed.total_bytes
    status, out, _ = call(capsys, "eval", run)
    assert status == 0
    for name in ("non-overlapping", "sliding", "sliding + TTT"):
        assert name in out
    first = read_json(run / "scores_artifact.json")
    # quantized weights score the same before packing and after
    assert first["non_overlapping"]["bpb"] == pytest.approx(in_memory_bpb(folder), abs=1e-6)
    call(capsys, "eval", run)
    assert read_json(run / "scores_artifact.json")["sliding"] == first["sliding"]
    assert call(capsys, "eval", run, "--weights", "packed")[0] == 0
    packed = read_json(run / "scores_packed.json")
    assert all(packed[name] == first[name] for name in ("non_overlapping", "sliding", "sliding_ttt"))
    status, out, _ = call(capsys, "eval", run, "--weights", "float")
    assert status == 0
    real = read_json(run / "scores_float.json")
    assert real["non_overlapping"]["bpb"] != first["non_overlapping"]["bpb"]
    assert real["non_overlapping"]["bpb"] == pytest.approx(first["non_overlapping"]["bpb"], rel=0.2)
    status, out, _ = call(capsys, "generate", run, "--prompt", "The ", "--tokens", "12")
    assert status == 0
    assert out.startswith("The")
    assert out == call(capsys, "generate", run, "--prompt", "The ", "--tokens", "12")[1]
    assert out != call(capsys, "generate", run, "--prompt", "The ", "--tokens", "12", "--seed", "1")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target-bytes 5000", "--quant.target-bytes has no effect: it needs --quant.grid rd"),
        ("--quant.rank 2", "--quant.rank has no effect: it needs --quant.grid rd"),
        ("--grid rd --quant.bits 4", "--quant.bits has no effect: it needs --quant.grid percentile"),
        ("--quant.method round --quant.damping 0.1", "--quant.damping has no effect: it needs --quant.m"),
        ("--quant.method round --quant.calibration-length 9", "--quant.calibration-length has no effect"),
        ("--score 0", "data.val_tokens is 0"),
    ],
)
def test_options_without_effect_are_refused(capsys, run, words, message):
    """The artifact stayed as large as it was, with status 0."""
    assert message in refused(capsys, "quantize", run, *words.split())


def test_codec_options_without_effect_are_refused(capsys, run):
    words = ("--pack.codecs", "raw", "--pack.lzma-preset", 3)
    message = refused(capsys, "pack", run, *words)
    assert "--pack.lzma-preset has no effect: it needs --pack.codecs lzma or rans" in message


def test_quantize_ends_with_its_error_and_score(capsys, data, run, tmp_path):
    """Numbers of tensors alone look the same for 8 bits and for 2."""
    folder = RunFolder(tmp_path / "run")
    folder.write_config(run_config(data, quant__method="round", data__val_tokens=512))
    for name in ("model.safetensors", "tokenizer.model"):
        shutil.copy(run / name, folder.path)
    errors, scores = [], []
    for bits in (8, 2):
        words = ("--quant.bits", bits, "--quant.grid", "percentile", "--score", 512)
        status, out, log = call(capsys, "quantize", folder.path, *words)
        assert status == 0
        row = next(line.split() for line in out.splitlines() if line.startswith(f"int{bits} "))
        assert row[4] in unbank(load(folder, "float").model.state_dict())
        errors.append(float(row[2].rstrip("%")))
        scores.append([float(x) for x in re.findall(r"([\d.]+) (?:before|after)", out)])
        assert f"quantizing {folder.path}: grid percentile, method round" in log
    assert errors[0] < 1 < errors[1] / 10
    (float8, after8), (float2, after2) = scores
    assert float8 == float2
    assert abs(after8 - float8) < abs(after2 - float2)
    assert after2 == pytest.approx(in_memory_bpb(folder), abs=1e-4)


def test_grid_rd_meets_a_target(capsys, run):
    folder, target = RunFolder(run), 5_000
    status, _, _ = call(capsys, "quantize", run, "--grid", "rd", "--target-bytes", target)
    assert status == 0
    quant = read_quantized(folder)[1]
    assert (quant.grid, quant.target_bytes) == ("rd", target)
    call(capsys, "pack", run)
    assert target - 200 <= folder.artifact_file.stat().st_size <= target
    call(capsys, "eval", run)
    score = read_json(run / "scores_artifact.json")["non_overlapping"]["bpb"]
    assert score == pytest.approx(in_memory_bpb(folder), abs=1e-6)


def test_damaged_artifact_names_its_section(capsys, data, tmp_path):
    folder = train(run_config(data, train__steps=1), tmp_path / "run").folder
    call(capsys, "quantize", folder.path, "--quant.method", "round")
    call(capsys, "pack", folder.path)
    content = bytearray(folder.artifact_file.read_bytes())
    content[-5] ^= 0xFF
    folder.artifact_file.write_bytes(content)
    assert "section" in refused(capsys, "eval", folder.path)


def test_pack_refuses_what_cannot_fit(capsys, data, tmp_path):
    folder = train(run_config(data, train__steps=1), tmp_path / "run").folder
    call(capsys, "quantize", folder.path, "--quant.method", "round")
    line = refused(capsys, "pack", folder.path, "--pack.limit-bytes", "1000")
    assert "1,000" in line
    assert not folder.artifact_file.exists()


def test_sequence_longer_than_the_data(capsys, data, tmp_path):
    config = run_config(data)
    longer = replace(
        config, train=replace(config.train, seq_len=8192, micro_batch_tokens=8192, batch_tokens=8192)
    )
    line = refused(capsys, "train", "tiny", "--out", tmp_path / "r", *words(longer))
    assert "8192" in line or "8193" in line or "8,192" in line


def test_system_errors_are_one_line(capsys, tmp_path, data):
    config = words(run_config(data))
    (tmp_path / "file").write_text("x")
    assert "is a file: choose another --out" in refused(
        capsys, "train", "tiny", "--out", tmp_path / "file", *config
    )
    assert "Is a directory" in refused(capsys, "config", "--from-env", tmp_path)


def test_a_full_disk_while_metrics_are_written_is_one_line(capsys, tmp_path, data):
    """metrics.jsonl, which every step writes first, on a device that is always full."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    assert "no space is left" in call(capsys, "train", "tiny", "--out", out, *words(run_config(data)))[2]


def test_shards_of_another_tokenizer_are_refused(capsys, tmp_path, data):
    """Same number of pieces, other pieces: scores would be meaningless."""
    folder = train(run_config(data, train__steps=1), tmp_path / "run").folder
    call(capsys, "quantize", folder.path, "--quant.method", "round")
    call(capsys, "pack", folder.path)
    other = tmp_path / "other"
    shutil.copytree(data, other)
    train_tokenizer(
        ["completely different words " * 50, "äöü 1 2 3 " * 50, *string.printable], 384, other / "tokenizer"
    )
    assert "belong to tokenizer" in refused(capsys, "eval", folder.path, "--data", other)


@pytest.mark.slow
def test_published_weights_become_a_run(capsys, data, run, tmp_path):
    """A .pt of exactly the model's names is imported bit for bit; a missing name is rejected and named."""
    config = run_config(data)
    state = load(run, "float", config=config).model.state_dict()
    torch.save(state, tmp_path / "final_model.pt")
    out = tmp_path / "imported"
    weights = tmp_path / "final_model.pt"
    status, text, _ = call(capsys, "import", weights, "tiny", "--out", out, *words(config))
    assert status == 0
    assert "pgolf quantize" in text
    again = load(out, "float", config=config).model.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
    torch.save({k: v for k, v in state.items() if k != "smear.gate"}, tmp_path / "less.pt")
    less, other = tmp_path / "less.pt", tmp_path / "other"
    status, _, err = call(capsys, "import", less, "tiny", "--out", other, *words(config))
    assert status == 2
    assert err.splitlines()[-1].split() == ["smear.gate", "nothing"]
    assert not other.exists()
    assert "already holds a run" in refused(capsys, "import", weights, "tiny", "--out", out, *words(config))


TABLES = ("tokens seen", "bigram bpb", "sliding + TTT", "= total", "loss.png", "in total")


def test_demo_from_training_to_tables(capsys, data, tmp_path, monkeypatch):
    """The steps of the demo, on the tests' data set and a tiny model."""
    from pgolf_fast.cli import demo

    corpus = tmp_path / "corpus"
    shutil.copytree(data, corpus)
    (corpus / "info.json").write_text('{"unigram_bpb": 4.0, "bigram_bpb": 3.0}')
    monkeypatch.setattr(demo, "build_corpus", lambda vocab_size: corpus)
    monkeypatch.setattr(demo, "demo_config", lambda seconds, seed: replace(run_config(corpus), name="demo"))
    out = tmp_path / "demo"
    for _ in range(2):  # the second replaces the first
        status, printed, _ = call(capsys, "demo", "--out", out)
        assert status == 0
        for words_of_table in TABLES:
            assert words_of_table in printed
        assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "is not an earlier demo" in refused(capsys, "demo", "--seconds", "1", "--out", tmp_path)


def test_demo_trains_tiny_by_the_clock():
    from pgolf_fast.cli.demo import demo_config

    config = demo_config(7.0, 3)
    assert (config.name, config.model, config.ttt) == ("demo", tiny().model, tiny().ttt)
    assert (config.train.schedule, config.train.max_seconds, config.train.seed) == ("time", 7.0, 3)


@pytest.mark.slow
def test_demo_from_an_empty_cache_to_tables(tmp_path):
    """The whole pipeline with a few seconds of training, in a fresh process with an empty cache."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = pgolf("demo", "--seconds", "3", "--out", tmp_path / "demo", env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for words_of_table in TABLES:
        assert words_of_table in done.stdout
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
