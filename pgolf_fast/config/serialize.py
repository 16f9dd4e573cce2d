"""Configurations to and from JSON, strictly: unknown and missing fields are errors, types are checked."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError

Config = TypeVar("Config")

# What run folders of earlier versions say: name -> its name now, and what its values are now
_FORMER = {"quant.scale_floor": ("grid", {True: "reference", False: "percentile"})}


def run_config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain JSON values (tuples become lists)."""
    return dataclasses.asdict(config)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The inverse of `run_config_to_dict`. Raises PgolfError for a field it does not know or a wrong type."""
    return from_dict(RunConfig, values)


def from_dict(cls: type[Config], values: object, where: str = "") -> Config:
    """A dataclass of this package from plain values; absent fields take their defaults."""
    if not isinstance(values, dict):
        raise PgolfError(f"{where or cls.__name__} is {values!r}; it must be an object with named fields")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    arguments = {}
    for name, value in values.items():
        full = f"{where}.{name}" if where else name
        if full in _FORMER and isinstance(value, bool):
            name, meaning = _FORMER[full]
            value = meaning[value]
        elif name not in names:
            raise PgolfError(unknown_field(full, names))
        arguments[name] = _convert(hints[name], value, full)
    return cls(**arguments)


def unknown_field(name: str, known: list[str]) -> str:
    """One line naming an unknown field and the nearest known one."""
    *parents, last = name.split(".")
    near = difflib.get_close_matches(last, known, n=1, cutoff=0.4)
    hint = f": did you mean {'.'.join([*parents, near[0]])}?" if near else f": known are {', '.join(known)}"
    return f"unknown field {name}{hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in options:
            return None
        (inner,) = (o for o in options if o is not type(None))
        return _convert(inner, value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(options[0], item, where) for item in value)
    if origin is typing.Literal:
        if value in options:
            return value
        raise PgolfError(f"{where} is {value!r}; it must be one of {', '.join(map(str, options))}")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise PgolfError(f"{where} is {value!r}; it must be {getattr(hint, '__name__', hint)}")


def flatten(config: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every field as (dotted name, value); a nested configuration that is None is one field."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def replace_field(config: Config, name: str, value: object) -> Config:
    """A copy with one dotted field set. Raises PgolfError for an unknown field or a wrong type."""
    head, _, rest = name.partition(".")
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    if head not in names:
        raise PgolfError(unknown_field(head, names))
    current = getattr(config, head)
    if rest:
        if current is None:  # an optional group that is off: setting one of its fields turns it on
            hint = typing.get_type_hints(type(config))[head]
            (group,) = (o for o in typing.get_args(hint) if dataclasses.is_dataclass(o))
            current = typing.cast(type, group)()
        elif not dataclasses.is_dataclass(current):
            raise PgolfError(f"unknown field {name}: {head} is a value, not a group")
        try:
            value = replace_field(current, rest, value)
        except PgolfError as error:
            if str(error).startswith("unknown field"):
                known = [f.name for f in dataclasses.fields(current)]  # type: ignore[arg-type]
                raise PgolfError(unknown_field(name, known)) from None
            raise
    else:
        value = _convert(typing.get_type_hints(type(config))[head], value, head)
    return dataclasses.replace(config, **{head: value})  # type: ignore[type-var]


def with_fields(config: Config, fields: dict[str, object]) -> Config:
    """Return a copy with fields set by name, where `__` or `.` separates groups: `train__steps=10`.

    Paths become strings. Raises PgolfError for an unknown field or a wrong type.
    """
    for name, value in fields.items():
        plain = str(value) if isinstance(value, Path) else value
        config = replace_field(config, name.replace("__", "."), plain)
    return config
