"""Scoring against a naive evaluator on real tokens, and independent of batches, threads and ranks."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import real_data
from evaluations import CPU, OneOf, adapted, filled, random_tokens, stream_of, tiny_model
from helpers import randomize_
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.config.presets import small
from pgolf_fast.config.schema import DataConfig, TTTConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import ByteTable
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Frozen, Scored, borrowed
from pgolf_fast.evaluation.adapters.descent import SGD, trainable_parameters
from pgolf_fast.evaluation.protocol import Ledger, score_and_adapt, target_chunks, window_chunks
from pgolf_fast.evaluation.score import Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import batches, plain_windows, sliding_windows
from pgolf_fast.model.gpt import GPT

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def naive_losses(model, tokens, seq_len, stride):
    """Return the loss of every target, one window at a time, right-padded, with all positions computed."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    losses = torch.zeros(len(ids) - 1)
    start = done = 0
    while done < len(losses):
        end = min(start + seq_len, len(losses))
        window = F.pad(ids[start:end], (0, seq_len - (end - start)))
        with torch.no_grad():
            logits = model.logits(window[None])[0, : end - start]
        found = F.cross_entropy(logits, ids[start + 1 : end + 1], reduction="none")
        losses[done:end] = found[done - start :]
        start, done = start + stride, end
    return losses


@functools.cache
def small_and_tokens():
    config = replace(DataConfig(), path=str(real_data() / "datasets" / "webmix_sp1024"))
    source = open_source(config, 1024)
    model = GPT(small().model, torch.from_numpy(source.table.has_leading_space))
    randomize_(model, 5)
    with torch.no_grad():
        model.tok_emb.weight *= 0.3  # losses of a size that a model has: 7 nats, not 20
    return model, source.validation(256), source.table


@pytest.mark.parametrize(
    ("seq_len", "stride", "targets"),
    [
        (256, 64, 256 + 3 * 64 + 37),
        (256, 16, 256 + 5 * 16 + 3),
        (200, 64, 512),
        (96, 1, 150),
        (2048, 64, 2048 + 64 + 11),  # longer than the model was made for: another RoPE base
        (2048, 2048, 2048 + 300),
        (256, 256, 100),  # one window, and shorter
    ],
)
def test_small_preset_matches_a_naive_evaluator_on_real_tokens(seq_len, stride, targets):
    model, tokens, table = small_and_tokens()
    tokens = tokens[1000 : 1000 + targets + 1]
    want = naive_losses(model, tokens, seq_len, stride)
    windows = sliding_windows(targets, seq_len, stride)
    size = batch_size(None, model.config, torch.float32, CPU)
    scorer = Scorer(Stream(tokens, table, CPU), windows, seq_len, size)
    total = scorer.score(Frozen(model).score, 0, len(windows))
    torch.testing.assert_close(scorer.losses, want, rtol=0, atol=1e-5)
    assert total.nats == pytest.approx(want.double().sum().item(), abs=1e-5 * targets)
    assert total.tokens == targets


def test_chunks_of_test_time_training_give_the_same_losses():
    """Without an update, chunk by chunk, and a last chunk shorter than a window."""
    model, tokens, table = small_and_tokens()
    tokens = tokens[: 2 * 512 + 78]
    stream, windows = Stream(tokens, table, CPU), sliding_windows(len(tokens) - 1, 256, 64)
    scorer = Scorer(stream, windows, 256, lambda length: 3)
    chunks = target_chunks(windows, stream.num_targets, 512)
    scores = score_and_adapt(Frozen(model), scorer, chunks, "test")
    assert [c.length for c in chunks] == [512, 512, 77]
    torch.testing.assert_close(scorer.losses, naive_losses(model, tokens, 256, 64), rtol=0, atol=1e-5)
    assert scores[-1].tokens == stream.num_targets
    assert scores[-1].text_bytes == stream.target_bytes.sum()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def stream():
    return stream_of(random_tokens(300))


@given(
    count=st.integers(1, 300),
    stride=st.integers(1, 16),
    size=st.integers(1, 9),
    repeat_tail=st.booleans(),
    share=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_batches_hold_each_window_once_and_have_one_shape(count, stride, size, repeat_tail, share):
    windows = sliding_windows(count, 16, stride, repeat_tail=repeat_tail)
    low = int(share * len(windows))
    found = batches(windows, low, len(windows), lambda length: size)
    assert [i for b in found for i in range(b.low, b.high)] == list(range(low, len(windows)))
    for batch in found:
        part = windows[batch.low : batch.high]
        assert (part.end - part.start == batch.length).all()
        assert (part.end - part.first == batch.scored).all()
        assert 1 <= len(part) <= batch.full <= size


def losses_by(model, stream, **options):
    windows = sliding_windows(stream.num_targets, 16, 4)
    return filled(Frozen(model).score, stream, windows, **options).losses


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_sum_to_the_same_bits(model, stream, world_size):
    shares = [losses_by(model, stream, world=OneOf(rank, world_size)) for rank in range(world_size)]
    assert all((share == 0).any() for share in shares)
    assert torch.equal(sum(shares), losses_by(model, stream))


def test_threads_and_padding_do_not_change_losses(model, stream):
    want, threads = losses_by(model, stream), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(losses_by(model, stream), want)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(losses_by(model, stream, batch=5, pad=True), want, rtol=1e-6, atol=1e-6)


def test_error_in_a_thread_is_raised(model, stream):
    def broken(tokens, targets, context):
        raise RuntimeError("stop")

    windows, threads = plain_windows(stream.num_targets, 16), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="stop"):
            Scorer(stream, windows, 16, lambda length: 4).score(broken, 0, len(windows))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf")])
def test_the_first_target_without_a_finite_loss_is_named(stream, value, shown):
    """A sum over all losses is NaN, and says nothing of where."""

    def losses(tokens, targets, context):
        return torch.where(tokens[:, -1:] == stream.tokens[40], value, torch.ones(targets.shape))

    windows = sliding_windows(stream.num_targets, 16, 1)
    first = int((stream.tokens[15:] == stream.tokens[40]).nonzero()[0]) + 15
    with pytest.raises(PgolfError, match=rf"^the loss of target {first} is {shown}, one of \d+: activations"):
        Scorer(stream, windows, 16, lambda length: 4).score(losses, 0, len(windows))


def test_ledger_hands_over_a_copy_of_scored_tokens_only(stream):
    windows = sliding_windows(stream.num_targets, 16, 4)
    chunks, ledger = target_chunks(windows, stream.num_targets, 64), Ledger(stream)
    with pytest.raises(AssertionError, match=r"unscored targets in 0\.\.64"):
        ledger.hand_over(chunks[0])
    ledger.note(windows[: chunks[0].high])
    scored = ledger.hand_over(chunks[0])
    assert torch.equal(scored.tokens, stream.tokens[None, :65])
    assert scored.tokens.untyped_storage().nbytes() == 65 * 8
    with pytest.raises(AssertionError, match=r"unscored targets in 64\.\.128"):
        ledger.hand_over(chunks[1])


def test_chunks_of_the_published_run():
    windows = sliding_windows(62_021_632, 2048, 64, repeat_tail=True)
    chunks = target_chunks(windows, 62_021_632, 65_536)
    sizes = [chunk.high - chunk.low for chunk in chunks]
    assert (len(sizes), sizes[0], set(sizes[1:-1]), sizes[-1]) == (947, 993, {1024}, 415)
    assert chunks[-1].starts[0] + chunks[-1].length == 62_021_632
    frozen = window_chunks(windows, lambda length: 512)
    assert [(c.low, c.high) for c in frozen][-1] == (29 * 32_768, 969_088)


@pytest.mark.parametrize("parameters", ["all", "banks"])
def test_sgd_matches_torch(model, stream, parameters):
    """Gradient banks, clipping, momentum and update against autograd, clip_grad_norm_ and torch.optim.SGD."""
    config = TTTConfig(
        epochs=2, lr=0.3, batch_seqs=2, parameters=parameters, quantize_forward="none", grad_clip=0.5
    )
    scored = Scored(stream.tokens[None, :81], 1, 4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with borrowed(model):
        adapter = SGD(model, config, 16)
        adapter.adapt(scored)
        assert adapter.updates == 2 * 3
        got = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    trained = trainable_parameters(model, config)
    sgd = torch.optim.SGD(trained, lr=0.3 * 0.75, momentum=config.momentum)  # (1 + cos(pi / 3)) / 2
    for _ in range(2):
        for first in (0, 2, 4):
            count = min(2, 5 - first)
            span = stream.tokens[16 * first : 16 * (first + count) + 1]
            model.loss(span[:-1].view(count, 16), span[1:].view(count, 16)).backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
            assert norm > config.grad_clip
            sgd.step()
            model.zero_grad()
    moved = 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name)
        moved += not torch.equal(got[name], before[name])
    assert moved == len(trained)


def test_sgd_resumes_from_its_state(model, stream):
    config = TTTConfig(epochs=1, lr=0.3, batch_seqs=2, quantize_forward="banks")
    first, second = (Scored(stream.tokens[None, 64 * i : 64 * i + 65], i, 4) for i in range(2))
    x, y = stream.tokens[None, 100:116], stream.tokens[None, 109:117]
    found = []
    with borrowed(model):
        adapter = SGD(model, config, 16)
        adapter.adapt(first)
        kept = {name: tensor.clone() for name, tensor in adapter.state().items()}
        adapter.adapt(second)
        found.append((adapter.updates, adapter.score(x, y, 16)))
    with borrowed(model):
        adapter = SGD(model, config, 16)
        fresh = adapter.score(x, y, 16)
        adapter.load_state(kept)
        adapter.adapt(second)
        found.append((adapter.updates, adapter.score(x, y, 16)))
    assert found[0][0] == found[1][0] == 4
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], fresh)


def test_scoring_and_adapting_compile_to_one_graph(model, stream):
    compile_ = functools.partial(torch.compile, dynamic=False, fullgraph=True, backend="aot_eager")
    x, y = stream.tokens[:32].view(2, 16), stream.tokens[1:33].view(2, 16)
    eager = Frozen(model).score(x, y[:, -4:], 40)
    frozen = Frozen(model)
    frozen._batched = compile_(model.token_losses)
    fast = frozen.score(x, y[:, -4:], 40)
    torch.testing.assert_close(fast, eager)
    config, found = TTTConfig(epochs=1, lr=0.3, batch_seqs=2, quantize_forward="projections"), []
    for wrap in (lambda f: f, compile_):
        with borrowed(model):
            adapter = SGD(model, config, 16)
            adapter._loss = wrap(model.loss)
            adapter.adapt(Scored(stream.tokens[None, :65], 0, 4))
            found.append(adapter.score(x, y, 16))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@NO_GPU
def test_compiled_and_captured_evaluation_matches_eager_on_a_gpu(model, stream):
    model.to("cuda")
    on_gpu = Stream(stream.tokens.numpy(), ByteTable(*(np.ones(96, np.int16),) * 3), torch.device("cuda"))
    windows = sliding_windows(on_gpu.num_targets, 16, 4)
    for quantize in ("none", "banks", "projections"):
        config = TTTConfig(chunk_tokens=64, epochs=2, lr=0.05, batch_seqs=3, quantize_forward=quantize)
        found = [
            adapted(model, on_gpu, windows, config, compile=compile_, cuda_graph=graph)
            for compile_, graph in ((False, False), (False, True), (True, True))
        ]
        want = [score.nats for score in found[0].by_chunk]
        for other in found[1:]:
            assert other.updates == found[0].updates
            assert [score.nats for score in other.by_chunk] == pytest.approx(want, rel=1e-4)


@NO_GPU
def test_default_batch_fits_a_gpu(model):
    size = batch_size(None, small().model, torch.bfloat16, torch.device("cuda"))
    assert 1 <= size(2048) <= 512
    assert size(2048).bit_count() == 1
