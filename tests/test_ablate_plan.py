"""What an ablation is made of: flips in words, variants, runs, and which of them are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from pgolf_fast.cli.ablate import split_flips
from pgolf_fast.config.fields import flip
from pgolf_fast.config.presets import small, tiny
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.ablation.plan import BASELINE, make_jobs, make_variants, with_budget

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
    """Without the table there is no trigram: one field alone is refused, in either order."""
    both = flip(tiny(), ["model.bigram_vocab_size=0", "model.trigram=false"])
    assert both.model.bigram_vocab_size == 0
    with pytest.raises(PgolfError, match="needs a hash table"):
        flip(tiny(), ["model.bigram_vocab_size=0"])


def test_fields_of_one_flip_are_set_once():
    """Two values of one field were meant as two variants; a group that is none has no fields."""
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


def test_runs_interleave_and_share_all_but_the_flip(tmp_path):
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
def test_variants_that_would_not_compare_are_refused(flips, message):
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
def test_a_variant_has_one_name_however_it_is_spelled(words, name):
    """Its folder must be found again."""
    config = flip(tiny(), ["model.ve_layers=1"])
    assert [variant.name for variant in make_variants(config, [words])] == [BASELINE, name]


def test_a_budget_of_the_other_kind_must_be_given():
    assert with_budget(tiny(), "steps").train.steps == tiny().train.steps
    assert with_budget(small(), "time").train.max_seconds == 600
    with pytest.raises(PgolfError, match="give --steps"):
        with_budget(small(), "steps")
    with pytest.raises(PgolfError, match="give --seconds"):
        with_budget(tiny(), "time")
    with pytest.raises(PgolfError, match="each once"):
        make_jobs(make_variants(tiny(), [["model.trigram=false"]]), (1, 1), ["steps"], Path("x"))


def test_words_of_flips():
    argv = ["tiny", "--flip", "a=1", "b=2", "--seeds", "1", "2", "--flip=c=3", "--flip", "d=4"]
    assert split_flips(argv) == (["tiny", "--seeds", "1", "2"], [["a=1", "b=2"], ["c=3"], ["d=4"]])
    with pytest.raises(PgolfError, match="no FIELD=VALUE"):
        split_flips(["tiny", "--flip", "--seeds", "1"])
