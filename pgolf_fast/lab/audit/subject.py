"""What is audited, and the checks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.artifact import steps
from pgolf_fast.artifact.pack import load_model, unpack
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import EvalConfig, PackConfig, RunConfig, TTTConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.distributed import World, this_process
from pgolf_fast.evaluation.adapters.base import Adapter, borrowed
from pgolf_fast.evaluation.adapters.frozen import Frozen
from pgolf_fast.evaluation.adapters.registry import adapting_chunks, make_adapter, protocol_of
from pgolf_fast.evaluation.protocol import Chunk, score_and_adapt, window_chunks
from pgolf_fast.evaluation.score import LossFunction, Stream, batch_size
from pgolf_fast.evaluation.windows import BatchSize, Windows, plain_windows, sliding_windows
from pgolf_fast.lab.audit import causal, provenance, scoring, submission
from pgolf_fast.lab.audit.check import Check, Finding
from pgolf_fast.lab.audit.watch import Method, Watched, evaluate, watch
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.quant.state import bank_grids
from pgolf_fast.train.loop import train

CHUNKS = 4  # of the stream that is audited: three to learn from, and a last one
LENGTHS = (2, 17, 64)  # at which causality is looked at, besides the windows' own


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is audited. Every piece can be replaced: by another model, adapter, protocol or trainer."""

    config: RunConfig
    model: GPT
    validation: np.ndarray
    """The whole split, (N + 1,)."""
    tokens: np.ndarray
    """The beginning of it that is scored and learned from, (n + 1,)."""
    tokenizer: Tokenizer
    table: ByteTable
    method: Method
    """The evaluation that adapts."""
    frozen: Method
    """The one that does not."""
    windows: Callable[[int], Windows]
    """Sliding windows over so many targets."""
    folder: RunFolder | None = None
    """The run; None if there is an artifact only."""
    artifact: Path | None = None
    train: provenance.Train = train
    requantize: provenance.Requantize = provenance.requantize
    limit_bytes: int = PackConfig.limit_bytes
    train_limit: float | None = None
    """Seconds."""
    eval_limit: float | None = None
    """Seconds."""

    def stream(self, tokens: np.ndarray) -> Stream:
        return Stream(tokens, self.table, self.model.qo_bank.device)


def settings(path: Path) -> RunConfig:
    """The configuration of a run folder or an artifact file. Raises PgolfError for what is neither."""
    return RunFolder(path).read_config() if path.is_dir() else run_config_from_dict(unpack(path)[0])


def open_subject(
    path: Path,
    *,
    tokens: int | None = None,
    evaluation: EvalConfig | None = None,
    ttt: TTTConfig | None = None,
    data: Path | None = None,
    tokenizer: Path | None = None,
) -> Subject:
    """A run folder (its artifact, or its float weights if it is not packed), or an artifact file.

    `tokens` is how many targets are scored (default: eight windows); `evaluation` and `ttt` stand for the
    settings of the run, `data` and `tokenizer` for its validation shards. Raises PgolfError for what is no
    run or artifact, or has no validation data.
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
    # the whole protocol, on a short stream: as many chunks as show every rule
    chunk_tokens = min(config.ttt.chunk_tokens, -(-count // CHUNKS))
    segment = min(config.ttt.lora.segment_tokens, chunk_tokens // 2)
    lora = replace(config.ttt.lora, segment_tokens=segment)
    guided = replace(config.ttt.guided, window_tokens=min(config.ttt.guided.window_tokens, chunk_tokens))
    ttt = replace(config.ttt, chunk_tokens=chunk_tokens, lora=lora, guided=guided)
    config = replace(config, ttt=ttt)
    device = this_process().device
    choose_kernels(config.kernels, device)
    grid: Transform = None
    if artifact is not None:
        space, dtype = torch.from_numpy(source.table.has_leading_space), config.train.compute_dtype
        model, _ = load_model(artifact, space, resolve_dtype(dtype, device))
        model, grid = model.to(device), bank_grids(unpack(artifact)[1])
    else:
        assert folder is not None
        model = steps.float_model(folder, config)
        if config.ttt.quantize_forward == "banks":
            config = replace(config, ttt=replace(config.ttt, quantize_forward="none"))
    windows = sliding(config)
    return Subject(
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


def sliding(config: RunConfig) -> Callable[[int], Windows]:
    """The windows of a configuration, over so many targets."""
    length, stride, repeat = config.eval_seq_len, config.eval.stride, config.eval.repeat_tail
    return lambda count: sliding_windows(count, length, stride, repeat_tail=repeat)


def learning(model: GPT, config: RunConfig, windows: Callable[[int], Windows], grid: Transform) -> Method:
    """Sliding windows with the configured adapter, as `Evaluator.adapted` puts them together."""

    @contextmanager
    def adapter() -> Iterator[Adapter]:
        with borrowed(model):
            yield make_adapter(model, config.ttt, config.eval_seq_len, grid)

    def plan(stream: Stream) -> tuple[Windows, Sequence[Chunk]]:
        return adapting_chunks(windows(stream.num_targets), stream, config.ttt)

    return Method(plan, adapter, protocol_of(config.ttt), config.eval_seq_len, _size(model, config))


def frozen(model: GPT, config: RunConfig, windows: Callable[[int], Windows]) -> Method:
    """Sliding windows and a model as it stands."""
    size = _size(model, config)

    def plan(stream: Stream) -> tuple[Windows, Sequence[Chunk]]:
        found = windows(stream.num_targets)
        return found, window_chunks(found, size)

    return Method(plan, lambda: nullcontext(Frozen(model)), score_and_adapt, config.eval_seq_len, size)


def _size(model: GPT, config: RunConfig) -> BatchSize:
    device = model.qo_bank.device
    return batch_size(config.eval.batch_seqs, config.model, model.compute_dtype, device)


def _fresh_losses(adapter: Adapter, by_document: bool) -> LossFunction:
    """Losses as the adapter gives them before it has learned, of one document if it learns by document."""
    if not by_document:
        return adapter.score
    adapter.begin(1)

    def losses(tokens: Tensor, targets: Tensor, context: int) -> Tensor:
        rows = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        return adapter.score(tokens, targets, context, rows)

    return losses


def checks(subject: Subject) -> list[Check]:
    """C1 to C17 of a subject, in this order. What C3 to C5, C15 and C16 look at is evaluated once."""
    s, ids, seq_len = subject, subject.tokenizer.path, subject.config.eval_seq_len
    stream, vocab = s.stream(s.tokens), s.config.model.vocab_size
    tokens, lengths = stream.tokens, sorted({*LENGTHS, seq_len})

    @cache
    def seen() -> Watched:
        return watch(s.method, stream, s.model)

    def losses(tokens: np.ndarray) -> np.ndarray:
        return evaluate(s.method, s.stream(tokens))

    def scored(function: Callable[[LossFunction], Finding]) -> Callable[[], Finding]:
        """A check of losses as the adapter gives them before it has learned."""

        def run() -> Finding:
            with s.method.adapter() as adapter:
                return function(_fresh_losses(adapter, s.config.ttt.by_document))

        return run

    def once_each() -> Finding:
        count = len(s.validation) - 1
        whole = {"sliding": s.windows(count), "non-overlapping": plain_windows(count, seq_len)}
        return scoring.once_each(seen(), stream.target_bytes, whole, count)

    def shared_out() -> Finding:
        # one window at a time, so that every rank gets some of each chunk
        ways = {
            "frozen": replace(s.frozen, size=lambda _: 1),
            "adapting": replace(s.method, size=lambda _: 1),
        }
        return scoring.shared_out({name: _by_rank(way, stream) for name, way in ways.items()})

    def packed(function: Callable[[Path], Finding]) -> Callable[[], Finding]:
        if s.artifact is None:
            return lambda: Finding(None, "the run is not packed")
        return partial(function, s.artifact)

    def requantized() -> Finding:
        if s.folder is None or s.artifact is None:
            return Finding(None, "only a packed run has weights from before and after quantisation")
        return provenance.calibration_ignores_data(s.folder, s.requantize)

    def within_time() -> Finding:
        if s.folder is None:
            return Finding(None, "an artifact does not tell how long it took")
        return submission.within_time(s.folder, s.train_limit, s.eval_limit)

    runs: dict[str, Callable[[], Finding]] = {
        "no score reads its target, or later": scored(
            lambda score: causal.causality(s.model, score, tokens, lengths)
        ),
        "nor does what is learned": lambda: scoring.state_causality(
            losses,
            s.tokens,
            vocab,
            scoring.ROUNDING[s.model.compute_dtype] if s.config.ttt.by_document else 0.0,
        ),
        "scored before learned from": lambda: scoring.score_before_train(seen()),
        "last chunk not learned from": lambda: scoring.nothing_after_last_score(seen()),
        "each target scored once": once_each,
        "no target in a lookup key": scored(
            lambda score: causal.no_target_in_keys(s.model, score, tokens, lengths)
        ),
        "probabilities sum up to 1": scored(lambda score: scoring.normalised(score, tokens, vocab)),
        "training without validation data": lambda: provenance.training_ignores_validation(
            s.train, s.config, s.tokens, ids
        ),
        "calibration without data": requantized,
        "artifact and script fit": packed(lambda path: submission.within_bytes(path, s.limit_bytes)),
        "script needs nothing else": packed(
            lambda path: submission.self_contained(path, ids, s.tokens[: 2 * seq_len + 1])
        ),
        "within the time": within_time,
        "bytes are those of the text": lambda: scoring.byte_counts(s.validation, s.table, s.tokenizer),
        "word starts are the inputs'": lambda: causal.word_starts_of_inputs(s.model, tokens),
        "the same when scored again": lambda: scoring.deterministic(
            losses, s.tokens, seen(), s.config.train.seed
        ),
        "nothing learned while scoring": lambda: scoring.nothing_learned_while_scoring(seen()),
        "the same for any number of ranks": shared_out,
    }
    return [Check(f"C{number}", title, run) for number, (title, run) in enumerate(runs.items(), start=1)]


def _by_rank(method: Method, stream: Stream) -> Callable[[World], np.ndarray]:
    return lambda world: evaluate(method, stream, world)
