"""The table of adapters, the chunks that each learns from, and the protocol that runs it."""

from collections.abc import Callable
from functools import partial

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Adapter
from pgolf_fast.evaluation.adapters.descent import SGD, AdamW
from pgolf_fast.evaluation.adapters.error_guided import ErrorGuided, learn_and_score
from pgolf_fast.evaluation.adapters.lora import Lora, Phased
from pgolf_fast.evaluation.documents import document_chunks, document_starts
from pgolf_fast.evaluation.protocol import Chunk, ProtocolFunction, score_and_adapt, target_chunks
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.windows import Windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import fake_int6

KINDS: dict[str, Callable[..., Adapter]] = {"sgd": SGD, "adamw": AdamW, "lora": Lora, "phased": Phased}
KINDS["error_guided"] = ErrorGuided


def make_adapter(
    model: GPT, config: TTTConfig, seq_len: int, grid: Transform = fake_int6, **options: bool
) -> Adapter:
    """Return the configured adapter of a `borrowed` model; arguments are those of `Descent`."""
    return KINDS[config.adapter](model, config, seq_len, grid, **options)


def adapting_chunks(windows: Windows, stream: Stream, config: TTTConfig) -> tuple[Windows, list[Chunk]]:
    """Return the windows in the order in which the configured adapter has them scored, and its chunks."""
    if config.adapter == "error_guided":
        return windows, [Chunk(0, len(windows), (0,), stream.num_targets)]
    if config.by_document:
        return document_chunks(windows, document_starts(stream.tokens.cpu().numpy()), config)
    return windows, target_chunks(windows, stream.num_targets, config.chunk_tokens)


def protocol_of(config: TTTConfig) -> ProtocolFunction:
    """Return the function that scores with the configured adapter, called as `score_and_adapt`."""
    return partial(learn_and_score, config.guided) if config.adapter == "error_guided" else score_and_adapt


def need_legal(config: TTTConfig, allow_illegal: bool) -> None:
    """Raise PgolfError if these settings break the rules, unless `allow_illegal`."""
    if config.illegal is not None and not allow_illegal:
        raise PgolfError(
            f"ttt.adapter {config.adapter} breaks the rules: {config.illegal}. "
            "Give --allow-illegal to score with it, for study only, or set another ttt.adapter"
        )
