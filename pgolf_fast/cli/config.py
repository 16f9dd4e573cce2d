"""`pgolf config`: presets and their fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast import console
from pgolf_fast.cli.options import AllFields, Size, existing, preset_with
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import PRESETS, preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Config:
    fields: AllFields
    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help_behavior_hint="")] = ""
    """Preset to print; without one, all presets are listed."""
    diff: str | None = None
    """Print only the fields that differ from this preset."""
    shrink: Size | None = None
    """Print the preset at this size."""
    from_env: Path | None = None
    """Translate the environment variables of a run script instead."""
    base: str | None = None
    """With --from-env: the preset that the variables change; default: exp101_as_run."""


def config(options: Config) -> int:
    if options.from_env is not None:
        if options.preset or options.fields or options.diff or options.shrink:
            raise PgolfError("--from-env takes no preset and no other option than --base: leave them out")
        return _from_env(options.from_env, options.base or "exp101_as_run")
    if options.base is not None:
        raise PgolfError("--base is for --from-env; name the preset itself: pgolf config PRESET")
    if not options.preset:
        if options.fields or options.diff or options.shrink:
            raise PgolfError("config needs a preset, for example exp101; `pgolf config` lists them")
        presets = [(name, make(), (make.__doc__ or "").strip()) for name, make in PRESETS.items()]
        rows = [(name, f"{made.model.num_parameters():,}", about) for name, made, about in presets]
        print_out(console.table(rows, ("preset", "parameters", "description")))
        return 0
    chosen = preset_with(options.preset, options.shrink, options.fields)
    if options.diff is not None:
        _print_difference(chosen, preset(options.diff))
        return 0
    fields = [(name, _shown(value)) for name, value in flatten(chosen)]
    print_out(console.table([*fields, ("parameters", f"{chosen.model.num_parameters():,}")]))
    return 0


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _print_difference(ours: RunConfig, theirs: RunConfig) -> None:
    left, right = dict(flatten(ours)), dict(flatten(theirs))
    left["parameters"], right["parameters"] = ours.model.num_parameters(), theirs.model.num_parameters()
    rows = [
        (name, _shown(left.get(name)), _shown(right.get(name)))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name) and name != "name"
    ]
    if rows:
        print_out(console.table(rows, ("field", ours.name, theirs.name)))
    else:
        print_out(f"{ours.name} and {theirs.name} do not differ")


def _from_env(path: Path, name: str) -> int:
    from pgolf_fast.config.env import translate

    script = existing(path, "run script").read_text(encoding="utf-8")
    base = preset(name)
    translation = translate(script, base)
    rows = sorted(translation.used.items())
    print_out(console.table(rows, ("variable", "field")) if rows else "no known variables")
    print_out(f"\nchanges to {base.name}:")
    _print_difference(translation.config, base)
    if translation.unknown:
        unknown = ", ".join(f"{name}={value}" for name, value in sorted(translation.unknown.items()))
        print_out(f"\nunknown, not translated: {unknown}")
    return 0
