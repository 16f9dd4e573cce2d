"""`pgolf completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from pgolf_fast.cli.commands import COMMANDS, GROUPS
from pgolf_fast.cli.options import resolve
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.presets import preset


@dataclass(frozen=True)
class Completion:
    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Shell to write for. For zsh: pgolf completion zsh > DIR/_pgolf, where DIR is in fpath."""


def completion(options: Completion) -> int:
    union: Any = Union  # of types that are only known at run time
    commands: dict[str, list[Any]] = {"": [], "data": []}
    for name, command in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        about = tyro.conf.subcommand(last, description=command.about)
        kind: Any = resolve(command.load()[1], preset("exp101"))
        commands[group].append(Annotated[kind, about])
    about = tyro.conf.subcommand("data", description=GROUPS["data"])
    commands[""].append(Annotated[union[tuple(commands["data"])], about])
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        tyro.cli(union[tuple(commands[""])], prog="pgolf", args=["--tyro-print-completion", options.shell])
    print_out(script.getvalue().rstrip())
    return 0
