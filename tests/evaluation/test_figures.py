"""Scores taken apart, and estimated before they are made."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf_fast import console
from pgolf_fast.cli import main
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.ttt import LoraConfig, TTTConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import ByteTable
from pgolf_fast.evaluation.adapters.registry import adapting_chunks
from pgolf_fast.evaluation.estimate import estimate, forward_flops, learning, windows_flops
from pgolf_fast.evaluation.figures import CLASSES, doubling, figures, spread, target_classes, token_classes
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import three_scores
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.io import save_tensors
from pgolf_fast.lab.report.plots import draw_scores
from pgolf_fast.model.gpt import GPT
from tests.helpers import randomize_
from tests.runs import make_dataset, run_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def config(data):
    return run_config(data, data__val_tokens=700, ttt__chunk_tokens=200, ttt__lr=0.05, ttt__epochs=2)


@pytest.fixture(scope="module")
def source(config):
    return open_source(config.data, config.model.vocab_size)


@pytest.fixture(scope="module")
def model(config, source):
    return randomize_(GPT(config.model, torch.from_numpy(source.table.has_leading_space)), 3)


def stream_of(config, source):
    return Stream(source.validation(config.eval_seq_len), source.table, CPU)


@pytest.fixture(scope="module", params=[False, True], ids=["once", "repeat_tail"])
def scored(request, config, source, model):
    config = replace(config, eval=replace(config.eval, repeat_tail=request.param))
    return three_scores(model, stream_of(config, source), config)


def nats_of(part):
    return part["tokens"] * (part["loss"] or 0.0)


def test_parts_add_up_to_each_score(scored, source):
    classes = token_classes(source.tokenizer)
    whole = {"non_overlapping": scored.plain, "sliding": scored.sliding, "sliding_ttt": scored.ttt.score}
    for name, scorer in scored.scorers.items():
        found = figures(scorer, classes)
        for parts in (found["by_class"], found["by_context"], found["by_document_tokens"]):
            assert sum(p["tokens"] for p in parts.values()) == whole[name].tokens
            assert sum(p["bytes"] for p in parts.values()) == whole[name].text_bytes
            assert sum(map(nats_of, parts.values())) == pytest.approx(whole[name].nats, rel=1e-12)
        assert tuple(found["by_class"]) == CLASSES
        assert found["by_class"]["BOS"]["bytes"] == 0
        assert found["by_class"]["BOS"]["bpb"] is None
        json.dumps(found, allow_nan=False)
    contexts = figures(scored.scorers["non_overlapping"], classes)["by_context"]
    assert list(contexts) == ["1-16", "17-32"]
    assert contexts["1-16"]["tokens"] == contexts["17-32"]["tokens"]


def test_each_target_is_of_one_class(source):
    """Against a plain reading of the pieces, in the order of the definition."""
    tokenizer, tokens = source.tokenizer, source.validation(32)
    byte = next(i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i))
    tokens = np.concatenate((tokens, [byte, 1, byte, byte, 1, 2, tokens[1]]))
    found = target_classes(tokens, token_classes(tokenizer))
    for before, target, index in zip(tokens[:-1].tolist(), tokens[1:].tolist(), found, strict=True):
        if tokenizer.is_silent(target):
            want = "BOS"
        elif tokenizer.is_silent(before):
            want = "after BOS"
        elif tokenizer.is_byte(target):
            want = "byte"
        else:
            want = "word start" if tokenizer.piece(target)[0] == "\u2581" else "within word"
        assert CLASSES[index] == want
    assert {CLASSES[i] for i in found} == set(CLASSES)


def test_parts_of_documents_and_contexts_are_the_right_ones(scored, source):
    """Loss by loss, slowly."""
    scorer = scored.scorers["sliding"]
    tokens, windows = scorer.stream.tokens.tolist(), scorer.windows
    starts = [i for i, t in enumerate(tokens[:-1]) if t == 1 or i == 0]
    nats = {"context": {}, "document": {}}
    place = 0
    for start, end, first in zip(windows.start, windows.end, windows.first, strict=True):
        for target in range(first, end):
            loss = float(scorer.losses[place])
            place += 1
            begin = max(s for s in starts if s <= target)
            length = min([s for s in starts if s > target] + [len(tokens) - 1]) - begin
            for part, value, low in (("context", target - start + 1, 16), ("document", length, 128)):
                high = low
                while high < value:
                    high *= 2
                name = f"{1 if high == low else high // 2 + 1}-{high}"
                nats[part][name] = nats[part].get(name, 0.0) + loss
    found = figures(scorer, token_classes(source.tokenizer))
    for part, want in (("by_context", nats["context"]), ("by_document_tokens", nats["document"])):
        assert {n: nats_of(p) for n, p in found[part].items() if p["tokens"]} == pytest.approx(want)


def test_buckets_double():
    assert doubling(np.array([1, 16, 17, 32, 33, 64, 65, 2048]), 16).tolist() == [0, 0, 1, 1, 2, 2, 3, 7]


def test_spread_of_a_made_up_case():
    losses = np.random.default_rng(0).permutation(np.arange(1, 101)).astype(np.float32) / 10
    found = spread(losses)
    quantiles, hardest = found["loss_quantiles"], found["loss_share_of_hardest_percent"]
    above = found["above_nats"]
    assert quantiles["p1"] == pytest.approx(0.199)  # 0.99 of the way from 0.1 to 0.2
    assert quantiles["p50"] == pytest.approx(5.05)
    assert quantiles["p99"] == pytest.approx(9.901)
    assert hardest["1"] == pytest.approx(100 / 5050)
    assert hardest["10"] == pytest.approx(sum(range(91, 101)) / 5050)
    assert hardest["50"] == pytest.approx(1 - 1275 / 5050)
    assert found["loss_share_of_easiest_half"] == pytest.approx(1275 / 5050)
    assert above["10"] == {"targets": 0, "loss": 0}
    assert above["7"] == {"targets": 0.3, "loss": pytest.approx(sum(range(71, 101)) / 5050)}


@pytest.mark.parametrize("adapter", ["sgd", "lora", "phased"])
def test_estimate_counts_what_the_evaluator_does(config, source, model, adapter, monkeypatch):
    monkeypatch.setattr("pgolf_fast.evaluation.estimate.SAMPLE_SECONDS", 0.0)
    lora = LoraConfig(segment_tokens=40, documents=2, epochs=2)
    config = replace(config, ttt=replace(config.ttt, adapter=adapter, batch_seqs=4, lora=lora))
    stream = stream_of(config, source)
    before = [p.detach().clone() for p in model.parameters()]
    guess = estimate(model, stream, config)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    done = three_scores(model, stream, config)
    assert [e.windows for e in guess] == [len(s.windows) for s in done.scorers.values()]
    assert [e.tokens for e in guess] == [done.plain.tokens, done.sliding.tokens, done.ttt.score.tokens]
    assert [e.updates for e in guess] == [0, 0, done.ttt.updates]
    assert done.ttt.updates > 0
    assert all(e.seconds > 0 for e in guess)
    assert guess[0].flops < guess[1].flops < guess[2].flops


def test_operations_of_a_sliding_pass_are_those_of_its_windows(config):
    """Counted window by window; 700 targets in windows of 32 every 16."""
    windows = sliding_windows(704, 32, 16)
    model = config.model
    whole, cut = forward_flops(model, 32, 32), forward_flops(model, 32, 16)
    assert cut < whole
    assert windows_flops(model, windows) == pytest.approx(whole + (len(windows) - 1) * cut)
    stream = Stream(np.ones(705, np.uint16), _flat_table(), CPU)
    ttt = TTTConfig(chunk_tokens=100, batch_seqs=2, epochs=3)
    learned = learning(adapting_chunks(windows, stream, ttt)[1], ttt, model, 32)
    assert learned.updates == 7 * 3 * 2  # 7 chunks of 100 are followed by another; 3 sequences, 2 at once
    assert learned.chunks == pytest.approx(7 * 3 * 3 * 3 * whole)


def _flat_table():
    return ByteTable(np.ones(4, np.int16), np.zeros(4, bool), np.zeros(4, bool))


def test_eval_command_prints_writes_and_draws(capsys, config, model, source, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    shutil.copyfile(source.tokenizer.path, folder.tokenizer_file)
    save_tensors(folder.model_file, model.state_dict(), {})
    words = ["eval", str(folder.path), "--weights", "float"]
    assert main([*words, "--estimate"]) == 0
    out = capsys.readouterr().out
    assert "measured with the float weights" in out
    assert not list(folder.path.glob("scores_*"))
    assert main([*words, "--figures"]) == 0
    every = capsys.readouterr().out
    for title in (*CLASSES, "document tokens", "context", "easiest 50 %", "> 10", "p99"):
        assert title in every
    first = (folder.path / "scores_float.json").read_bytes()
    assert (folder.path / "scores_float.png").read_bytes()[1:4] == b"PNG"
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "word start" in shown
    assert "p99" not in shown
    assert (folder.path / "scores_float.json").read_bytes() == first


def test_estimate_of_a_preset_and_of_a_run_without_weights(capsys, config, source, tmp_path, data):
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    shutil.copyfile(source.tokenizer.path, folder.tokenizer_file)
    assert main(["eval", str(folder.path), "--estimate"]) == 0
    assert "measured with new weights" in capsys.readouterr().out
    assert main(["eval", "tiny", "--estimate", "--data", str(data)]) == 2  # another vocabulary, but a preset
    assert "384 pieces" in capsys.readouterr().err
    assert main(["eval", "pr301_tiny", "--estimate", "--data", str(data)]) == 2
    assert "384 pieces" in capsys.readouterr().err
    assert main(["eval", "tiny", "--data", str(data)]) == 2
    assert "run folder tiny does not exist" in capsys.readouterr().err


def test_without_matplotlib_there_is_no_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert draw_scores({}, tmp_path / "scores.png") is None


def test_progress_tells_the_running_score(monkeypatch):
    times, lines = iter(range(0, 1000, 11)), []
    monkeypatch.setattr(console.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: False)
    monkeypatch.setattr(console.logger, "info", lambda text, *values: lines.append(text % values))
    for _ in console.progress(range(3), "sliding + TTT", unit="chunk", note=lambda: "bpb 1.2345 so far"):
        pass
    assert lines[0] == "sliding + TTT: 1/3 chunk, bpb 1.2345 so far, 0.0909 chunk/s, ETA 22.0s"
