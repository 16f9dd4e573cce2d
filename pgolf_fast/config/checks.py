"""Checks that configuration classes share. `group` is the dotted name of `config`, for messages."""

import difflib
from collections.abc import Callable, Iterable
from functools import partial

from pgolf_fast.errors import PgolfError


def need(condition: object, message: str) -> None:
    """Raise PgolfError with `message` unless the condition holds."""
    if not condition:
        raise PgolfError(message)


def _need_all(rule: str, fits: Callable[[float], bool], group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields fits the rule, or is None."""
    for name in names:
        value = getattr(config, name)
        or_none = ", or None" if "None" in str(type(config).__annotations__[name]) else ""
        need(value is None or fits(value), f"{group}.{name} is {value}; it {rule}{or_none}")


need_positive = partial(_need_all, "must be positive", lambda value: value > 0)
need_not_negative = partial(_need_all, "must not be negative", lambda value: value >= 0)
need_share = partial(_need_all, "must be above 0 and at most 1", lambda value: 0 < value <= 1)
need_decay = partial(_need_all, "must be at least 0 and below 1", lambda value: 0 <= value < 1)


def need_multiple(group: str, config: object, whole: str, part: str) -> None:
    """Raise PgolfError unless the field `whole` is a multiple of the field `part`."""
    a, b = getattr(config, whole), getattr(config, part)
    need(a % b == 0, f"{group}.{whole} {a} is not a multiple of {group}.{part} {b}")


def need_either(group: str, config: object, one: str, other: str) -> None:
    """Raise PgolfError unless exactly one of these two fields is None."""
    a, b = getattr(config, one), getattr(config, other)
    message = f"{group}.{one} is {a} and {group}.{other} is {b}; give one and set the other to None"
    need((a is None) != (b is None), message)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return a line naming what is unknown, the nearest known name if one is close, and the known ones."""
    near = difflib.get_close_matches(name, names := list(known), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}{kind}s are {', '.join(names)}"


def share_of(share: float, count: int) -> int:
    """Return a share of `count`, rounded down but at least 1."""
    return max(1, int(share * count + 1e-9))  # 0.29 * 100 is a little below 29
