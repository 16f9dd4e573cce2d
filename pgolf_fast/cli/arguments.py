"""Command-line arguments from dataclasses (tyro), with unknown names refused in one line."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import tyro

from pgolf_fast.config.fields import flatten, set_fields
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.shrink import shrink
from pgolf_fast.errors import PgolfError

Arguments = TypeVar("Arguments")
_OFF = ("none", "None", "off")
_GROUPS = ("train.meta", "train.reptile", "train.qat")
"""Settings that may be off altogether."""


def parse(
    command: str, kind: type[Arguments], argv: list[str], default: Arguments | None = None
) -> Arguments:
    """The dataclass `kind` from words; `--help` prints its fields and exits.

    Raises PgolfError naming the nearest known field for one that does not exist.
    """
    known = _names(kind, default)
    parsed, unknown = tyro.cli(
        kind,
        prog=f"pgolf {command}",
        args=argv,
        return_unknown_args=True,
        default=tyro.MISSING_NONPROP if default is None else default,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if unknown:
        raise PgolfError(_unknown(command, unknown[0], known))
    return parsed


def _names(kind: type, default: object) -> list[str]:
    """Every option of a command, by dotted name."""
    names = []
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name, None)
        prefix = "" if field.name == "config" else f"{field.name}."
        if dataclasses.is_dataclass(value):
            names += [prefix + name for name, _ in flatten(value)]
        else:
            names.append(field.name)
    return names


def _unknown(command: str, word: str, known: list[str]) -> str:
    if not word.startswith("-"):
        return f"{command} does not know what to do with {word!r}: see `pgolf {command} --help`"
    name = word.lstrip("-").split("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean --{near[0]}?" if near else f"see `pgolf {command} --help`"
    return f"unknown field --{name}: {hint}"


def preset_and_overrides(argv: list[str], what: str = "preset") -> tuple[RunConfig, list[str]]:
    """The preset named first, at the size of `--shrink`, and the words that are left.

    Optional groups are switched off where `--train.meta none` says so.
    """
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            return preset("exp101"), argv
        raise PgolfError(f"give a {what} first, for example exp101; `pgolf config --help` lists them")
    size, others = _take("--shrink", argv[1:])
    config, rest, words = preset(argv[0]), [], iter(others)
    if size is not None:
        config = shrink(config, size)
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in _GROUPS:
            value = value if equals else next(words, "")
            if value not in _OFF:
                raise PgolfError(
                    f"--{name} is {value!r}; it can be none, or set one of its fields (--{name}.FIELD)"
                )
            config = set_fields(config, {name: None})
        else:
            group = ".".join(name.split(".")[:2])
            if group in _GROUPS and name != group:  # setting a field switches the group on
                current = dict(flatten(config))
                if current.get(group, ...) is None:
                    config = set_fields(config, {group: {}})
            rest.append(word)
    return config, rest


def _take(option: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of an option, the last of several, and the words without it."""
    value, rest, words = None, [], iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name == option:
            value = text if equals else next(words, "")
        else:
            rest.append(word)
    return value, rest


def existing(path: Path, what: str) -> Path:
    """`path` if it exists. Raises PgolfError naming it."""
    if not path.exists():
        raise PgolfError(f"{what} {path} does not exist")
    return path


def first_run(argv: list[str], kind):
    """The run folder named first, so that its settings can be the defaults of the rest."""
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            return _Help(Path("RUN"))
        raise PgolfError("give a run folder first (the --out of a training run)")
    return kind(existing(Path(argv[0]), "run folder"))


@dataclass(frozen=True)
class _Help:
    """Stands for a run folder while `--help` is printed."""

    path: Path

    def read_config(self) -> RunConfig:
        return preset("exp101")
