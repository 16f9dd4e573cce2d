"""No adaptation."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.compiled import compiled
from pgolf_fast.model.gpt import GPT


class Frozen(Adapter):
    """The model with its current weights."""

    def __init__(self, model: GPT, transform: Transform = None, *, compile: bool = False):
        """Read the banks through `transform`; `compile` is for batches of several windows."""
        with torch.no_grad():
            self._banks = model.banks(transform)
        self._eager = model.token_losses
        # batches of several windows have one shape; single windows, at the end of the stream, have many
        self._batched = compiled(model.token_losses) if compile else model.token_losses

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        losses = self._batched if len(tokens) > 1 else self._eager
        with torch.no_grad():
            return losses(tokens, targets, self._banks, context=context)

    def adapt(self, scored: Scored) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass
