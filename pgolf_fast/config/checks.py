"""Checks that configuration classes share. `group` is the dotted name of `config`, for messages."""

import difflib
from collections.abc import Callable, Iterable

from pgolf_fast.errors import PgolfError


def need(condition: object, message: str) -> None:
    """Raise PgolfError with `message` unless the condition holds."""
    if not condition:
        raise PgolfError(message)


def need_positive(group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields is positive, or None."""
    _need_all(group, config, names, lambda value: value > 0, "must be positive")


def need_not_negative(group: str, config: object, *names: str) -> None:
    """Raise PgolfError if one of these fields is negative."""
    _need_all(group, config, names, lambda value: value >= 0, "must not be negative")


def need_share(group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields is above 0 and at most 1, or None."""
    _need_all(group, config, names, lambda value: 0 < value <= 1, "must be above 0 and at most 1")


def need_decay(group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields is at least 0 and below 1, or None."""
    _need_all(group, config, names, lambda value: 0 <= value < 1, "must be at least 0 and below 1")


def _need_all(
    group: str, config: object, names: Iterable[str], fits: Callable[[float], bool], rule: str
) -> None:
    for name in names:
        value = getattr(config, name)
        or_none = ", or None" if "None" in str(type(config).__annotations__[name]) else ""
        need(value is None or fits(value), f"{group}.{name} is {value}; it {rule}{or_none}")


def need_multiple(group: str, config: object, whole: str, part: str) -> None:
    """Raise PgolfError unless the field `whole` is a multiple of the field `part`."""
    a, b = getattr(config, whole), getattr(config, part)
    need(a % b == 0, f"{group}.{whole} {a} is not a multiple of {group}.{part} {b}")


def need_either(group: str, config: object, one: str, other: str) -> None:
    """Raise PgolfError unless exactly one of these two fields is None."""
    a, b = getattr(config, one), getattr(config, other)
    message = f"{group}.{one} is {a} and {group}.{other} is {b}; give one and set the other to None"
    need((a is None) != (b is None), message)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the question that suggests the nearest known name, or an empty string if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]}? " if near else ""


def share_of(share: float, count: int) -> int:
    """Return a share of `count`, rounded down but at least 1."""
    return max(1, int(share * count + 1e-9))  # 0.29 * 100 is a little below 29
