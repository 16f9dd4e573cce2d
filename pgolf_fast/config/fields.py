"""Configurations as JSON and as dotted fields, strictly: unknown fields and wrong types are errors."""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError

Config = TypeVar("Config")


def run_config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """Invert `run_config_to_dict`. Raises PgolfError for a missing group, unknown field or wrong type."""
    groups = ("model", "data", "train", "quant", "eval")
    if isinstance(values, dict) and (missing := [name for name in groups if name not in values]):
        raise PgolfError(f"the configuration of a run has lost {', '.join(missing)}: restore the whole of it")
    return from_dict(RunConfig, values)


def from_dict(cls: type[Config], values: object, where: str = "") -> Config:
    """Build a configuration dataclass from plain values; absent fields take their defaults.

    `where` is the group's dotted name, for messages. Raises PgolfError for unknown fields and wrong types.
    """
    if not isinstance(values, dict):
        raise PgolfError(f"{where or cls.__name__} is {values!r}; it must be an object with named fields")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        full = f"{where}.{name}" if where else name
        if name not in hints:
            raise _unknown_field(full.split("."), hints)
        arguments[name] = _convert(hints[name], value, full)
    return cls(**arguments)


def flatten(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every field as (dotted name, value). A group that is off is one field with value None."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def with_fields(config: Config, fields: Mapping[str, object]) -> Config:
    """Return a copy of `config` with dotted fields set, all at once: only the result has to be valid.

    Names may have `__` for dots (train__steps). Text is parsed by the type of its field: true or false, a
    number, a word, items separated by commas, none for a field that may be off. A path is text too. Setting a
    field of a group that is off turns the group on with its defaults.
    Raises PgolfError for an unknown field or a value that is not allowed.
    """
    tree = dataclasses.asdict(config)  # type: ignore[call-overload]
    values = {name.replace("__", "."): value for name, value in fields.items()}
    for name, value in sorted(values.items()):  # a group before its fields
        hint, place = field_type(type(config), name), tree
        *groups, last = name.split(".")
        for group in groups:
            place[group] = {} if place[group] is None else place[group]
            place = place[group]
        if isinstance(value, str | Path):
            value = _parse(hint, str(value), name)
        place[last] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return from_dict(type(config), tree)


def flip(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """Return `config` with the FIELD=VALUE of every word set: model.trigram=false, train.meta=none.

    Raises PgolfError as `with_fields` does, and for malformed, repeated or contradicting words.
    """
    given: dict[str, str] = {}
    for word in words:
        name = field_name(word)
        need(name and "=" in word, f"{word!r} is not FIELD=VALUE: write it like model.trigram=false")
        for other, before in given.items():
            hint = "leave one out, or give each variant a --flip of its own"
            need(name != other, f"{before} and {word} set the same field: {hint}")
            nested = name.startswith(f"{other}.") or other.startswith(f"{name}.")
            hint = "a group that is none has no fields; leave one out"
            need(not nested, f"{before} and {word} contradict: {hint}")
        given[name] = word
    return with_fields(config, {name: word.partition("=")[2] for name, word in given.items()})


def field_name(word: str) -> str:
    """Return the field that FIELD=VALUE sets: train.log_every for --train.log-every=5."""
    return word.partition("=")[0].lstrip("-").replace("-", "_")


def field_type(kind: Any, name: str) -> Any:
    """Return the type of a dotted field. Raises PgolfError naming the nearest field if there is none."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        kind = without_none(kind)
        is_group = dataclasses.is_dataclass(kind)
        need(is_group, f"unknown field {name}: {'.'.join(parts[:depth])} is a value, not a group")
        hints = typing.get_type_hints(kind)
        if part not in hints:
            raise _unknown_field(parts[: depth + 1], hints)
        kind = hints[part]
    return kind


def _unknown_field(parts: Sequence[str], known: Iterable[str]) -> PgolfError:
    *parents, last = parts
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.4)
    hint = f"did you mean {'.'.join([*parents, near[0]])}?" if near else f"known are {', '.join(known)}"
    return PgolfError(f"unknown field {'.'.join(parts)}: {hint}")


def without_none(hint: Any) -> Any:
    """Return X for the type X | None, and any other type as it is."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return hint
    (inner,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    return inner


def _convert(hint: Any, value: object, where: str) -> Any:
    inner = without_none(hint)
    origin, options = typing.get_origin(inner), typing.get_args(inner)
    if value is None and inner is not hint:
        return None
    if dataclasses.is_dataclass(inner):
        return from_dict(typing.cast(type, inner), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(options[0], item, where) for item in value)
    if origin is typing.Literal:
        need(value in options, f"{where} is {value!r}; it must be one of {', '.join(map(str, options))}")
        return value
    if inner is float and type(value) is int:
        return float(value)
    # bool is a subclass of int, but True is no number here
    if origin is None and isinstance(value, inner) and not (inner is int and isinstance(value, bool)):
        need(not isinstance(value, float) or math.isfinite(value), f"{where} is {value}; it must be finite")
        return value
    raise PgolfError(f"{where} is {value!r}; it must be {getattr(inner, '__name__', inner)}")


def _parse(hint: Any, text: str, name: str) -> object:
    """Return the value that text means; text that fits no type is left for `_convert` to reject."""
    inner = without_none(hint)
    if inner is not hint and text.lower() in ("none", "off", "null"):
        return None
    if dataclasses.is_dataclass(inner):
        off = ", or none" if inner is not hint else ""
        raise PgolfError(f"{name} is {text!r}; it is a group: set its fields ({name}.FIELD=VALUE){off}")
    if typing.get_origin(inner) is tuple:
        return [_parse(typing.get_args(inner)[0], part, name) for part in text.split(",") if part]
    if inner is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if inner in (int, float):
        with contextlib.suppress(ValueError):
            return inner(text)
    return text
