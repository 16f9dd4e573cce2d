"""What evaluation needs to know of other processes: which one this is, and sums over all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """This process among those that share an evaluation; `train.world.World` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum_(self, values: Tensor) -> Tensor:
        """Replace numbers by their sums over ranks."""

    def same(self, value: float) -> float:
        """The first rank's value of a number."""


@dataclass(frozen=True)
class _Alone:
    rank: int = 0
    world_size: int = 1

    def sum_(self, values: Tensor) -> Tensor:
        return values

    def same(self, value: float) -> float:
        return value


ALONE = _Alone()
