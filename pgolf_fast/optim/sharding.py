"""Work over bank slots, split between ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sharding:
    """Which slots this process orthogonalises; the default is all of them.

    Only that work is divided: gradients are averaged whole, and every rank keeps all optimiser state.
    """

    rank: int = 0
    world_size: int = 1

    def map_slots(self, stack: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of a (slots, rows, cols) stack, each rank computing its share, gathered on all."""
        if self.world_size == 1:
            return function(stack)
        share = -(-stack.shape[0] // self.world_size)
        padded = stack.new_zeros(share * self.world_size, *stack.shape[1:])
        mine = function(stack[self.rank * share : (self.rank + 1) * share].contiguous())
        part = stack.new_zeros(share, *stack.shape[1:])
        part[: mine.shape[0]] = mine
        dist.all_gather(list(padded.split(share)), part)
        return padded[: stack.shape[0]]


def mean_gradients(gradients: list[Tensor], world_size: int) -> None:
    """Replace every gradient by its mean over ranks."""
    if world_size == 1:
        return
    for gradient in gradients:
        dist.all_reduce(gradient)
        gradient.div_(world_size)
