"""Variants of a configuration in words: `model.trigram=false`, `train.meta=none`, `model.ve_layers=2,3`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.serialize import run_config_from_dict, run_config_to_dict, unknown_field
from pgolf_fast.errors import PgolfError


def flip(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """`config` with every FIELD=VALUE of `words` set, all at once: only together do they need to fit.

    A value is read as its field's type says: true or false, a number, a word, several with commas between,
    and none where the field may be off. Setting a field of a group that is off switches the group on. Raises
    PgolfError for a word of another form, an unknown field, values that are not allowed, a field that is set
    twice, or a group that is none and has a field set.
    """
    tree = run_config_to_dict(config)
    given: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not name or not equals:
            raise PgolfError(f"{word!r} is not FIELD=VALUE: write it like model.trigram=false")
        name = field_name(word)
        _set(tree, name, text)
        for other, before in given.items():
            _check_apart(name, word, other, before)
        given[name] = word
    return run_config_from_dict(tree)


def field_name(word: str) -> str:
    """The field that FIELD=VALUE sets: train.log_every of --train.log-every=5."""
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def _check_apart(name: str, word: str, other: str, before: str) -> None:
    if name == other:
        raise PgolfError(
            f"{before} and {word} set the same field: leave one out, or give each variant a --flip of its own"
        )
    if name.startswith(f"{other}.") or other.startswith(f"{name}."):
        raise PgolfError(f"{before} and {word} contradict: a group that is none has no fields; leave one out")


def _set(tree: dict[str, Any], name: str, text: str) -> None:
    kind: Any = RunConfig
    *groups, last = name.split(".")
    for depth, group in enumerate(groups, start=1):
        kind = _without_none(_hint(kind, group, name))
        if not dataclasses.is_dataclass(kind):
            raise PgolfError(f"unknown field {name}: {'.'.join(groups[:depth])} is a value, not a group")
        if tree[group] is None:
            tree[group] = {}
        tree = tree[group]
    tree[last] = _read(_hint(kind, last, name), text, name)


def _hint(kind: type, field: str, name: str) -> Any:
    hints = typing.get_type_hints(kind)
    if field not in hints:
        parents = name.split(".")[: name.split(".").index(field)]
        raise PgolfError(unknown_field(".".join([*parents, field]), list(hints)))
    return hints[field]


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    (inner,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    return inner


def _read(hint: Any, text: str, name: str) -> object:
    """The value that `text` stands for; what fits no type stays text, which the field then refuses."""
    inner = _without_none(hint)
    if inner is not hint and text.lower() in ("none", "off"):
        return None
    if dataclasses.is_dataclass(inner):
        off = ", or none" if inner is not hint else ""
        raise PgolfError(f"{name} is {text!r}; it is a group: set its fields ({name}.FIELD=VALUE){off}")
    if typing.get_origin(inner) is tuple:
        return [_read(typing.get_args(inner)[0], part, name) for part in text.split(",") if part]
    if inner is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if inner in (int, float):
        try:
            return inner(text)
        except ValueError:
            return text
    return text
