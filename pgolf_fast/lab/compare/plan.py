"""Plan an ablation: its variants, its budgets, and the order of its runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pgolf_fast.config.fields import field_name, flatten, flip
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.compare.step_cost import StepCost, equal_time

BASELINE = "baseline"
Budget = Literal["steps", "time", "measured"]
ENDLESS = 10**7  # steps of a run that ends by its clock

# Fields that all variants share, and what to do instead of flipping them
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
    """A named configuration and the FIELD=VALUE words that make it; the baseline has none."""

    name: str
    words: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True)
class Job:
    """One run of an ablation: a variant under a budget with a seed, and its folder."""

    budget: Budget
    variant: str
    seed: int
    config: RunConfig
    path: Path

    @property
    def name(self) -> str:
        return f"{self.budget}/{self.variant}/seed{self.seed}"


def make_variants(base: RunConfig, flips: Sequence[Sequence[str]]) -> list[Variant]:
    """Return the baseline and, for each flip, the baseline with the FIELD=VALUE words of the flip set.

    A variant is named by its words in a canonical spelling. Raises PgolfError if there is no flip, or for a
    flip that changes nothing, is given twice, or changes a field that all variants share.
    """
    if not any(flips):
        raise PgolfError("nothing to compare: give --flip FIELD=VALUE, say --flip model.trigram=false")
    variants = [Variant(BASELINE, (), base)]
    for words in flips:
        config = flip(base, words)
        _check_flip(base, config, words)
        same = next((v.name for v in variants if v.config == config), None)
        if same is not None:
            raise PgolfError(f"--flip {' '.join(words)} is the same as {same}: leave one out")
        variants.append(Variant(_name(config, words), tuple(words), config))
    return variants


def _name(config: RunConfig, words: Sequence[str]) -> str:
    """Name a variant by the fields that `words` set and their values.

    The name is that of a folder, which another spelling of the same words must find again.
    """
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
    """Return `config` limited to `steps` optimizer steps or `seconds` of training, with its schedule adapted.

    None takes the limit of the configuration. Raises PgolfError if its limit is of the other kind.
    """
    train = config.train
    if budget != "time":
        if steps is None and train.schedule == "time":
            raise PgolfError(f"{config.name} ends by its clock: give --steps for budget {budget}")
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
    costs: Mapping[str, StepCost] | None = None,
) -> list[Job]:
    """Return every run, with its folder out/BUDGET/VARIANT/seedN.

    For each seed and budget all variants follow each other, so that a drift of the machine affects them
    alike. Budget `measured` needs `costs`, the `StepCost` of each variant by name: a variant gets as many
    steps as fit into the training time of the baseline. Raises PgolfError for a seed given twice, or a
    missing limit.
    """
    if len(set(seeds)) < len(seeds) or not seeds:
        raise PgolfError(f"--seeds {' '.join(map(str, seeds))}: give at least one, each once")
    configs: dict[tuple[str, str], RunConfig] = {}
    for budget in budgets:
        limited = {v.name: with_budget(v.config, budget, steps=steps, seconds=seconds) for v in variants}
        if budget == "measured":
            assert costs is not None
            limited = equal_time(limited, costs, BASELINE)
        configs |= {(budget, name): config for name, config in limited.items()}
    jobs = []
    for seed, budget, variant in itertools.product(seeds, budgets, variants):
        config = configs[budget, variant.name]
        config = replace(config, train=replace(config.train, seed=seed))
        jobs.append(Job(budget, variant.name, seed, config, out / budget / variant.name / f"seed{seed}"))
    return jobs
