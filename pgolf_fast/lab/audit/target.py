"""Open a run or an artifact for an audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pgolf_fast.artifact.load import load, unpack
from pgolf_fast.config.run_folder import RunFolder, Weights
from pgolf_fast.config.schema import EvalConfig, PackConfig, RunConfig, TTTConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.evaluation.adapters.base import Adapter, Frozen, borrowed
from pgolf_fast.evaluation.adapters.registry import adapting_chunks, make_adapter, protocol_of
from pgolf_fast.evaluation.protocol import Chunk, score_and_adapt, window_chunks
from pgolf_fast.evaluation.score import Stream, batch_size
from pgolf_fast.evaluation.windows import BatchSize, Windows, sliding_windows
from pgolf_fast.lab.audit import provenance
from pgolf_fast.lab.audit.watch import Method
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.loop import train

CHUNKS = 4  # of the audited stream: three to learn from and a last one, from which nothing may be learned


@dataclass(frozen=True, kw_only=True)
class AuditTarget:
    """An evaluation under audit. Every part can be replaced: model, adapter, protocol, trainer."""

    config: RunConfig
    model: GPT
    validation: np.ndarray
    """The whole validation split, (N + 1,)."""
    tokens: np.ndarray
    """Its beginning, which is scored and learned from, (n + 1,)."""
    tokenizer: Tokenizer
    table: ByteTable
    method: Method
    """Evaluation with test-time training."""
    frozen: Method
    """Evaluation without it."""
    windows: Callable[[int], Windows]
    """Sliding windows over a number of targets."""
    folder: RunFolder | None = None
    """The run folder, or None for an artifact alone."""
    artifact: Path | None = None
    train: provenance.Train = train
    requantize: provenance.Requantize = provenance.requantize
    limit_bytes: int = PackConfig.limit_bytes
    train_limit: float | None = None
    """In seconds."""
    eval_limit: float | None = None
    """In seconds."""

    def stream(self, tokens: np.ndarray) -> Stream:
        return Stream(tokens, self.table, self.model.qo_bank.device)


def settings(path: Path) -> RunConfig:
    """Return the configuration of a run folder or an artifact file. Raises PgolfError if it is neither."""
    return RunFolder(path).read_config() if path.is_dir() else unpack(path)[0]


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
    config = settings(path)
    source_config = replace(
        config.data,
        path=str(data) if data else config.data.path,
        tokenizer=str(tokenizer) if tokenizer else config.data.tokenizer,
    )
    config = replace(config, eval=evaluation or config.eval, ttt=ttt or config.ttt, data=source_config)
    source = open_source(config.data, config.model.vocab_size)
    validation = source.validation(config.eval_seq_len)
    count = min(tokens or 8 * config.eval_seq_len, len(validation) - 1)
    config = replace(config, ttt=_in_chunks(config.ttt, count))
    weights: Weights = "float" if artifact is None else "artifact"
    loaded = load(artifact or path, weights, config=config, tokenizer=source.tokenizer)
    model, config, grid = loaded.model, loaded.config, loaded.grid
    windows = sliding(config)
    return AuditTarget(
        config=config,
        model=model,
        validation=validation,
        tokens=validation[: count + 1].astype(np.int64),
        tokenizer=source.tokenizer,
        table=source.table,
        method=learning(model, config, windows, grid),
        frozen=frozen(model, config, windows),
        windows=windows,
        folder=folder,
        artifact=artifact,
    )


def _in_chunks(ttt: TTTConfig, count: int) -> TTTConfig:
    """Shrink chunks, segments and windows so that a stream of `count` targets has CHUNKS chunks."""
    chunk_tokens = min(ttt.chunk_tokens, -(-count // CHUNKS))
    lora = replace(ttt.lora, segment_tokens=min(ttt.lora.segment_tokens, chunk_tokens // 2))
    guided = replace(ttt.guided, window_tokens=min(ttt.guided.window_tokens, chunk_tokens))
    return replace(ttt, chunk_tokens=chunk_tokens, lora=lora, guided=guided)


def sliding(config: RunConfig) -> Callable[[int], Windows]:
    """Return a function from a number of targets to the sliding windows of a configuration."""
    length, stride, repeat = config.eval_seq_len, config.eval.stride, config.eval.repeat_tail
    return lambda count: sliding_windows(count, length, stride, repeat_tail=repeat)


def learning(model: GPT, config: RunConfig, windows: Callable[[int], Windows], grid: Transform) -> Method:
    """Return sliding windows with the configured adapter, as `Evaluator.adapted` combines them."""

    @contextmanager
    def adapter() -> Iterator[Adapter]:
        with borrowed(model):
            yield make_adapter(model, config.ttt, config.eval_seq_len, grid)

    def plan(stream: Stream) -> tuple[Windows, Sequence[Chunk]]:
        return adapting_chunks(windows(stream.num_targets), stream, config.ttt)

    return Method(plan, adapter, protocol_of(config.ttt), config.eval_seq_len, _size(model, config))


def frozen(model: GPT, config: RunConfig, windows: Callable[[int], Windows]) -> Method:
    """Return sliding windows with a frozen model."""
    size = _size(model, config)

    def plan(stream: Stream) -> tuple[Windows, Sequence[Chunk]]:
        cut = windows(stream.num_targets)
        return cut, window_chunks(cut, size)

    return Method(plan, lambda: nullcontext(Frozen(model)), score_and_adapt, config.eval_seq_len, size)


def _size(model: GPT, config: RunConfig) -> BatchSize:
    device = model.qo_bank.device
    return batch_size(config.eval.batch_seqs, config.model, model.compute_dtype, device)
