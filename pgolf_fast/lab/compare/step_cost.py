"""Equal training time without a race: how many steps each variant can make in the time of the baseline.

A race against the clock measures whatever else the machine does, and its runs cannot share a CPU. Here steps
of every variant are timed in turn in one process. The runs then have fixed numbers of steps, can share the
machine, and can be repeated by anyone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from pgolf_fast import console
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import open_source
from pgolf_fast.distributed import devices, keep_freed_memory, this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.optim.schedule import Schedule
from pgolf_fast.train.loop import build_model
from pgolf_fast.train.trainer import Trainer

ROUNDS, WARM_UP = 20, 2


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


def equal_time(
    configs: Mapping[str, RunConfig], costs: Mapping[str, StepCost], baseline: str
) -> dict[str, RunConfig]:
    """Return the configurations with as many steps each as fit into the time of the baseline's run."""
    limit = costs[baseline].seconds(configs[baseline])
    return {
        name: config if name == baseline else _with_steps(config, costs[name], limit)
        for name, config in configs.items()
    }


def _with_steps(config: RunConfig, cost: StepCost, limit: float) -> RunConfig:
    # The number of meta steps depends on the number of steps through the schedule, so search for it.
    low, high = 1, max(1, int(limit / min(cost.plain, cost.meta or cost.plain))) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = cost.seconds(replace(config, train=replace(config.train, steps=middle))) <= limit * (1 + 1e-9)
        low, high = (middle, high) if fits else (low, middle)
    return replace(config, train=replace(config.train, steps=low))


def step_costs(
    configs: Mapping[str, RunConfig], path: Path, *, workers: int = 1, rounds: int = ROUNDS
) -> dict[str, StepCost]:
    """Return the step costs of each configuration, read from the file `path` if it has them.

    Run it on a quiet machine: every round takes one step of each kind in turn, with the threads that each of
    `workers` runs will have. Raises PgolfError for a
    configuration with train.reptile, whose steps come in two lengths, and on a machine with GPUs.
    """
    asked = json.loads(json.dumps({name: run_config_to_dict(config) for name, config in configs.items()}))
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["configs"] == asked:
            return {name: StepCost(**cost) for name, cost in known["costs"].items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    try:
        seconds = _measure(configs, rounds)
    finally:
        torch.set_num_threads(threads)
    median = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    costs = {name: StepCost(median[name, False], median.get((name, True))) for name in configs}
    content = {
        "costs": {name: asdict(cost) for name, cost in costs.items()},
        "configs": asked,
        **provenance(),
    }
    write_text(path, json.dumps({**content, **provenance()}, indent=2) + "\n")
    return costs


def cost_table(costs: Mapping[str, StepCost], baseline: str) -> console.Table:
    """Tabulate the milliseconds of each kind of step, absolute and relative to the baseline's plain step."""
    kinds = {
        f"{name}, {kind}": s for name, c in costs.items() for kind, s in asdict(c).items() if s is not None
    }
    rows = [(name, f"{1e3 * s:.1f}", f"{s / costs[baseline].plain:.3f}") for name, s in kinds.items()]
    return console.Table(("step", "ms", "of the baseline's plain step"), rows)


def _measure(configs: Mapping[str, RunConfig], rounds: int) -> dict[tuple[str, bool], list[float]]:
    """Return the seconds of each step by (configuration, with meta-learning)."""
    if devices():
        raise PgolfError("budget measured is for runs that share a CPU: on a GPU give --budget time")
    keep_freed_memory()
    trainers: dict[tuple[str, bool], Trainer] = {}
    for name, config in configs.items():
        if config.train.reptile is not None:
            raise PgolfError(f"{name}: steps of train.reptile come in two lengths: give --budget time")
        meta = config.train.meta
        trainers[name, False] = _trainer(replace(config, train=replace(config.train, meta=None)))
        if meta is not None:
            every_step = replace(config.train, meta=replace(meta, every=1))
            trainers[name, True] = _trainer(replace(config, train=every_step))
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


def _trainer(config: RunConfig) -> Trainer:
    world = this_process()
    choose_kernels(config.kernels, world.device)
    # With a million steps the learning rate does not fall yet, so meta-learning is active.
    dtype = str(resolve_dtype(config.train.compute_dtype, world.device)).removeprefix("torch.")
    train = replace(config.train, schedule="steps", steps=10**6, max_seconds=None)
    config = replace(config, train=replace(train, compute_dtype=dtype))  # type: ignore[arg-type]
    source = open_source(config.data, config.model.vocab_size)
    loader = make_loader(source.train_shards(), config)
    return Trainer(build_model(config, source, world), config, loader, world)
