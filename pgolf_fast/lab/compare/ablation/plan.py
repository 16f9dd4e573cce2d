"""Which runs an ablation is made of, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pgolf_fast.config.fields import field_name, flatten, flip
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError

BASELINE = "baseline"
Budget = Literal["steps", "time"]
ENDLESS = 10**7  # steps of a run that its clock ends

# What a variant may not differ in, and what to do instead
_SHARED = {
    "name": "the preset's name stays",
    "train.seed": "give --seeds",
    "train.steps": "give --steps",
    "train.max_seconds": "give --seconds",
    "train.schedule": "give --budget",
    "data.path": "all variants are scored on the same text",
    "data.tokenizer": "all variants are scored on the same text",
    "data.val_tokens": "all variants are scored on the same text",
    "model.vocab_size": "all variants are scored on the same text",
    "eval.repeat_tail": "all variants are scored on the same text",
}


@dataclass(frozen=True)
class Variant:
    """A named configuration; the baseline has no words."""

    name: str
    words: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Job:
    """One run: a variant under a budget with a seed, and its folder."""

    budget: Budget
    variant: str
    seed: int
    config: RunConfig
    path: Path

    @property
    def name(self) -> str:
        return f"{self.budget}/{self.variant}/seed{self.seed}"


def make_variants(base: RunConfig, flips: Sequence[Sequence[str]]) -> list[Variant]:
    """The baseline, and for each flip the baseline with its FIELD=VALUE words set.

    A variant is named by its words, in one spelling. Raises PgolfError for no flip, one that changes nothing,
    one given twice, or one of a setting that all variants share.
    """
    if not any(flips):
        raise PgolfError("nothing to compare: give --flip FIELD=VALUE, say --flip model.trigram=false")
    found = [Variant(BASELINE, (), base)]
    for words in flips:
        config = flip(base, words)
        _check_flip(base, config, words)
        same = next((v.name for v in found if v.config == config), None)
        if same is not None:
            raise PgolfError(f"--flip {' '.join(words)} is the same as {same}: leave one out")
        found.append(Variant(_name(config, words), tuple(words), config))
    return found


def _name(config: RunConfig, words: Sequence[str]) -> str:
    """The fields that `words` set and their values: it names a folder, which another spelling must find."""
    values = dict(flatten(config))
    return "+".join(f"{name}={_spell(values[name])}" for name in map(field_name, words)).replace("/", "_")


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_spell, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _check_flip(base: RunConfig, config: RunConfig, words: Sequence[str]) -> None:
    before, now = dict(flatten(base)), dict(flatten(config))
    changed = [name for name in before.keys() | now.keys() if before.get(name, ...) != now.get(name, ...)]
    if not changed:
        raise PgolfError(f"--flip {' '.join(words)} changes nothing: {base.name} has this already")
    for name in changed:
        if name in _SHARED:
            raise PgolfError(
                f"--flip {' '.join(words)}: {name} is the same for all variants ({_SHARED[name]})"
            )
    if config.eval_seq_len != base.eval_seq_len:
        raise PgolfError(
            f"--flip {' '.join(words)} changes the windows that scores are over from {base.eval_seq_len} to "
            f"{config.eval_seq_len} tokens: add eval.seq_len={base.eval_seq_len} to it"
        )


def with_budget(
    config: RunConfig, budget: Budget, *, steps: int | None = None, seconds: float | None = None
) -> RunConfig:
    """`config` for so many optimiser steps, or for so long on the training clock; the schedule goes with it.

    None is what the configuration itself has. Raises PgolfError where that is of the other kind.
    """
    train = config.train
    if budget == "steps":
        if steps is None and train.schedule == "time":
            raise PgolfError(f"{config.name} ends by its clock: give --steps for budget steps")
        return replace(
            config,
            train=replace(
                train, steps=train.steps if steps is None else steps, max_seconds=None, schedule="steps"
            ),
        )
    if seconds is None and train.max_seconds is None:
        raise PgolfError(f"{config.name} ends by its steps: give --seconds for budget time")
    limit = train.max_seconds if seconds is None else seconds
    return replace(config, train=replace(train, steps=ENDLESS, max_seconds=limit, schedule="time"))


def make_jobs(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    budgets: Sequence[Budget],
    out: Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
) -> list[Job]:
    """Every run, seed by seed with all variants of a budget in turn: a drift of the machine meets all alike.

    Run folders are out/BUDGET/VARIANT/seedN. Raises PgolfError for a seed given twice, or a missing budget.
    """
    if len(set(seeds)) < len(seeds) or not seeds:
        raise PgolfError(f"--seeds {' '.join(map(str, seeds))}: give at least one, each once")
    jobs = []
    for seed in seeds:
        for budget in budgets:
            for variant in variants:
                config = with_budget(variant.config, budget, steps=steps, seconds=seconds)
                config = replace(config, train=replace(config.train, seed=seed))
                path = out / budget / variant.name / f"seed{seed}"
                jobs.append(Job(budget, variant.name, seed, config, path))
    return jobs
