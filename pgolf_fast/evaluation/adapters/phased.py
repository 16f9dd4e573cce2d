"""AdamW on the model's own parameters along the stream, and low-rank changes of each document on top."""

from __future__ import annotations

from torch import Tensor

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.adapters.base import Adapter, Scored
from pgolf_fast.evaluation.adapters.descent import AdamW
from pgolf_fast.evaluation.adapters.lora import Lora
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import fake_int6


class Phased(Adapter):
    """`Lora` learns from segments of documents, `AdamW` from chunks of the stream."""

    def __init__(
        self, model: GPT, config: TTTConfig, seq_len: int, grid: Transform = fake_int6, **options: bool
    ):
        """Take the arguments of `Descent`, which the one of the stream is made with."""
        self._stream = AdamW(model, config, seq_len, grid, **options)
        self._documents = Lora(model, config, seq_len, banks=self._stream.banks)
        self._parts: dict[str, Adapter] = {"stream": self._stream, "documents": self._documents}
        self.trainable = sum(part.trainable for part in self._parts.values())

    def begin(self, documents: int) -> None:
        self._documents.begin(documents)

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        return self._documents.score(tokens, targets, context, rows)

    def adapt(self, scored: Scored) -> None:
        (self._documents if scored.by_document else self._stream).adapt(scored)
        self.updates = self._stream.updates + self._documents.updates

    def state(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": tensor
            for kind, part in self._parts.items()
            for name, tensor in part.state().items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for kind, part in self._parts.items():
            own = [name for name in state if name.startswith(f"{kind}.")]
            part.load_state({name.removeprefix(f"{kind}."): state[name] for name in own})
        self.updates = self._stream.updates + self._documents.updates
