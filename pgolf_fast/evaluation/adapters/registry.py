"""The table of adapters: how each is made, what it is given in which order, and which protocol runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Adapter
from pgolf_fast.evaluation.adapters.descent import SGD, AdamW
from pgolf_fast.evaluation.adapters.error_guided import ErrorGuided, learn_and_score
from pgolf_fast.evaluation.adapters.lora import Lora
from pgolf_fast.evaluation.adapters.phased import Phased
from pgolf_fast.evaluation.documents import document_chunks, document_starts
from pgolf_fast.evaluation.protocol import Chunk, ProtocolFunction, score_and_adapt, target_chunks
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import fake_int6

# Windows in the order in which they are scored, and chunks of them
Plan = tuple[Windows, list[Chunk]]


def _by_chunk(windows: Windows, stream: Stream, config: TTTConfig) -> Plan:
    return windows, target_chunks(windows, stream.num_targets, config.chunk_tokens)


def _by_document(windows: Windows, stream: Stream, config: TTTConfig) -> Plan:
    return document_chunks(windows, document_starts(stream.tokens.cpu().numpy()), config)


def _at_once(windows: Windows, stream: Stream, config: TTTConfig) -> Plan:
    return windows, [Chunk(0, len(windows), (0,), stream.num_targets)]


@dataclass(frozen=True)
class Kind:
    """One kind of adapter."""

    make: Callable[..., Adapter]
    """Called as `make_adapter`."""
    plan: Callable[[Windows, Stream, TTTConfig], Plan]
    protocol: Callable[[TTTConfig], ProtocolFunction] = lambda config: score_and_adapt


KINDS = {
    "sgd": Kind(SGD, _by_chunk),
    "adamw": Kind(AdamW, _by_chunk),
    "lora": Kind(Lora, _by_document),
    "phased": Kind(Phased, _by_document),
    "error_guided": Kind(ErrorGuided, _at_once, lambda config: partial(learn_and_score, config.guided)),
}


def make_adapter(
    model: GPT, config: TTTConfig, seq_len: int, grid: Transform = fake_int6, **options: bool
) -> Adapter:
    """Return the configured adapter of a `borrowed` model; arguments are those of `Descent`.

    Low-rank changes ignore the options. Adapters that break the rules are made like any other:
    `need_legal` guards their use.
    """
    return KINDS[config.adapter].make(model, config, seq_len, grid, **options)


def adapting_chunks(windows: Windows, stream: Stream, config: TTTConfig) -> Plan:
    """Return the windows in the order in which the configured adapter has them scored, and its chunks."""
    return KINDS[config.adapter].plan(windows, stream, config)


def protocol_of(config: TTTConfig) -> ProtocolFunction:
    """Return the function that scores with the configured adapter, called as `score_and_adapt`."""
    return KINDS[config.adapter].protocol(config)


def need_legal(config: TTTConfig, allow_illegal: bool) -> None:
    """Raise PgolfError if these settings break the rules, unless `allow_illegal`."""
    if config.illegal is not None and not allow_illegal:
        raise PgolfError(
            f"ttt.adapter {config.adapter} breaks the rules: {config.illegal}. "
            "Give --allow-illegal to score with it, for study only, or set another ttt.adapter"
        )
