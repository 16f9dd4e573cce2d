"""Distribution of the loss, and calibration."""

import json

import numpy as np
import pytest
import torch
from helpers import randomize_, tiny_config
from runs import make_dataset, run_config

from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.io import save_tensors
from pgolf_fast.lab.analysis.losses import BINS, PR296, PR296_MEAN, SHOWN, Calibration, analyze, least_shares
from pgolf_fast.lab.analysis.models import open_models, open_validation
from pgolf_fast.lab.analysis.summary import Options
from pgolf_fast.lab.compare.statistics import bootstrap_ratio
from pgolf_fast.model.gpt import GPT

TOKENS = 640


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one shape with random weights, in run folders."""
    config = run_config(make_dataset(tmp_path_factory.mktemp("data")))
    paths = []
    for seed, name in ((3, "one"), (4, "two")):
        folder = RunFolder(tmp_path_factory.mktemp("runs") / name)
        folder.write_config(config)
        save_tensors(folder.model_file, randomize_(GPT(config.model), seed).state_dict(), {})
        paths.append(folder.path)
    return open_models(paths)


@pytest.fixture(scope="module")
def validation(models):
    return open_validation(models, Options(tokens=TOKENS))


@pytest.fixture(scope="module")
def summaries(models):
    return {f.name: f for f in analyze(models, Options(tokens=TOKENS))}


@pytest.fixture(scope="module")
def logits(models, validation):
    """Logits of the first model by window: float64 (targets, V)."""
    model = models[0].network(validation.source.table)
    windows = torch.from_numpy(validation.tokens[:-1].reshape(-1, validation.seq_len))
    with torch.no_grad():
        return model.logits(windows).flatten(0, 1).double()


@pytest.fixture(scope="module")
def losses(logits, validation):
    targets = torch.from_numpy(validation.tokens[1:])
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()


def test_every_table_is_complete(summaries):
    assert [(f.name, f.form) for f in summaries.values()] == [
        ("losses by word start", "published"),
        ("losses by class of target", "corrected"),
        ("losses by size", "published"),
        ("losses by size, with intervals", "corrected"),
        ("quantiles of the loss", "corrected"),
        ("hardest targets", "corrected"),
        ("calibration of the likeliest token", "corrected"),
        ("calibration of the target's probability", "corrected"),
    ]
    for summary in summaries.values():
        assert {row[0] for row in summary.table.rows} == {"one", "two"}
        json.dumps(summary.values, allow_nan=False)
    pictures = {name for f in summaries.values() for name in f.plots}
    assert pictures == {"losses", "losses_dark", "reliability", "reliability_dark"}


def test_shares_by_word_start(summaries, losses, validation):
    starts = validation.source.table.has_leading_space[validation.tokens[1:]]
    result = summaries["losses by word start"].values["one"]
    assert result["word start"]["targets"] == pytest.approx(starts.mean())
    assert result["word start"]["loss"] == pytest.approx(losses[starts].mean(), rel=1e-5)
    assert result["word start"]["loss_share"] == pytest.approx(losses[starts].sum() / losses.sum(), rel=1e-5)
    assert sum(part["loss_share"] for part in result.values()) == pytest.approx(1)
    classes = summaries["losses by class of target"].values["one"]
    assert sum(part["tokens"] for part in classes.values()) == len(losses)


def test_shares_by_size(summaries, losses):
    published = summaries["losses by size"].values["models"]["one"]
    corrected = summaries["losses by size, with intervals"].values["one"]
    for nats in (1, 3, 5, 7, 10):
        above = losses > nats
        for result in (published[str(nats)], corrected[str(nats)]):
            assert result["targets"] == pytest.approx(above.mean(), abs=2 / len(losses))
            assert result["loss_share"] == pytest.approx(losses[above].sum() / losses.sum(), abs=1e-2)
        one = corrected[str(nats)]
        assert one["least"] <= one["loss_share"]
        assert one["low"] <= one["loss_share"] <= one["high"]


def test_the_published_shares_contradict_their_counts():
    least = least_shares({nats: targets for nats, (targets, _) in PR296.items()}, PR296_MEAN)
    by_hand = (0.327 - 0.116) * 3 + (0.116 - 0.027) * 5 + (0.027 - 0.002) * 7 + 0.002 * 10
    assert least[3] == pytest.approx(by_hand / 1.9668)
    assert {nats for nats, (_, share) in PR296.items() if share < least[nats]} == {3, 5}
    assert least_shares({1: 1.0}, 1.0) == {1: 1.0}


def test_hardest_targets_have_their_context(summaries, logits, losses, validation):
    result = summaries["hardest targets"].values["one"]
    order = np.argsort(-losses, kind="stable")[:SHOWN]
    assert [one["position"] - 1 for one in result] == order.tolist()
    tokenizer = validation.source.tokenizer
    for one in result:
        target = one["position"] - 1
        assert one["loss"] == pytest.approx(losses[target], rel=1e-5)
        assert one["target"] == tokenizer.piece(int(validation.tokens[target + 1]))
        probability, guess = logits[target].softmax(-1).max(-1)
        assert one["guess"] == tokenizer.piece(int(guess))
        assert one["guess_probability"] == pytest.approx(float(probability), rel=1e-4)
        before = tokenizer.decode(validation.tokens[max(target - 23, 0) : target + 1].tolist())
        assert one["context"] == " ".join(before.split())


def test_calibration_matches_a_plain_count(summaries, logits, validation):
    probabilities = logits.softmax(-1).numpy()
    targets = validation.tokens[1:]
    confidence, guess = probabilities.max(-1), probabilities.argmax(-1)
    result = summaries["calibration of the likeliest token"].values["one"]
    assert result["accuracy"] == pytest.approx((guess == targets).mean())
    assert result["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
    error = 0.0
    for i in range(BINS):
        mine = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        assert result["likeliest"][i]["count"] == mine.sum()
        error += abs((guess[mine] == targets[mine]).sum() - confidence[mine].sum()) / len(targets)
    assert result["expected_error"] == pytest.approx(error, abs=1e-3)
    every = result["every_token"]
    assert sum(one["count"] for one in every) == probabilities.size
    assert sum(one["count"] * one["frequency"] for one in every) == pytest.approx(len(targets))
    assert sum(one["count"] * one["probability"] for one in every) == pytest.approx(len(targets), rel=1e-5)
    for one in every:
        mine = (probabilities > one["from"]) & (probabilities <= one["to"])
        assert one["count"] == pytest.approx(mine.sum(), abs=2)
    scalars = summaries["calibration of the target's probability"].values["one"]
    entropy = -(probabilities * np.log(probabilities)).sum(-1).mean()
    assert scalars["mean_entropy"] == pytest.approx(entropy, rel=1e-4)
    assert scalars["mean_expected_target_probability"] == pytest.approx(
        np.square(probabilities).sum(-1).mean(), rel=1e-4
    )
    picked = probabilities[np.arange(len(targets)), targets]
    assert scalars["mean_target_probability"] == pytest.approx(picked.mean(), rel=1e-4)
    assert scalars["mean_loss"] == pytest.approx(-np.log(picked).mean(), rel=1e-4)


def test_only_targets_drawn_from_the_predictions_are_calibrated():
    rng = torch.Generator().manual_seed(0)
    logs = (3 * torch.randn(20_000, 16, generator=rng)).log_softmax(-1)
    drawn = torch.multinomial(logs.exp(), 1, generator=rng)[:, 0]
    errors = {}
    for name, said in (("right", logs), ("overconfident", (2 * logs).log_softmax(-1))):
        calibration = Calibration(GPT(tiny_config()))
        calibration._add(said, drawn, -said.gather(1, drawn[:, None])[:, 0])
        means = calibration.probabilities()
        errors[name] = calibration.likeliest()["expected_error"], means["expected_error"]
        if name == "right":
            assert means["mean_loss"] == pytest.approx(means["mean_entropy"], rel=0.02)
            expected = means["mean_expected_target_probability"]
            assert means["mean_target_probability"] == pytest.approx(expected, rel=0.02)
        else:
            assert means["mean_loss"] > 1.2 * means["mean_entropy"]
    assert max(errors["right"]) < 0.02
    assert min(errors["overconfident"]) > 0.05


def test_interval_of_a_share():
    rng = np.random.default_rng(1)
    whole = rng.uniform(50, 150, 400)
    part = whole * np.clip(rng.normal(0.3, 0.1, 400), 0, 1)
    low, high = bootstrap_ratio(part, whole)
    assert low < part.sum() / whole.sum() < high
    assert high - low == pytest.approx(4 * 0.1 / np.sqrt(400), rel=0.3)
    assert bootstrap_ratio(part, whole) == (low, high)
