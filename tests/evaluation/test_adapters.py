"""Adapters of test-time training: their formulas, per-document low-rank updates, and the rules they obey."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluations import CPU, SEQ, OneOf, adapted, filled, stream_of, text, tiny_model

from pgolf_fast.config.ttt import LoraConfig, TTTConfig
from pgolf_fast.evaluation.adapters.base import Frozen, Scored, borrowed
from pgolf_fast.evaluation.adapters.descent import AdamW, trainable_parameters
from pgolf_fast.evaluation.adapters.lora import Lora, changed_losses, fresh_factors, matrices
from pgolf_fast.evaluation.adapters.registry import KINDS, adapting_chunks, make_adapter
from pgolf_fast.evaluation.protocol import score_and_adapt
from pgolf_fast.evaluation.resume import Resume
from pgolf_fast.evaluation.score import Scorer
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.lab.audit.watch import by_target
from pgolf_fast.quant.grid import fake_int6

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
by_adapter = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture
def model():
    return tiny_model()


def two_layers():
    """Return a model that is quick enough for whole evaluations."""
    return tiny_model(num_layers=2, ve_layers=(1,), xsa_last_n=1)


def windows_of(tokens):
    return sliding_windows(len(tokens) - 1, SEQ, 8)


def run(tokens, config, **options):
    return adapted(two_layers(), stream_of(tokens), windows_of(tokens), config, batch=3, **options)


@functools.cache
def outcome(name):
    """Return the pass of one adapter over `text()`."""
    return run(text(), CONFIGS[name])


def test_adamw_matches_torch(model):
    """Gradient banks, clipping and update against autograd, clip_grad_norm_ and torch.optim.AdamW."""
    config = replace(CONFIGS["adamw"], grad_clip=0.5, weight_decay=0.1, beta2=0.9)
    scored = Scored(torch.from_numpy(text()[None, :81]), 1, 4)
    with borrowed(model):
        adapter = AdamW(model, config, SEQ)
        adapter.adapt(scored)
        got = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = trainable_parameters(model, config)
    adamw = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.9), weight_decay=0.1)
    for _ in range(config.epochs):
        for first in (0, 2, 4):
            count = min(2, 5 - first)
            span = scored.tokens[0, SEQ * first : SEQ * (first + count) + 1]
            model.loss(span[:-1].view(count, SEQ), span[1:].view(count, SEQ)).backward()
            assert torch.nn.utils.clip_grad_norm_(trained, 0.5) > 0.5
            adamw.step()
            model.zero_grad()
    assert adapter.updates == 6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("scored", [SEQ, 5])
def test_zero_change_gives_the_losses_of_the_model(model, scored):
    x, y = (torch.from_numpy(text())[i : i + 5 * SEQ].view(5, SEQ) for i in (0, 1))
    factors = fresh_factors(matrices(model.config), 3, 5, CPU)
    with torch.no_grad():
        got = changed_losses(model, model.banks(), factors, x, y[:, -scored:], 40)
    torch.testing.assert_close(got, Frozen(model).score(x, y[:, -scored:], 40), rtol=0, atol=1e-5)


def test_change_equals_changed_matrices(model):
    """Losses with factors A and B equal those of a model with B A added to its matrices."""
    x, y = (torch.from_numpy(text())[i : i + SEQ].view(1, SEQ) for i in (0, 1))
    n, generator = model.config.num_layers, torch.Generator().manual_seed(1)
    factors = {
        name: (a, 0.1 * torch.randn(b.shape, generator=generator))
        for name, (a, b) in fresh_factors(matrices(model.config), 3, 1, CPU).items()
    }
    change = {name: (b @ a)[0] for name, (a, b) in factors.items()}
    with torch.no_grad():
        banks = model.banks()
        before = changed_losses(model, banks, fresh_factors(matrices(model.config), 3, 1, CPU), x, y)
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


def test_documents_of_a_batch_are_independent(model):
    """Three documents in parallel, the last shorter, against each by itself: losses, steps and clipping."""
    tokens = torch.from_numpy(text(900, 5)[200:]).unfold(0, 2 * SEQ + 1, 70)[:3]
    config, x = replace(CONFIGS["lora"], grad_clip=0.3), torch.arange(6).repeat_interleave(3).view(6, 3) + 2
    rows = torch.tensor([2, 0, 1, 1, 2, 0])

    def learned(which):
        with borrowed(model):
            adapter = make_adapter(model, config, SEQ)
            adapter.begin(len(which))
            adapter.adapt(Scored(tokens[which, : SEQ + 1], 0, 9, by_document=True))
            going_on = [i for i in which if i < 2]
            if going_on:
                adapter.adapt(Scored(tokens[going_on, SEQ:], 1, 9, by_document=True))
            own = [which.index(int(row)) for row in rows if int(row) in which]
            kept = [i for i, row in enumerate(rows) if int(row) in which]
            return kept, adapter.score(x[kept], x[kept], SEQ, torch.tensor(own))

    _, together = learned([0, 1, 2])
    for document in range(3):
        kept, alone = learned([document])
        torch.testing.assert_close(alone, together[kept], rtol=0, atol=1e-5)
    assert (together[1] - together[2]).abs().max() > 0.01


def test_begin_forgets_the_last_documents(model):
    x = torch.arange(8).view(2, 4)
    with borrowed(model):
        adapter = make_adapter(model, CONFIGS["lora"], SEQ)
        adapter.begin(2)
        rows = torch.tensor([1, 0])
        fresh = adapter.score(x, x, SEQ, rows)
        adapter.adapt(
            Scored(torch.from_numpy(text()[: 2 * SEQ + 2]).view(2, SEQ + 1), 0, 9, by_document=True)
        )
        assert not torch.equal(adapter.score(x, x, SEQ, rows), fresh)
        adapter.begin(2)
        assert torch.equal(adapter.score(x, x, SEQ, rows), fresh)
        with pytest.raises(ValueError, match="windows need rows"):
            adapter.score(x, x, SEQ)


def test_inputs_of_a_document_reach_back_over_segments(model):
    """Inputs reach back as far as a window does; targets are the newest segment's."""
    seen, config = [], replace(CONFIGS["lora"], lora=replace(BASE.lora, segment_tokens=8, epochs=1))
    tokens = torch.arange(2, 35).view(1, -1)
    with borrowed(model):
        adapter = Lora(model, config, SEQ, banks=model.banks)
        adapter._update = lambda x, y: seen.append((x.tolist()[0], y.tolist()[0]))
        adapter.begin(1)
        for start in (0, 8, 16, 24):
            adapter.adapt(Scored(tokens[:, start : start + 9], 0, 9, by_document=True))
    assert seen == [([*range(max(2, e - 16), e)], [*range(e - 7, e + 1)]) for e in (10, 18, 26, 34)]


def test_every_legal_adapter_is_tested():
    assert {config.adapter for config in CONFIGS.values()} | {"error_guided"} == set(KINDS)


@by_adapter
def test_learning_rate_zero_gives_the_sliding_losses(name):
    config, stream = CONFIGS[name], stream_of(text())
    want = filled(Frozen(two_layers()).score, stream, windows_of(text()), batch=3)
    still = replace(config, lr=0.0, quantize_forward="none", lora=replace(config.lora, lr=0.0))
    result = run(text(), still)
    np.testing.assert_allclose(by_target(result.scorer), by_target(want), rtol=0, atol=1e-5)
    assert result.score.text_bytes == stream.target_bytes.sum()


@by_adapter
def test_no_score_depends_on_a_later_token(name):
    """Two streams that differ from token 200 on have the same losses up to there."""
    second = text().copy()
    second[200:] = np.where(text()[200:] == 1, 1, 2 + (text()[200:] + 5) % 90)
    a, b = by_target(outcome(name).scorer), by_target(run(second, CONFIGS[name]).scorer)
    np.testing.assert_array_equal(a[:199], b[:199])
    assert (a[199:] != b[199:]).any()


@by_adapter
def test_scoring_changes_nothing_and_the_model_is_restored(name):
    model, config, stream = two_layers(), CONFIGS[name], stream_of(text())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    windows, chunks = adapting_chunks(windows_of(text()), stream, config)
    with borrowed(model):
        adapter = make_adapter(model, config, SEQ)
        adapt, score, seen = adapter.adapt, adapter.score, []

        def watched(*arguments):
            held = {name: t.clone() for name, t in adapter.state().items()}
            held |= {name: p.detach().clone() for name, p in model.named_parameters()}
            losses = score(*arguments)
            now = {**adapter.state(), **dict(model.named_parameters())}
            assert all(torch.equal(now[name], tensor) for name, tensor in held.items())
            return losses

        adapter.score = watched
        adapter.adapt = lambda scored: (seen.append(scored), adapt(scored))
        score_and_adapt(adapter, Scorer(stream, windows, SEQ, lambda length: 3), chunks, "test")
        assert adapter.updates > 0
    assert 3 < len(seen) < len(chunks)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@by_adapter
def test_repeated_words_are_learned(name):
    grid = fake_int6 if CONFIGS[name].quantize_forward == "banks" else None
    plain = filled(Frozen(two_layers(), grid).score, stream_of(text()), windows_of(text()))
    assert outcome(name).score.bpb < plain.sums(0, len(plain.windows)).bpb - 0.01


@by_adapter
def test_state_resumes_to_the_same_scores(name, tmp_path, monkeypatch):
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
        run(text(), CONFIGS[name], saved=saved)
    resumed = run(text(), CONFIGS[name], saved=resume.of("ttt"))
    assert resumed.by_chunk == outcome(name).by_chunk
    assert resumed.updates == outcome(name).updates


@by_adapter
def test_learning_does_not_depend_on_what_a_rank_scores(name):
    """A rank that scores a share learns from the same tokens, so its losses equal those of a single rank."""
    shares = [run(text(), CONFIGS[name], world=OneOf(rank, 2)).scorer.losses for rank in range(2)]
    assert all((share == 0).any() for share in shares)
    assert torch.equal(sum(shares), outcome(name).scorer.losses)
