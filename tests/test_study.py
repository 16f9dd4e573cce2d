"""What the study of the public systems says of its runs, and what a meta step's inner step comes to."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast.config.meta import MetaConfig
from pgolf_fast.config.presets import tiny
from pgolf_fast.lab.compare.ablation.plan import BASELINE, Job
from pgolf_fast.lab.compare.ablation.statistics import Interval
from pgolf_fast.lab.compare.ablation.table import Row, Run
from pgolf_fast.model.gpt import GPT

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))

from inner_step import Kept, lengths, one  # noqa: E402
from systems_report import Timing, make_gain, text, verdict, write_plot  # noqa: E402

SETTINGS = {
    "command": "python this",
    "steps": 320,
    "seeds": (1, 2),
    "val_tokens": 1000,
    "data": "words",
    "questions": {"train.meta=none": "(c) without FOMAML"},
    "parameters": 1000,
    "batch_tokens": 100,
    "meta_steps": 5,
    "meta_every": 32,
    "base": "train.meta.every=32",
    "adapted_tokens": 16_000,
}


def measured(dtype, **fields):
    torch.manual_seed(0)
    model = GPT(tiny_config(), torch.arange(96) % 3 == 0, compute_dtype=dtype)
    randomize_(model, 1)
    model.allocate_gradient_banks()
    return Kept("", *one(model, torch.randint(96, (2, 4, 24)).unbind(), MetaConfig(**fields)))


def test_a_small_inner_step_is_lost_in_bfloat16():
    exact, rounded = (measured(dtype, inner_lr=1e-5) for dtype in (torch.float32, torch.bfloat16))
    assert exact.wanted == pytest.approx(rounded.wanted, rel=0.1)
    assert exact.seen == pytest.approx(exact.wanted, rel=0.05)
    assert exact.cosine > 0.99
    assert rounded.cosine < 0.5


def test_a_large_inner_step_is_one():
    found = measured(torch.float32, inner_lr=0.05)
    assert found.after < found.before
    assert found.outer < 0.999
    assert measured(torch.float32, inner_lr=1e-5).outer > 0.99999
    assert measured(torch.bfloat16, inner_lr=0.05).cosine > 0.9


def test_lengths_are_of_all_parts_together():
    a, b = [torch.tensor([3.0]), torch.zeros(2)], [torch.zeros(1), torch.tensor([0.0, 4.0])]
    assert lengths(a, b) == (3.0, 4.0, 0.0)


def interval(mean, half):
    return Interval(mean, mean - half, mean + half, "seeds", 2)


def row(variant, difference, budget="steps", seeds=(1, 2)):
    return Row(budget, variant, seeds, 320, 5.0, 6.0, 1000, "sliding", 2.0, difference)


def run(variant, seed, bpb, budget="steps"):
    job = Job(budget, variant, seed, tiny(), Path("nowhere"))
    return Run(job, {"scores": {"sliding": {"bpb": bpb}}, "commit": "c"})


def test_verdicts_follow_from_the_interval():
    assert verdict(interval(0.01, 0.005)).startswith("worse by 0.01000")
    assert verdict(interval(-0.01, 0.005)).startswith("better by 0.01000")
    assert "no difference shown" in verdict(interval(0.01, 0.02))
    assert "above 0.0300 bpb" in verdict(interval(0.01, 0.02))


def test_the_report_says_what_was_compared_with_what(tmp_path):
    worse, unclear = row("train.meta=none", interval(0.01, 0.005)), interval(0.001, 0.002)
    later = row("train.meta=none", unclear, "time")
    nats, size = np.array([20.0, 30.0]), np.array([10, 15])
    gains = {
        "sliding window": make_gain({s: (nats, nats * (0.9 + 0.01 * s), size) for s in (1, 2)}),
        "both, as published": make_gain(dict.fromkeys((1, 2), (nats, nats * 0.8, size))),
    }
    kept = [(1, Kept("float32", 1e-4, 1e-4, 1.0, 3.0, 2.9, 0.5))]
    runs = [run(v, s, 2.0) for v in (BASELINE, "train.meta=none") for s in (1, 2)]
    timing = Timing([later], 1.8, (1.7, 1.9), 324)
    told = text(SETTINGS, [row(BASELINE, None), worse], timing, gains, kept, runs)
    assert "Preset small (1,000 parameters), train.meta.every=32, 320 steps" in told
    assert "Command: python this\n" in told
    assert "ms/step" not in told
    assert "324 instead of 320" in told
    assert "-0.100000" in told  # of the inner loss
    assert "The sliding window alone is 42.5% of the gain" in told  # 9 % and 8 % of 20 %
    assert "by seed\n45.0%, 40.0%" in told or "by seed 45.0%, 40.0%" in told
    says = told[told.index("WHAT THESE SIZES SAY") :].replace("\n  ", " ")
    assert "(c) without FOMAML, equal steps: worse by 0.01000 bpb" in says
    assert "(c) without FOMAML, equal time: no difference shown" in says
    assert "Of the 4 intervals" in says
    assert "acts in 5 of 320 steps here, once in 32" in says
    assert "SGD learns from 50% as many tokens as training did" in says
    without = text({**SETTINGS, "meta_steps": 0, "meta_every": None}, [worse], None, {}, [], runs)
    assert "FOMAML acts" not in without
    pytest.importorskip("matplotlib")
    partly = replace(worse, seeds=(1, 2, 3))  # the baseline's third is not finished
    runs = [*runs, run("train.meta=none", 3, 2.0)]
    write_plot([row(BASELINE, None), partly], gains, runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
