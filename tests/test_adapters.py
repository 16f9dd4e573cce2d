"""Adapters of test-time training: their formulas, low-rank changes by document, and the rules they keep."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import randomize_, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.ttt import LoraConfig, TTTConfig
from pgolf_fast.data.tokenizer import ByteTable
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapt import AdamW, Scored, borrowed, trainable_parameters
from pgolf_fast.evaluation.adapters import make_adapter
from pgolf_fast.evaluation.documents import cut_at, document_chunks, document_starts
from pgolf_fast.evaluation.lora import Lora, changed_losses, fresh_factors
from pgolf_fast.evaluation.protocol import Chunk, Ledger, Segment, score_and_adapt
from pgolf_fast.evaluation.resume import Resume
from pgolf_fast.evaluation.score import Scorer, Stream, frozen_losses
from pgolf_fast.evaluation.ttt import adapting_chunks, legal_ttt
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.lab.compare.sweep import sweep
from pgolf_fast.model.gpt import GPT

CPU = torch.device("cpu")
SEQ, STRIDE = 16, 4
BASE = TTTConfig(
    chunk_tokens=64,
    epochs=2,
    lr=0.02,
    decay="constant",
    batch_seqs=2,
    parameters="all",
    freeze_blocks=1,
    quantize_forward="none",
    lora=LoraConfig(rank=3, lr=0.02, segment_tokens=16, epochs=2, documents=3),
)
CONFIGS = {
    "sgd": replace(BASE, adapter="sgd"),
    "adamw": replace(BASE, adapter="adamw"),
    "adamw on the grid": replace(BASE, adapter="adamw", quantize_forward="banks", parameters="banks"),
    "lora": replace(BASE, adapter="lora"),
    "phased": replace(BASE, adapter="phased"),
}
by_adapter = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def model():
    return randomize_(GPT(tiny_config(), torch.arange(96) % 3 == 0), 3)


def stream_of(tokens):
    rng = np.random.default_rng(0)
    table = ByteTable(rng.integers(0, 6, 96).astype(np.int16), np.arange(96) % 3 == 0, np.arange(96) < 4)
    return Stream(np.asarray(tokens, dtype=np.uint16), table, CPU)


@functools.cache
def text(count=331, seed=0):
    """Documents of 9 to 80 tokens that begin with 1 and repeat eight words of their own."""
    rng, parts = np.random.default_rng(seed), [np.array([7, 7, 7])]
    while sum(map(len, parts)) < count:
        parts.append(np.append(1, rng.integers(2, 96, 8)[rng.integers(0, 8, rng.integers(8, 80))]))
    return np.concatenate(parts)[:count]


def run(model, tokens, config, **options):
    stream = stream_of(tokens)
    windows = sliding_windows(stream.num_targets, SEQ, STRIDE)
    return legal_ttt(model, stream, windows, SEQ, 3, config, **options)


def test_adamw_takes_the_steps_of_the_library(model):
    """Gradient banks, clipping and update against autograd, clip_grad_norm_ and torch.optim.AdamW."""
    config = replace(CONFIGS["adamw"], grad_clip=0.5, weight_decay=0.1, beta2=0.9)
    scored = Scored(torch.from_numpy(text()[:81]), 1, 4)
    with borrowed(model):
        adapter = AdamW(model, config, SEQ)
        adapter.adapt(scored)
        got = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = trainable_parameters(model, config)
    adamw = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.9), weight_decay=0.1)
    for _ in range(config.epochs):
        for first in (0, 2, 4):
            count = min(2, 5 - first)
            span = scored.tokens[SEQ * first : SEQ * (first + count) + 1]
            model.loss(span[:-1].view(count, SEQ), span[1:].view(count, SEQ)).backward()
            assert torch.nn.utils.clip_grad_norm_(trained, 0.5) > 0.5
            adamw.step()
            model.zero_grad()
    assert adapter.updates == 6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scored", [SEQ, 5])
def test_a_change_of_zero_is_the_model_itself(model, scored):
    x, y = (torch.from_numpy(text())[i : i + 5 * SEQ].view(5, SEQ) for i in (0, 1))
    factors = fresh_factors(model.config, 3, 5, CPU)
    with torch.no_grad():
        got = changed_losses(model, model.banks(), factors, x, y[:, -scored:], 40)
    torch.testing.assert_close(got, frozen_losses(model)(x, y[:, -scored:], 40), rtol=0, atol=1e-5)


def test_a_change_is_that_of_the_matrices(model):
    """Losses with factors A and B are those of a model whose matrices have B A added."""
    x, y = (torch.from_numpy(text())[i : i + SEQ].view(1, SEQ) for i in (0, 1))
    n, generator = model.config.num_layers, torch.Generator().manual_seed(1)
    factors = {
        name: (a, 0.1 * torch.randn(b.shape, generator=generator))
        for name, (a, b) in fresh_factors(model.config, 3, 1, CPU).items()
    }
    change = {name: (b @ a)[0] for name, (a, b) in factors.items()}
    with torch.no_grad():
        banks = model.banks()
        before = changed_losses(model, banks, fresh_factors(model.config, 3, 1, CPU), x, y)
        hidden_change = changed_losses(model, banks, factors, x, y)
        for bank, names in (
            (model.qo_bank, "qo"),
            (model.kv_bank, "kv"),
            (model.mlp_up_bank, ("up",)),
            (model.mlp_down_bank, ("down",)),
        ):
            bank += torch.cat([change[name] for name in names])
        hidden = model.hidden(x)
        raw = hidden @ (model.tok_emb.weight + change["head"][0]).T
        logits = 30 * torch.tanh(raw / 30)
    want = torch.nn.functional.cross_entropy(logits[0], y[0], reduction="none")
    assert len(model.qo_bank) == 2 * n
    torch.testing.assert_close(hidden_change[0], want, rtol=1e-4, atol=1e-4)
    assert (hidden_change - before).abs().max() > 0.01


def test_documents_in_a_batch_are_those_alone(model):
    """Three documents in step, the last shorter, against each by itself: losses, steps and clipping."""
    tokens = torch.from_numpy(text(900, 5)[200:]).unfold(0, 2 * SEQ + 1, 70)[:3]
    config, x = replace(CONFIGS["lora"], grad_clip=0.3), torch.arange(6).repeat_interleave(3).view(6, 3) + 2
    rows = torch.tensor([2, 0, 1, 1, 2, 0])

    def learned(which):
        with borrowed(model):
            adapter = make_adapter(model, config, SEQ)
            adapter.begin(len(which))
            adapter.adapt(Scored(tokens[which, : SEQ + 1], 0, 9))
            going_on = [i for i in which if i < 2]
            if going_on:
                adapter.adapt(Scored(tokens[going_on, SEQ:], 1, 9))
            own = [which.index(int(row)) for row in rows if int(row) in which]
            kept = [i for i, row in enumerate(rows) if int(row) in which]
            return kept, adapter.score(x[kept], x[kept], SEQ, torch.tensor(own))

    _, together = learned([0, 1, 2])
    for document in range(3):
        kept, alone = learned([document])
        torch.testing.assert_close(alone, together[kept], rtol=0, atol=1e-5)
    assert (together[1] - together[2]).abs().max() > 0.01


def test_a_new_batch_of_documents_forgets_the_last(model):
    x = torch.arange(8).view(2, 4)
    with borrowed(model):
        adapter = make_adapter(model, CONFIGS["lora"], SEQ)
        adapter.begin(2)
        rows = torch.tensor([1, 0])
        fresh = adapter.score(x, x, SEQ, rows)
        adapter.adapt(Scored(torch.from_numpy(text()[: 2 * SEQ + 2]).view(2, SEQ + 1), 0, 9))
        assert not torch.equal(adapter.score(x, x, SEQ, rows), fresh)
        adapter.begin(2)
        assert torch.equal(adapter.score(x, x, SEQ, rows), fresh)
        with pytest.raises(ValueError, match="windows need rows"):
            adapter.score(x, x, SEQ)


@given(
    count=st.integers(17, 400),
    stride=st.integers(1, 16),
    bos=st.lists(st.integers(0, 400), max_size=12),
    segment=st.integers(1, 40),
    documents=st.integers(1, 5),
    phased=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_segments_score_every_target_once_and_before_it_is_handed_over(
    count, stride, bos, segment, documents, phased
):
    tokens = np.full(count, 5)
    tokens[[b for b in bos if b < count]] = 1
    starts = document_starts(tokens)
    config = replace(
        BASE,
        adapter="phased" if phased else "lora",
        lora=replace(BASE.lora, segment_tokens=segment, documents=documents),
    )
    whole = sliding_windows(count - 1, 16, stride)
    windows, chunks = document_chunks(whole, starts, config)
    document = np.searchsorted(starts, windows.first, side="right") - 1
    assert sum(c.high - c.low for c in chunks) == len(windows)
    assert sorted(np.concatenate([np.arange(*w) for w in zip(windows.first, windows.end, strict=True)])) == [
        *range(count - 1)
    ]
    assert np.array_equal(document, np.searchsorted(starts, windows.end - 1, side="right") - 1)
    # every target has the inputs that it has without documents
    first_input = dict(zip(whole.end - 1, whole.start, strict=True))
    for end, start in zip(windows.end - 1, windows.start, strict=True):
        assert start == first_input[next(e for e in whole.end - 1 if e >= end)]
    ledger, opened, at, seen_until = Ledger(stream_of(tokens)), 0, 0, -1
    for chunk in chunks:
        assert chunk.low == at
        at = chunk.high
        part = windows[chunk.low : chunk.high]
        ledger.note(part)
        if isinstance(chunk, Chunk):
            assert phased
            seen_until = chunk.end
            ledger.hand_over(chunk)
            continue
        opened = chunk.opens or opened
        assert opened <= documents
        assert len(chunk.begin) <= opened
        assert (part.row < opened).all()
        assert (part.first >= seen_until).all()  # what the model learned from comes before
        if len(chunk.begin):
            assert ledger.hand_over(chunk).tokens.shape == (len(chunk.begin), segment + 1)
    assert at == len(windows)
    assert isinstance(chunks[-1], Segment)


def test_the_learning_rate_knows_nothing_of_later_documents():
    """Streams that differ from token 200 on, in where documents begin, too: the same numbers until there."""
    first, second = np.full(641, 5), np.full(641, 5)
    first[::20] = second[:200:20] = 1
    config, seen = replace(CONFIGS["phased"], decay="cosine"), []
    for tokens in (first, second):
        _, chunks = document_chunks(sliding_windows(640, SEQ, STRIDE), document_starts(tokens), config)
        learned = [c for c in chunks if isinstance(c, Chunk) and c.end < 200]
        seen.append([(c.begin, c.end, c.number, c.count) for c in learned])
    assert seen[0] == seen[1] == [(0, 80, 0, 10), (80, 140, 1, 10)]


def test_sweep_compares_on_the_same_windows_and_repeats_nothing(model, tmp_path, monkeypatch):
    config = RunConfig(model=tiny_config())
    config = replace(config, eval=replace(config.eval, stride=STRIDE, seq_len=SEQ))
    chosen = {name: CONFIGS[name] for name in ("adamw", "lora")}
    rows = sweep(model, stream_of(text()), config, chosen, None, tmp_path)
    assert [row.name for row in rows] == ["sliding", "adamw", "lora"]
    assert (rows[0].gain, rows[0].updates) == (0, 0)
    for row in rows[1:]:
        assert row.gain == pytest.approx(rows[0].bpb - row.bpb)
        assert row.low <= row.gain <= row.high
        assert row.bpb == pytest.approx(run(model, text(), chosen[row.name]).score.bpb, abs=1e-6)
    monkeypatch.setattr("pgolf_fast.lab.compare.sweep.legal_ttt", None)
    assert sweep(model, stream_of(text()), config, chosen, None, tmp_path) == rows
    starts = document_starts(text())
    after = int(starts[len(starts) // 2])
    later = sweep(model, stream_of(text()), config, chosen, None, tmp_path, after=after)
    nats = [json.loads((tmp_path / f"{n}.json").read_text())["nats"] for n in ("sliding", "lora")]
    gained = sum(nats[0][len(starts) // 2 :]) - sum(nats[1][len(starts) // 2 :])
    size = stream_of(text()).target_bytes[after:].sum()
    assert later[2].gain == pytest.approx(gained / np.log(2) / size)
    assert later[2].gain != pytest.approx(rows[2].gain)
    with pytest.raises(PgolfError, match="no document begins at target 1,000,000 or later"):
        sweep(model, stream_of(text()), config, chosen, None, tmp_path, after=10**6)
    other = {"lora": replace(chosen["lora"], grad_clip=0.1)}
    with pytest.raises(TypeError):
        sweep(model, stream_of(text()), config, other, None, tmp_path)


def test_windows_that_score_twice_have_no_documents():
    with pytest.raises(PgolfError, match=r"set eval\.repeat_tail to false"):
        cut_at(sliding_windows(100, 16, 4, repeat_tail=True), np.array([0, 50]))


@by_adapter
def test_without_a_step_every_adapter_gives_the_sliding_losses(model, config):
    stream = stream_of(text())
    windows = sliding_windows(stream.num_targets, SEQ, STRIDE)
    scorer = Scorer(stream, windows, SEQ, lambda length: 3)
    scorer.score(frozen_losses(model), 0, len(windows))
    still = replace(config, lr=0.0, quantize_forward="none", lora=replace(config.lora, lr=0.0))
    result = run(model, text(), still)
    np.testing.assert_allclose(result.scorer.by_target(), scorer.by_target(), rtol=0, atol=1e-5)
    assert result.score.text_bytes == stream.target_bytes.sum()


@by_adapter
def test_no_score_depends_on_a_later_token(model, config):
    """Two streams that differ from token 200 on have the same losses up to there."""
    first = text()
    second = first.copy()
    second[200:] = np.where(first[200:] == 1, 1, 2 + (first[200:] + 5) % 90)
    a, b = (run(model, tokens, config).scorer.by_target() for tokens in (first, second))
    np.testing.assert_array_equal(a[:199], b[:199])
    assert (a[199:] != b[199:]).any()


@by_adapter
def test_scoring_changes_nothing_and_the_model_is_given_back(model, config):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stream = stream_of(text())
    windows, chunks = adapting_chunks(sliding_windows(stream.num_targets, SEQ, STRIDE), stream, config)
    with borrowed(model):
        adapter = make_adapter(model, config, SEQ)
        learn, score, told = adapter.adapt, adapter.score, []

        def watched(*arguments):
            held = {name: t.clone() for name, t in adapter.state().items()}
            held |= {name: p.detach().clone() for name, p in model.named_parameters()}
            losses = score(*arguments)
            now = {**adapter.state(), **dict(model.named_parameters())}
            assert all(torch.equal(now[name], tensor) for name, tensor in held.items())
            return losses

        adapter.score = watched
        adapter.adapt = lambda scored: (told.append(scored), learn(scored))
        score_and_adapt(adapter, Scorer(stream, windows, SEQ, lambda length: 3), chunks, "test")
        assert adapter.updates > 0
    assert 3 < len(told) < len(chunks)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@by_adapter
def test_every_adapter_learns_words_that_repeat(model, config):
    plain = run(model, text(), replace(config, lr=0.0, lora=replace(config.lora, lr=0.0))).score
    assert run(model, text(), config).score.bpb < plain.bpb - 0.01


@by_adapter
def test_every_adapter_goes_on_from_its_state(model, config, tmp_path, monkeypatch):
    want = run(model, text(), config).by_chunk

    class Stop(Exception):
        pass

    resume = Resume(tmp_path / "scores.json", "x", 0.0)
    saved, left = resume.of("ttt"), [4]

    def save(*arguments, **options):
        type(saved).save(saved, *arguments, **options)
        left[0] -= 1
        if not left[0]:
            raise Stop

    monkeypatch.setattr(saved, "save", save)
    with pytest.raises(Stop):
        run(model, text(), config, saved=saved)
    found = run(model, text(), config, saved=resume.of("ttt"))
    assert found.by_chunk == want
    assert found.updates == run(model, text(), config).updates


class OneOf:
    """One rank of several that runs alone, and takes the losses that the others would have sent."""

    def __init__(self, rank, world_size, others):
        self.rank, self.world_size, self.others = rank, world_size, others

    def sum_(self, values):
        self.others.append((values, values.clone()))
        return values

    def same(self, value):
        return value


@by_adapter
def test_what_is_learned_does_not_depend_on_what_a_rank_scores(model, config):
    """A rank that scores a share learns from the same tokens, so its losses are those of a rank alone."""
    want = run(model, text(), config).scorer.losses
    shares = [run(model, text(), config, ranks=OneOf(rank, 2, [])).scorer.losses for rank in range(2)]
    assert all((share == 0).any() for share in shares)
    assert torch.equal(sum(shares), want)


def test_one_document_learns_with_its_own_past_as_inputs(model):
    """Inputs reach back over segments as far as a window does, and targets are the newest segment's."""
    seen, config = [], replace(CONFIGS["lora"], lora=replace(BASE.lora, segment_tokens=8, epochs=1))
    tokens = torch.arange(2, 35).view(1, -1)
    with borrowed(model):
        adapter = Lora(model, config, SEQ, model.banks)
        adapter._update = lambda x, y: seen.append((x.tolist()[0], y.tolist()[0]))
        adapter.begin(1)
        for at in (0, 8, 16, 24):
            adapter.adapt(Scored(tokens[:, at : at + 9], 0, 9))
    assert seen == [([*range(max(2, e - 16), e)], [*range(e - 7, e + 1)]) for e in (10, 18, 26, 34)]
