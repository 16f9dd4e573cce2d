"""No adaptation."""

from __future__ import annotations

from torch import Tensor

from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.evaluation.score import frozen_losses
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.compiled import compiled
from pgolf_fast.model.gpt import GPT


class Frozen(Adapter):
    """The model's weights as they are."""

    def __init__(self, model: GPT, transform: Transform = None, *, compile: bool = False):
        """Read the banks through `transform`; `compile` is for batches of several windows."""
        self._eager = frozen_losses(model, transform)
        # batches of several windows all have one shape, single windows (the tail) many
        self._fast = frozen_losses(model, transform, compiled(model.token_losses)) if compile else self._eager

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        return (self._fast if len(tokens) > 1 else self._eager)(tokens, targets, context)

    def adapt(self, scored: Scored) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        pass
