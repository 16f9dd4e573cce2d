"""Plan an ablation: its variants, its budgets, what its steps cost, and the order of its runs.

Budget `measured` is equal training time without a race. A race against the clock measures whatever else the
machine does, and its runs cannot share a CPU. Here steps of every variant are timed in turn in one process.
The runs then have fixed numbers of steps, can share the machine, and can be repeated by anyone.
"""

import bisect
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from pgolf_fast import console
from pgolf_fast.bench.store import provenance
from pgolf_fast.bench.timer import temporarily
from pgolf_fast.config.fields import field_name, flatten, flip, run_config_to_dict, with_fields
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import open_source
from pgolf_fast.distributed import keep_freed_memory, this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import read_json, well_formed, write_text
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.optim.schedule import Schedule
from pgolf_fast.train.loop import build_model
from pgolf_fast.train.trainer import Trainer

BASELINE = "baseline"
Budget = Literal["steps", "time", "measured"]
ENDLESS = 10**7  # steps of a run that ends by its clock
ROUNDS, WARM_UP = 20, 2  # timed steps of each kind, and untimed ones before them

# Fields that all variants share, and what to do instead of flipping them
_SHARED = {
    "name": "the preset's name stays",
    "train.seed": "give --seeds",
    "train.steps": "give --steps",
    "train.max_seconds": "give --seconds",
    "train.schedule": "give --budget",
}
_TEXT = ("data.path", "data.tokenizer", "data.val_tokens", "model.vocab_size", "eval.repeat_tail")
_SHARED |= dict.fromkeys(_TEXT, "all variants are scored on the same text")


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


def make_variants(base: RunConfig, flips: Sequence[Sequence[str]]) -> dict[str, RunConfig]:
    """Return by name the baseline and, for each flip, the baseline with its FIELD=VALUE words set.

    A variant is named by its words in a canonical spelling. Raises PgolfError if there is no flip, or for a
    flip that changes nothing, is given twice, or changes a field that all variants share.
    """
    if not any(flips):
        raise PgolfError("nothing to compare: give --flip FIELD=VALUE, say --flip model.trigram=false")
    variants = {BASELINE: base}
    for words in flips:
        config = flip(base, words)
        _check_flip(base, config, words)
        if same := next((name for name, other in variants.items() if other == config), None):
            raise PgolfError(f"--flip {' '.join(words)} is the same as {same}: leave one out")
        # It also names a folder, which must be the same for every spelling of the values
        values = dict(flatten(config))
        spelled = "+".join(f"{name}={_spell(values[name])}" for name in map(field_name, words))
        variants[spelled.replace("/", "_")] = config
    return variants


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_spell, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _check_flip(base: RunConfig, config: RunConfig, words: Sequence[str]) -> None:
    given = f"--flip {' '.join(words)}"
    if config == base:
        raise PgolfError(f"{given} changes nothing: {base.name} has this already")
    before, now = dict(flatten(base)), dict(flatten(config))
    for name, instead in _SHARED.items():
        if before.get(name) != now.get(name):
            raise PgolfError(f"{given}: {name} is the same for all variants ({instead})")
    if (now_length := config.eval_seq_len) != (length := base.eval_seq_len):
        text = f"{given} changes the windows that scores are over from {length} to {now_length} tokens"
        raise PgolfError(f"{text}: add eval.seq_len={length} to it")


def with_budget(
    config: RunConfig, budget: Budget, steps: int | None = None, seconds: float | None = None
) -> RunConfig:
    """Return `config` limited to `steps` optimizer steps or `seconds` of training, with its schedule adapted.

    None takes the limit of the configuration. Raises PgolfError if that limit is of the other kind.
    """
    train = config.train
    if budget == "time":
        steps, seconds, schedule = ENDLESS, train.max_seconds if seconds is None else seconds, "time"
        if seconds is None:
            raise PgolfError(f"{config.name} ends by its steps: give --seconds for budget time")
    else:
        if steps is None and train.schedule == "time":
            raise PgolfError(f"{config.name} ends by its clock: give --steps for budget {budget}")
        steps, seconds, schedule = train.steps if steps is None else steps, None, "steps"
    limits = {"train.steps": steps, "train.max_seconds": seconds, "train.schedule": schedule}
    return with_fields(config, limits)


@dataclass(frozen=True)
class StepCost:
    """Median seconds of a plain step and, if the variant has meta-learning, of a step with it."""

    plain: float
    meta: float | None = None

    def seconds(self, config: RunConfig) -> float:
        """Return the seconds of all steps of a run."""
        with_meta = meta_steps(config)
        return self.plain * (config.train.steps - with_meta) + (self.meta or 0.0) * with_meta


def meta_steps(config: RunConfig) -> int:
    """Return the number of steps with meta-learning in a run of `config.train.steps` steps."""
    train, meta = config.train, config.train.meta
    if meta is None:
        return 0
    schedule = Schedule(train)
    return sum(schedule.multiplier(step, 0.0) > meta.above for step in range(0, train.steps, meta.every))


def _fill_time(config: RunConfig, cost: StepCost, limit: float) -> RunConfig:
    # The number of meta steps depends on the number of steps through the schedule, so search for it.
    def run(steps: int) -> RunConfig:
        return replace(config, train=replace(config.train, steps=steps))

    choices = range(2, int(limit / min(cost.plain, cost.meta or cost.plain)) + 1)
    fitting = bisect.bisect_right(choices, limit * (1 + 1e-9), key=lambda steps: cost.seconds(run(steps)))
    return run(1 + fitting)


def make_jobs(
    variants: Mapping[str, RunConfig],
    seeds: Sequence[int],
    budgets: Sequence[Budget],
    out: Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    costs: Mapping[str, StepCost] | None = None,
) -> list[Job]:
    """Return every run, with its folder out/BUDGET/VARIANT/seedN.

    For each seed and budget, all variants run back to back, so that any drift in machine speed affects
    them alike. Budget `measured` needs `costs`, the `StepCost` of each variant by name: a variant gets as
    many steps as fit into the training time of the baseline. Raises PgolfError for a seed given twice, or a
    missing limit.
    """
    if len(set(seeds)) < len(seeds) or not seeds:
        raise PgolfError(f"--seeds {' '.join(map(str, seeds))}: give at least one, each once")
    configs: dict[str, dict[str, RunConfig]] = {}
    for budget in budgets:
        limited = {name: with_budget(config, budget, steps, seconds) for name, config in variants.items()}
        if budget == "measured":
            assert costs is not None
            limit = costs[BASELINE].seconds(limited[BASELINE])
            others = {n: _fill_time(c, costs[n], limit) for n, c in limited.items() if n != BASELINE}
            limited = {BASELINE: limited[BASELINE], **others}
        configs[budget] = limited
    jobs = []
    for seed, budget, variant in itertools.product(seeds, budgets, variants):
        config = with_fields(configs[budget][variant], {"train.seed": seed})
        jobs.append(Job(budget, variant, seed, config, out / budget / variant / f"seed{seed}"))
    return jobs


def step_costs(
    configs: Mapping[str, RunConfig], path: Path, *, workers: int = 1, rounds: int = ROUNDS
) -> dict[str, StepCost]:
    """Return the step costs of each configuration, read from the file `path` if it has them.

    Run it on a quiet machine: every round takes one step of each kind in turn, with the threads that each of
    `workers` runs will have. Raises PgolfError for a configuration with train.reptile, whose steps come in
    two lengths, and on a machine with GPUs.
    """
    asked = json.loads(json.dumps({name: run_config_to_dict(config) for name, config in configs.items()}))
    if path.is_file():
        with well_formed(path):
            known = read_json(path)
            if known["configs"] == asked:
                return {name: StepCost(**cost) for name, cost in known["costs"].items()}
    threads = torch.get_num_threads()
    with temporarily(torch.set_num_threads, max(1, threads // workers), threads):
        seconds = _measure(configs, rounds)
    median = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    costs = {name: StepCost(median[name, False], median.get((name, True))) for name in configs}
    content = {"costs": {name: asdict(cost) for name, cost in costs.items()}, "configs": asked}
    write_text(path, json.dumps({**content, **provenance()}, indent=2) + "\n")
    return costs


def cost_table(costs: Mapping[str, StepCost], baseline: str) -> console.Table:
    """Tabulate the milliseconds of each kind of step, absolute and relative to the baseline's plain step."""
    steps = [(f"{name}, {kind}", s) for name, cost in costs.items() for kind, s in asdict(cost).items() if s]
    rows = [(name, f"{1e3 * s:.1f}", f"{s / costs[baseline].plain:.3f}") for name, s in steps]
    return console.Table(("step", "ms", "of the baseline's plain step"), rows)


def _measure(configs: Mapping[str, RunConfig], rounds: int) -> dict[tuple[str, bool], list[float]]:
    """Return the seconds of each step by (configuration, with meta-learning)."""
    if torch.cuda.is_available():
        raise PgolfError("budget measured is for runs that share a CPU: on a GPU give --budget time")
    keep_freed_memory()
    trainers: dict[tuple[str, bool], Trainer] = {}
    for name, config in configs.items():
        if config.train.reptile is not None:
            raise PgolfError(f"{name}: steps of train.reptile come in two lengths: give --budget time")
        trainers[name, False] = _trainer(config, {"train.meta": None})
        if config.train.meta is not None:
            trainers[name, True] = _trainer(config, {"train.meta.every": 1})
    seconds: dict[tuple[str, bool], list[float]] = {kind: [] for kind in trainers}
    try:
        for number in range(WARM_UP + rounds):
            for kind, trainer in trainers.items():
                begin = time.perf_counter()
                trainer.advance()
                if number >= WARM_UP:
                    seconds[kind].append(time.perf_counter() - begin)
    finally:
        for trainer in trainers.values():
            trainer.loader.close()  # type: ignore[attr-defined]
    return seconds


def _trainer(config: RunConfig, fields: dict[str, object]) -> Trainer:
    world = this_process()
    choose_kernels(config.kernels, world.device)
    dtype = str(resolve_dtype(config.train.compute_dtype, world.device)).removeprefix("torch.")
    # With a million steps the learning rate does not fall yet, so meta-learning is active.
    limits = {"train.schedule": "steps", "train.steps": 10**6, "train.max_seconds": None}
    config = with_fields(config, {**fields, **limits, "train.compute_dtype": dtype})
    source = open_source(config.data, config.model.vocab_size)
    loader = make_loader(source.train_shards(), config)
    return Trainer(build_model(config, source, world), config, loader, world)
