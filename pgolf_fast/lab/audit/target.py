"""Open a run or an artifact for an audit, and compute once what several checks need."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from pgolf_fast.artifact.load import LoadedModel, load, stored_config
from pgolf_fast.config.fields import with_fields
from pgolf_fast.config.run_folder import RunFolder, Weights
from pgolf_fast.config.schema import EvalConfig, PackConfig, RunConfig, TTTConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.evaluation.adapters.base import Adapter, Frozen, borrowed
from pgolf_fast.evaluation.adapters.registry import adapting_chunks, make_adapter, protocol_of
from pgolf_fast.evaluation.protocol import Chunk, score_and_adapt, window_chunks
from pgolf_fast.evaluation.run import present_data
from pgolf_fast.evaluation.score import LossFunction, Stream, batch_size
from pgolf_fast.evaluation.windows import Windows, sliding_windows
from pgolf_fast.lab.audit import submission
from pgolf_fast.lab.audit.watch import Method, Watched, evaluate, watch
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.loop import train

LENGTHS = (2, 17, 64)  # context lengths at which causality is checked, with that of the windows
CHUNKS = 4  # of the audited stream: three for updates, and a last one that no update may use


@dataclass(frozen=True)
class AuditTarget:
    """An evaluation under audit. Every part can be replaced: model, adapter, protocol, trainer."""

    config: RunConfig
    model: GPT
    validation: np.ndarray  # the whole validation split, (N + 1,)
    tokens: np.ndarray  # its beginning, which is scored and used for updates, (n + 1,)
    tokenizer: Tokenizer
    table: ByteTable
    method: Method  # evaluation with test-time training
    frozen: Method  # evaluation without it
    windows: Callable[[int], Windows]  # sliding windows over a number of targets
    folder: RunFolder | None = None  # the run folder, or None for an artifact alone
    artifact: Path | None = None
    train: submission.Train = train
    requantize: submission.Requantize = submission.requantize
    limit_bytes: int = PackConfig.limit_bytes
    side_bytes: np.ndarray | None = None  # bytes of the targets of `validation` from side files, (N,)
    train_limit: float | None = None  # seconds
    eval_limit: float | None = None  # seconds

    def stream(self, tokens: np.ndarray) -> Stream:
        side_bytes = None if self.side_bytes is None else self.side_bytes[: len(tokens) - 1]
        return Stream(tokens, self.table, self.model.qo_bank.device, side_bytes)


class Audit:
    """A target with what several checks share: its stream, its losses, and one watched evaluation."""

    def __init__(self, target: AuditTarget):
        self.target, self.model, self.tokens = target, target.model, target.tokens
        self.seq_len, self.vocab_size = target.config.eval_seq_len, target.config.model.vocab_size
        self.by_document = target.config.ttt.by_document
        self.stream = target.stream(target.tokens)
        self.lengths = sorted({*LENGTHS, self.seq_len})

    @cached_property
    def watched(self) -> Watched:
        return watch(self.target.method, self.stream, self.model)

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Return the losses (N,) of a stream of tokens (N + 1,), with test-time training."""
        return evaluate(self.target.method, self.target.stream(tokens))

    @contextmanager
    def fresh_losses(self) -> Iterator[LossFunction]:
        """Yield the loss function of an adapter before its first update."""
        with self.target.method.adapter() as adapter:
            if not self.by_document:
                yield adapter.score
                return
            adapter.begin(1)
            row = torch.zeros((), dtype=torch.int64, device=self.stream.tokens.device)
            yield lambda x, y, context: adapter.score(x, y, context, row.repeat(len(x)))


def open_target(
    path: Path,
    *,
    tokens: int | None = None,
    evaluation: EvalConfig | None = None,
    ttt: TTTConfig | None = None,
    data: Path | None = None,
    tokenizer: Path | None = None,
) -> AuditTarget:
    """Open a run folder (its artifact, or its float weights if it is not packed) or an artifact file.

    `tokens` is the number of targets to score (default: eight windows). `evaluation`, `ttt`, `data` and
    `tokenizer` replace the settings of the run. Raises PgolfError if `path` is neither a run nor an artifact,
    or if there is no validation data.
    """
    folder = RunFolder(path) if path.is_dir() else None
    artifact = path if folder is None else folder.artifact_file if folder.artifact_file.is_file() else None
    config = stored_config(path, data)
    config = replace(config, eval=evaluation or config.eval, ttt=ttt or config.ttt)
    places = {"data.path": data, "data.tokenizer": tokenizer}
    config = with_fields(config, {name: place for name, place in places.items() if place})
    if folder is not None:
        config = replace(config, data=present_data(folder, config.data))
    source = open_source(config.data, config.model.vocab_size)
    validation = source.validation(config.eval_seq_len)
    count = min(tokens or 8 * config.eval_seq_len, len(validation) - 1)
    config = replace(config, ttt=_in_chunks(config.ttt, count))
    weights: Weights = "float" if artifact is None else "artifact"
    loaded = load(artifact or path, weights, config=config, tokenizer=source.tokenizer, finite=False)
    length, scoring = loaded.config.eval_seq_len, loaded.config.eval
    windows = partial(sliding_windows, seq_len=length, stride=scoring.stride, repeat_tail=scoring.repeat_tail)
    beginning, side_bytes = validation[: count + 1].astype(np.int64), source.side_bytes(validation)
    text = validation, beginning, source.tokenizer, source.table
    evaluations = *_methods(loaded, windows), windows
    return AuditTarget(
        loaded.config, loaded.model, *text, *evaluations, folder, artifact, side_bytes=side_bytes
    )


def _in_chunks(ttt: TTTConfig, count: int) -> TTTConfig:
    """Shrink chunks, segments and windows so that a stream of `count` targets has CHUNKS chunks."""
    chunk_tokens = min(ttt.chunk_tokens, -(-count // CHUNKS))
    lora = replace(ttt.lora, segment_tokens=min(ttt.lora.segment_tokens, chunk_tokens // 2))
    guided = replace(ttt.guided, window_tokens=min(ttt.guided.window_tokens, chunk_tokens))
    return replace(ttt, chunk_tokens=chunk_tokens, lora=lora, guided=guided)


def _methods(loaded: LoadedModel, windows: Callable[[int], Windows]) -> tuple[Method, Method]:
    """Return the evaluation with test-time training, as `Evaluator.adapted` does it, and the one without."""
    model, config, length = loaded.model, loaded.config, loaded.config.eval_seq_len
    size = batch_size(config.eval.batch_seqs, config.model, model.compute_dtype, model.qo_bank.device)

    @contextmanager
    def adapter() -> Iterator[Adapter]:
        with borrowed(model):
            yield make_adapter(model, config.ttt, length, loaded.grid)

    def adapting_plan(stream: Stream) -> tuple[Windows, Sequence[Chunk]]:
        return adapting_chunks(windows(stream.num_targets), stream, config.ttt)

    def frozen_plan(stream: Stream) -> tuple[Windows, Sequence[Chunk]]:
        cut = windows(stream.num_targets)
        return cut, window_chunks(cut, size)

    return (
        Method(adapting_plan, adapter, protocol_of(config.ttt), length, size),
        Method(frozen_plan, lambda: nullcontext(Frozen(model)), score_and_adapt, length, size),
    )
