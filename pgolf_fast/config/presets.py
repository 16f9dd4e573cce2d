"""Presets: functions that return a complete configuration. Variants read like diffs of their parent."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from pgolf_fast.config.schema import QATConfig, RunConfig
from pgolf_fast.config.shrink import SIZES, shrink
from pgolf_fast.config.systems import baseline, pr296_error_guided, pr296_reptile, pr301, pr1250
from pgolf_fast.errors import PgolfError


def exp101() -> RunConfig:
    """PR 1501 as its authors describe it, with every part in effect (27 M parameters)."""
    # train.meta.dilute divides the meta objective by the number of micro-batches, as in the original: the
    # described weight of 0.5 acts as 0.0625 with eight of them
    return RunConfig(name="exp101")


def exp101_as_run() -> RunConfig:
    """PR 1501 as its program ran, for parity with the published numbers."""
    base = exp101()
    return replace(
        base,
        name="exp101_as_run",
        model=replace(base.model, trigram=False, rope_bf16_tables=True),
        train=replace(base.train, qat=QATConfig(banks=False)),
        average=replace(base.average, swa_apply=False),
        eval=replace(base.eval, repeat_tail=True),
        ttt=replace(base.ttt, parameters="all", quantize_forward="projections"),
    )


def exp105a() -> RunConfig:
    """exp101 without the meta-learning step: the ablation."""
    base = exp101()
    return replace(base, name="exp105a", train=replace(base.train, meta=None))


def exp106() -> RunConfig:
    """PR 1502: exp101 with meta-learning across the batch, a delta loss and slot rates."""
    base = exp101()
    assert base.train.meta is not None
    meta = replace(base.train.meta, method="cross_chunk", delta_weight=0.3, slot_rates=True)
    return replace(base, name="exp106", train=replace(base.train, meta=meta))


def exp101_swiglu() -> RunConfig:
    """exp101 with a gated MLP of the same size: 2 x 1024 up rows and 1024 hidden channels."""
    base = exp101()
    return replace(
        base, name="exp101_swiglu", model=replace(base.model, mlp_activation="swiglu", mlp_mult=2.0)
    )


def small() -> RunConfig:
    """exp101 with about 3 M parameters: ten minutes on two CPU cores."""
    return shrink(exp101(), "small")


def tiny() -> RunConfig:
    """exp101 with about 1 M parameters, for the demo: two minutes on two CPU cores."""
    return shrink(exp101(), "tiny")


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        exp101,
        exp101_as_run,
        exp105a,
        exp106,
        exp101_swiglu,
        baseline,
        pr296_reptile,
        pr296_error_guided,
        pr301,
        pr1250,
        small,
        tiny,
    )
}


def is_preset(name: str) -> bool:
    """Return True if `preset` knows the name."""
    parent, _, size = name.rpartition("_")
    return name in PRESETS or (parent in PRESETS and size in SIZES)


def preset(name: str) -> RunConfig:
    """Return the preset of that name; `<preset>_<size>` is a shrunken one (exp105a_tiny).

    Raises PgolfError suggesting the nearest name.
    """
    parent, _, size = name.rpartition("_")
    if name not in PRESETS and parent in PRESETS and size in SIZES:
        return shrink(PRESETS[parent](), size)
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PgolfError(f"unknown preset {name!r}: {hint}presets are {', '.join(PRESETS)}")
    return PRESETS[name]()
