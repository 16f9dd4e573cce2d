"""Checks that configuration classes share."""

from __future__ import annotations

from pgolf_fast.errors import PgolfError


def need(condition: bool, message: str) -> None:
    """Raise PgolfError with `message` unless the condition holds."""
    if not condition:
        raise PgolfError(message)


def need_positive(group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields of `group` is positive, or None."""
    for name in names:
        value = getattr(config, name)
        message = f"{group}.{name} is {value}; it must be positive{_or_none(config, name)}"
        need(value is None or value > 0, message)


def need_not_negative(group: str, config: object, *names: str) -> None:
    """Raise PgolfError if one of these fields of `group` is negative."""
    for name in names:
        value = getattr(config, name)
        need(value >= 0, f"{group}.{name} is {value}; it must not be negative")


def need_share(group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields is above 0 and at most 1, or None."""
    for name in names:
        value = getattr(config, name)
        message = f"{group}.{name} is {value}; it must be above 0 and at most 1{_or_none(config, name)}"
        need(value is None or 0 < value <= 1, message)


def need_decay(group: str, config: object, *names: str) -> None:
    """Raise PgolfError unless each of these fields is at least 0 and below 1."""
    for name in names:
        value = getattr(config, name)
        need(0 <= value < 1, f"{group}.{name} is {value}; it must be in [0, 1)")


def _or_none(config: object, name: str) -> str:
    return ", or None" if "None" in str(type(config).__annotations__[name]) else ""


def blocks_of(share: float, layers: int) -> int:
    """Return the number of blocks that a share of `layers` is: rounded down, at least one."""
    return max(1, int(share * layers + 1e-9))  # 0.29 * 100 is a little below 29
