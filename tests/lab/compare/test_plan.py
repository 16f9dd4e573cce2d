"""The plan of an ablation: flips, variants, budgets and runs, and which of them are rejected."""

from dataclasses import replace
from pathlib import Path

import pytest
from runs import make_dataset, run_config

from pgolf_fast.cli.options import parse
from pgolf_fast.cli.study import Ablate
from pgolf_fast.config.fields import flip
from pgolf_fast.config.presets import small, tiny
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.plan import (
    BASELINE,
    StepCost,
    cost_table,
    make_jobs,
    make_variants,
    meta_steps,
    step_costs,
    with_budget,
)

# Flips


def test_flip_reads_every_kind_of_field():
    words = ("model.trigram=false", "train.meta=none", "optim.weight-decay=0.1", "train.warmdown_steps=7")
    words += ("train.warmdown_fraction=off", "model.ve_layers=1,3", "quant.method=round", "data.path=7")
    found = flip(tiny(), words)
    assert found.model.trigram is False
    assert found.train.meta is None
    assert found.optim.weight_decay == 0.1
    assert (found.train.warmdown_steps, found.train.warmdown_fraction) == (7, None)
    assert found.model.ve_layers == (1, 3)
    assert found.quant.method == "round"
    assert found.data.path == "7"
    assert flip(found, ["model.ve_layers=2"]).model.ve_layers == (2,)


def test_flip_of_a_field_switches_its_group_on():
    off = flip(tiny(), ["train.meta=none"])
    assert flip(off, ["train.meta.every=8"]).train.meta.every == 8


def test_fields_of_one_flip_need_to_fit_together_only():
    """Without a hash table there is no trigram: one field alone is rejected."""
    both = flip(tiny(), ["model.bigram_vocab_size=0", "model.trigram=false"])
    assert both.model.bigram_vocab_size == 0
    with pytest.raises(PgolfError, match="needs a hash table"):
        flip(tiny(), ["model.bigram_vocab_size=0"])


def test_fields_of_one_flip_are_set_once():
    """Two values of one field are two variants; a group that is none has no fields."""
    with pytest.raises(PgolfError, match=r"every=8 and --train\.meta\.every=16 set the same field"):
        flip(tiny(), ["train.meta.every=8", "--train.meta.every=16"])
    for words in (["train.meta=none", "train.meta.every=16"], ["train.meta.every=16", "train.meta=none"]):
        with pytest.raises(PgolfError, match="contradict: a group that is none has no fields; leave one out"):
            flip(tiny(), words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.trigram", "is not FIELD=VALUE"),
        ("model.trigam=false", "unknown field model.trigam: did you mean model.trigram"),
        ("modell.trigram=false", "unknown field modell: did you mean model"),
        ("model.trigram.x=1", "model.trigram is a value, not a group"),
        ("model.trigram=maybe", "model.trigram is 'maybe'; it must be bool"),
        ("train.log_every=2.5", "train.log_every is '2.5'; it must be int"),
        ("train.log_every=0", "must be positive"),
        ("model.trigram=none", "must be bool"),
        ("train.meta=yes", r"train.meta is a group|is a group: set its fields .* or none"),
        ("quant.method=best", "must be one of gptq, round"),
    ],
)
def test_flip_refuses(word, message):
    with pytest.raises(PgolfError, match=message):
        flip(tiny(), [word])


# The plan


def test_runs_interleave_and_differ_only_by_the_flip(tmp_path):
    flips = [["model.trigram=false"], ["train.meta=none", "model.smear=false"]]
    jobs = make_jobs(make_variants(tiny(), flips), (1, 2), ["steps", "time"], tmp_path, steps=9, seconds=3.0)
    names = [BASELINE, "model.trigram=false", "train.meta=none+model.smear=false"]
    assert [(j.seed, j.budget, j.variant) for j in jobs] == [
        (seed, budget, name) for seed in (1, 2) for budget in ("steps", "time") for name in names
    ]
    assert jobs[0].path == tmp_path / "steps" / "baseline" / "seed1"
    for job in jobs:
        train = job.config.train
        assert train.seed == job.seed
        assert (train.schedule, train.max_seconds) == (
            ("steps", None) if job.budget == "steps" else ("time", 3.0)
        )
        assert (train.steps == 9) == (job.budget == "steps")
    by_name = {
        job.variant: job.config for job in jobs if job.name.endswith("seed1") and job.budget == "steps"
    }
    plain = by_name[BASELINE]
    assert by_name["model.trigram=false"] == replace(plain, model=replace(plain.model, trigram=False))


@pytest.mark.parametrize(
    ("flips", "message"),
    [
        ([], "nothing to compare"),
        ([["model.trigram=true"]], "changes nothing: tiny has this already"),
        ([["model.trigram=false"], ["model.trigram=False"]], "is the same as model.trigram=false"),
        ([["train.seed=3"]], "train.seed is the same for all variants .give --seeds"),
        ([["train.steps=3", "model.trigram=false"]], "give --steps"),
        ([["data.val_tokens=100"]], "same text"),
        ([["eval.repeat_tail=true"]], "same text"),
        ([["train.seq_len=128"]], "add eval.seq_len=256"),
    ],
)
def test_incomparable_variants_are_refused(flips, message):
    with pytest.raises(PgolfError, match=message):
        make_variants(tiny(), flips)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["model.trigram=False"], "model.trigram=false"),
        (["--model.trigram=false"], "model.trigram=false"),
        (["train.meta=off"], "train.meta=none"),
        (["train.meta.inner-lr=1e-3", "train.log_every=050"], "train.meta.inner_lr=0.001+train.log_every=50"),
        (["optim.weight_decay=1.0"], "optim.weight_decay=1"),
        (["model.ve_layers=2,3,"], "model.ve_layers=2,3"),
        (["quant.method=round"], "quant.method=round"),
    ],
)
def test_variant_name_does_not_depend_on_spelling(words, name):
    """The name is that of a folder, which a resumed command must find."""
    config = flip(tiny(), ["model.ve_layers=1"])
    assert list(make_variants(config, [words])) == [BASELINE, name]


def test_budget_of_the_other_kind_needs_a_limit():
    assert with_budget(tiny(), "steps").train.steps == tiny().train.steps
    assert with_budget(small(), "time").train.max_seconds == 600
    with pytest.raises(PgolfError, match="give --steps"):
        with_budget(small(), "steps")
    with pytest.raises(PgolfError, match="give --seconds"):
        with_budget(tiny(), "time")
    with pytest.raises(PgolfError, match="each once"):
        make_jobs(make_variants(tiny(), [["model.trigram=false"]]), (1, 1), ["steps"], Path("x"))


def test_measured_budget_gives_cheaper_variants_more_steps(tmp_path):
    """Plain steps of 1 s, steps with meta-learning of 3 s, one in 16: the variant gets 2 steps for each."""
    variants = make_variants(tiny(), [["train.meta=none"], ["model.trigram=false"]])
    costs = {name: StepCost(1.0, 3.0 if c.train.meta else None) for name, c in variants.items()}
    costs["model.trigram=false"] = StepCost(0.5, 1.5)
    jobs = make_jobs(variants, (1,), ["measured"], tmp_path, steps=320, costs=costs)
    base, plain, quick = (job.config for job in jobs)
    assert base.train.steps == 320
    assert meta_steps(base) > 0
    assert plain.train.steps == 320 + 2 * meta_steps(base)
    assert meta_steps(plain) == 0
    limit = costs[BASELINE].seconds(base)
    one_more = replace(quick, train=replace(quick.train, steps=quick.train.steps + 1))
    cost = costs["model.trigram=false"]
    assert cost.seconds(quick) <= limit < cost.seconds(one_more)
    assert jobs[0].path == tmp_path / "measured" / BASELINE / "seed1"


def test_step_costs_are_measured_once(tmp_path, monkeypatch):
    config = run_config(make_dataset(tmp_path / "data"))
    configs = make_variants(config, [["train.meta=none"]])
    costs = step_costs(configs, tmp_path / "costs.json", rounds=1)
    assert costs[BASELINE].meta > 0
    assert costs["train.meta=none"].meta is None
    monkeypatch.setattr("pgolf_fast.lab.compare.plan._measure", None)
    assert step_costs(configs, tmp_path / "costs.json") == costs
    assert "baseline, meta" in cost_table(costs, BASELINE).text()
    reptile = flip(config, ["train.reptile.share=0.5"])
    monkeypatch.undo()
    with pytest.raises(PgolfError, match="come in two lengths: give --budget time"):
        step_costs({BASELINE: reptile}, tmp_path / "costs.json")


def test_flips_of_a_command_line():
    words = ["tiny", "--flip", "a=1", "b=2", "--seeds", "1", "2", "--flip=c=3", "--flip", "d=4"]
    options = parse("ablate", Ablate, words)
    assert options.flip == (("a=1", "b=2"), ("c=3",), ("d=4",))
    assert (options.preset, options.seeds) == ("tiny", (1, 2))
    with pytest.raises(PgolfError, match="no FIELD=VALUE"):
        parse("ablate", Ablate, ["tiny", "--flip", "--seeds", "1"]).main()
