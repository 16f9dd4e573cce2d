"""Windows, scores against a naive evaluator, and the rules of test-time training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluations import CPU, SEQ, adapted, byte_table, filled, stream_of, tiny_model
from evaluations import random_tokens as tokens
from helpers import tiny_config

from pgolf_fast.config.presets import exp101_as_run
from pgolf_fast.config.schema import QuantConfig, RunConfig, TTTConfig
from pgolf_fast.data.tokenizer import target_bytes
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Frozen
from pgolf_fast.evaluation.adapters.descent import chunk_lr, trainable_parameters
from pgolf_fast.evaluation.score import Score, Stream
from pgolf_fast.evaluation.scores import three_scores
from pgolf_fast.evaluation.windows import plain_windows, sliding_windows
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.state import bank_grids, dequantize_state, quantize_state


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def table():
    return byte_table()


def scored_targets(windows):
    return np.concatenate([np.arange(f, e) for f, e in zip(windows.first, windows.end, strict=True)])


@pytest.mark.parametrize("count", [1, 5, 15, 16, 17, 64, 100, 257])
@pytest.mark.parametrize("stride", [1, 3, 4, 16])
def test_every_target_is_scored_once(count, stride):
    windows = sliding_windows(count, SEQ, stride)
    assert np.array_equal(scored_targets(windows), np.arange(count))
    assert (windows.end - windows.start <= SEQ).all()
    assert np.array_equal(scored_targets(plain_windows(count, SEQ)), np.arange(count))


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_sliding_windows_give_every_target_its_context(stride):
    """After the first window, a scored target sees at least seq_len - stride tokens before it."""
    windows = sliding_windows(200, SEQ, stride)
    for start, end, first in zip(windows.start[1:], windows.end[1:], windows.first[1:], strict=True):
        assert first - start >= SEQ - stride
        assert end > first


def test_repeat_tail_gives_the_windows_of_the_published_run():
    """62,021,632 targets at length 2048 and stride 64: window and chunk counts of PR 1501's evaluation."""
    count = 62_021_632
    windows = sliding_windows(count, 2048, 64, repeat_tail=True)
    assert len(windows) == 969_088
    chunks = math.ceil(count / 65_536)
    assert chunks == 947
    per_chunk = np.bincount(np.minimum(windows.first // 65_536, chunks - 1))
    assert per_chunk[0] == 993
    assert (per_chunk[1:-1] == 1024).all()
    assert per_chunk[-1] == 415
    assert int((windows.end - windows.first).sum()) == count + 1_984
    assert len(sliding_windows(count, 2048, 64)) == 969_088 - 31


def test_bad_windows_are_rejected():
    with pytest.raises(PgolfError, match="stride 17 must be between 1 and the window length 16"):
        sliding_windows(100, 16, 17)
    with pytest.raises(PgolfError, match="nothing to score: 0 targets"):
        plain_windows(0, 16)


def naive(model, stream_tokens, table, seq_len, stride):
    """Score one window and one target at a time."""
    total = Score()
    ids = torch.from_numpy(stream_tokens.astype(np.int64))
    done = 0
    while done < len(ids) - 1:
        end = min(seq_len if done == 0 else done + stride, len(ids) - 1)
        start = 0 if done == 0 else max(0, (done + stride) - seq_len)
        losses = model.token_losses(ids[None, start:end], ids[None, start + 1 : end + 1])[0]
        for t in range(done, end):
            size = target_bytes(table, ids[t : t + 1].numpy(), ids[t + 1 : t + 2].numpy())
            total = total + Score(float(losses[t - start]), 1, int(size[0]))
        done = end
    return total


@pytest.mark.parametrize(("stride", "count"), [(4, 130), (16, 130), (1, 60), (5, 131)])
def test_scores_match_a_naive_evaluator(model, table, stride, count):
    data = tokens(count)
    want = naive(model, data, table, SEQ, stride)
    windows = sliding_windows(count - 1, SEQ, stride)
    got = filled(Frozen(model).score, stream_of(data), windows, batch=3).sums(0, len(windows))
    assert got.nats == pytest.approx(want.nats, rel=1e-6)
    assert (got.tokens, got.text_bytes) == (want.tokens, want.text_bytes)
    assert got.bpb == pytest.approx(want.nats / math.log(2) / want.text_bytes)


def test_batch_size_does_not_matter(model, table):
    stream = Stream(tokens(200), table, CPU)
    windows = sliding_windows(199, SEQ, 4)
    filled_by = [filled(Frozen(model).score, stream, windows, batch=b) for b in (1, 7, 64)]
    scores = [scorer.sums(0, len(windows)).nats for scorer in filled_by]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-7)


TTT = TTTConfig(chunk_tokens=64, epochs=2, lr=0.05, batch_seqs=2, parameters="all", quantize_forward="none")


def run_ttt(model, data, table, config=TTT, stride=4):
    stream = Stream(data, table, CPU)
    windows = sliding_windows(stream.num_targets, SEQ, stride)
    return adapted(model, stream, windows, config)


def test_ttt_scores_do_not_depend_on_later_tokens(model, table):
    """Two streams that differ from token 150 on have the same running score up to that chunk."""
    first = tokens(300)
    second = first.copy()
    second[150:] = tokens(150, seed=9)
    a, b = run_ttt(model, first, table).by_chunk, run_ttt(model, second, table).by_chunk
    assert a[1] == b[1]  # chunks 0 and 1 hold targets up to token 128
    assert a[2] != b[2]


def test_ttt_never_trains_on_the_last_chunk_or_on_unscored_targets(model, table):
    result = run_ttt(model, tokens(64 * 3 + 41), table)
    assert len(result.by_chunk) == 4
    assert result.updates == 3 * 2 * 2  # three chunks, two epochs, two batches of two sequences of 16
    assert result.score.tokens == 64 * 3 + 40
    one = run_ttt(model, tokens(60), table)
    assert one.updates == 0


def test_ttt_rejects_windows_that_leave_targets_unscored(model, table):
    """Unscored targets are caught before a gradient step uses them."""
    stream = Stream(tokens(200), table, CPU)
    windows = sliding_windows(199, SEQ, 4)[::2]
    with pytest.raises(AssertionError, match="would use unscored targets"):
        adapted(model, stream, windows, TTT)


def test_ttt_restores_weights_gradients_and_flags_even_after_an_error(model, table, monkeypatch):
    model.allocate_gradient_banks()
    model.qo_bank.grad.fill_(7.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def broken(*_, **__):
        raise RuntimeError("stop")

    monkeypatch.setattr("torch._fused_sgd_", broken)
    with pytest.raises(RuntimeError, match="stop"):
        run_ttt(model, tokens(300), table)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    assert (model.qo_bank.grad == 7.0).all()


def test_zero_epochs_equal_the_sliding_score(model, table):
    data = tokens(300)
    windows = sliding_windows(299, SEQ, 4)
    plain = filled(Frozen(model).score, stream_of(data), windows).sums(0, len(windows))
    without = run_ttt(model, data, table, replace(TTT, epochs=0))
    assert without.score.nats == pytest.approx(plain.nats, rel=1e-9)
    assert run_ttt(model, data, table).score.nats != pytest.approx(plain.nats, rel=1e-4)


def test_zero_epochs_on_an_artifact_equal_the_sliding_score_exactly(model, table):
    """Test-time training rounds to the artifact's own grid, which leaves its weights unchanged."""
    settings = QuantConfig(method="round", grid="percentile", percentiles=(0.999,))
    quantized = quantize_state(model.state_dict(), settings)
    model.load_state_dict(dequantize_state(quantized))
    config = replace(RunConfig(model=tiny_config()), quant=settings)
    config = replace(config, eval=replace(config.eval, stride=4, seq_len=SEQ))
    grid = bank_grids(quantized)
    stream = Stream(tokens(300), table, CPU)
    still = replace(config, ttt=replace(TTT, epochs=0, quantize_forward="banks"))
    scores = three_scores(model, stream, still, grid)
    assert scores.ttt.score.nats == pytest.approx(scores.sliding.nats, rel=1e-12)
    moving = replace(config, ttt=replace(TTT, lr=1.0, quantize_forward="banks"))
    assert three_scores(model, stream, moving, grid).ttt.score.nats != pytest.approx(
        scores.sliding.nats, rel=1e-5
    )


def test_chunk_learning_rates_of_the_published_run():
    config = exp101_as_run().ttt
    for chunk, lr in ((0, 0.004), (1, 0.00399998897), (100, 0.00389072459), (473, 0.002), (900, 2.3291e-5)):
        assert chunk_lr(config, chunk, 947) == pytest.approx(lr, rel=1e-4)
    assert chunk_lr(config, 945, 947) == pytest.approx(1.1e-8, rel=0.01)


def test_published_run_adapts_all_but_4112_parameters():
    with torch.device("meta"):
        model = GPT(exp101_as_run().model, torch.zeros(1024, dtype=torch.bool))
    assert sum(p.numel() for p in trainable_parameters(model, exp101_as_run().ttt)) == 26_956_879


def test_three_scores_are_reported_together(model, table):
    config = RunConfig(model=tiny_config())
    config = replace(config, eval=replace(config.eval, stride=4, seq_len=SEQ), ttt=TTT)
    scores = three_scores(model, Stream(tokens(257), table, CPU), config)
    assert [row[0] for row in scores.table().rows] == ["non-overlapping", "sliding", "sliding + TTT"]
    values = scores.to_dict()
    assert (
        values["non_overlapping"]["tokens"]
        == values["sliding"]["tokens"]
        == values["sliding_ttt"]["tokens"]
        == 256
    )
    assert values["sliding_ttt"]["bpb"] == scores.ttt.by_chunk[-1].bpb


def test_empty_stream_is_rejected(table):
    with pytest.raises(PgolfError, match="the stream has 1 tokens and needs at least 2"):
        Stream(tokens(1), table, CPU)
