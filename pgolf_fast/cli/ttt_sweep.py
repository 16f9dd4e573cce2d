"""`pgolf ttt-sweep`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from pgolf_fast import console
from pgolf_fast.cli.arguments import existing, parse
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.adapters import adapters, unknown_adapter
from pgolf_fast.errors import PgolfError

OWN = "run"


@dataclass(frozen=True)
class _Sweep:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, packed."""
    adapters: tuple[str, ...] = ()
    """Which; default: all that have a name, and `run`, the run's own settings."""
    stride: int | None = None
    """Tokens between windows; default: the run's."""
    tokens: int | None = None
    """Score only this many validation tokens; default: all."""
    after: int = 0
    """Compare only the documents that begin at this target or later."""
    data: Path | None = None
    """Folder of validation shards; default: the run's."""
    allow_illegal: bool = False
    """Compare also what breaks the rules; its row is marked."""


def sweep(argv: list[str]) -> int:
    """pgolf ttt-sweep RUN [--adapters NAME ...] [--stride N] [--tokens N] [--after N] [--allow-illegal]"""
    from pgolf_fast.config.run_folder import RunFolder
    from pgolf_fast.distributed import join_world
    from pgolf_fast.lab.compare.sweep import sweep_run, sweep_table

    arguments = parse("ttt-sweep", _Sweep, argv)
    folder = RunFolder(existing(arguments.run, "run folder"))
    config = folder.read_config()
    known = {**adapters(config.eval_seq_len), OWN: config.ttt}
    if unknown := set(arguments.adapters) - set(known):
        raise PgolfError(unknown_adapter(min(unknown), known))
    if arguments.after < 0:
        raise PgolfError(f"--after is {arguments.after}; it must not be negative")
    chosen = {name: known[name] for name in arguments.adapters or _different(known)}
    data = config.data
    if arguments.data is not None:
        data = replace(data, path=str(arguments.data))
    if arguments.tokens is not None:
        data = replace(data, val_tokens=arguments.tokens)
    stride = arguments.stride or config.eval.stride
    config = replace(config, data=data, eval=replace(config.eval, stride=stride))
    with join_world() as world:
        console.setup_logging(folder.log_file if world.is_main else None, quiet=not world.is_main)
        sweep_run(folder, config, chosen, world, after=arguments.after, allow_illegal=arguments.allow_illegal)
    if world.is_main:
        print_out(sweep_table(json.loads(folder.sweep_file.read_text(encoding="utf-8"))).text())
        for name, ttt in chosen.items():
            if ttt.illegal:
                print_out(f"{name} BREAKS THE RULES of the challenge: {ttt.illegal}.")
        print_out(f"wrote {folder.path / 'ttt_sweep.json'}")
    return 0


def _different(known: dict) -> list[str]:
    """All names but that of the run's own settings where another has the same."""
    return [name for name in known if name != OWN or known[OWN] not in [known[n] for n in known if n != OWN]]
