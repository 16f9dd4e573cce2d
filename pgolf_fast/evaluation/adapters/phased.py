"""The adapters by the names that a configuration has for them."""

from __future__ import annotations

from torch import Tensor

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.adapt import SGD, AdamW, Adapter, Descent, Scored
from pgolf_fast.evaluation.error_guided import ErrorGuided
from pgolf_fast.evaluation.lora import Lora
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.fake import fake_int6


class Phased:
    """AdamW on the model's own parameters along the stream, and on top low-rank changes of each document.

    The `DocumentAdapter` learns from segments with the one and from chunks of the stream with the other.
    """

    def __init__(self, stream: Descent, documents: Lora):
        self._stream, self._documents = stream, documents
        self.begin, self.score = documents.begin, documents.score
        self.trainable, self.updates = stream.trainable + documents.trainable, 0

    def adapt(self, scored: Scored) -> None:
        (self._stream if scored.tokens.dim() == 1 else self._documents).adapt(scored)
        self.updates = self._stream.updates + self._documents.updates

    def state(self) -> dict[str, Tensor]:
        parts = {"stream": self._stream.state(), "documents": self._documents.state()}
        return {f"{part}.{name}": t for part, state in parts.items() for name, t in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        parts: dict[str, Adapter] = {"stream": self._stream, "documents": self._documents}
        for part, adapter in parts.items():
            names = [name for name in state if name.startswith(f"{part}.")]
            adapter.load_state({name.removeprefix(f"{part}."): state[name] for name in names})
        self.updates = self._stream.updates + self._documents.updates


def make_adapter(
    model: GPT,
    config: TTTConfig,
    seq_len: int,
    grid: Transform = fake_int6,
    *,
    compile: bool = False,
    cuda_graph: bool = False,
) -> Adapter:
    """The configured adapter of a model that is `borrowed`; arguments as of `Descent`.

    Low-rank changes run without `compile` and `cuda_graph`. An adapter that is not legal is made like any
    other: who scores with it is asked in `evaluation.ttt`.
    """
    if config.adapter in ("lora", "error_guided"):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        banks = model.banks(grid if config.quantize_forward == "banks" else None)
        guided = config.adapter == "error_guided"
        return ErrorGuided(model, config, banks) if guided else Lora(model, config, seq_len, lambda: banks)
    rule = SGD if config.adapter == "sgd" else AdamW
    stream = rule(model, config, seq_len, grid, compile=compile, cuda_graph=cuda_graph)
    return (
        Phased(stream, Lora(model, config, seq_len, stream.banks)) if config.adapter == "phased" else stream
    )
