"""The three scores that are always reported together, because each alone has been misleading (PR 1501)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from pgolf_fast import console
from pgolf_fast.config.run_folder import SCORES
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.console import Table, number
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.adapters.base import Adapter, Frozen, borrowed
from pgolf_fast.evaluation.adapters.registry import adapting_chunks, make_adapter, need_legal, protocol_of
from pgolf_fast.evaluation.protocol import score_and_adapt, window_chunks
from pgolf_fast.evaluation.resume import Resume, SavedState
from pgolf_fast.evaluation.score import Score, Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import BatchSize, Windows, plain_windows, sliding_windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import make_fake


@dataclass(frozen=True)
class Pass:
    """Result of one pass over windows."""

    by_chunk: list[Score]  # the running score after each chunk
    scorer: Scorer  # holds the losses themselves
    trainable: int = 0
    updates: int = 0

    @property
    def score(self) -> Score:
        return self.by_chunk[-1]


@dataclass(frozen=True)
class Evaluator:
    """Scores `model` on `stream`; its weights are unchanged after each pass.

    Test-time training with a quantized forward rounds the banks to `grid`: give the artifact's own, so that
    without an update the adapted score equals the frozen one. None is the grid of `config.quant`.
    """

    model: GPT
    stream: Stream
    config: RunConfig
    grid: Transform = None
    world: World = SINGLE

    def plain_windows(self) -> Windows:
        return plain_windows(self.stream.num_targets, self.config.eval_seq_len)

    def sliding_windows(self) -> Windows:
        count, length, options = self.stream.num_targets, self.config.eval_seq_len, self.config.eval
        return sliding_windows(count, length, options.stride, repeat_tail=options.repeat_tail)

    @cached_property
    def size(self) -> BatchSize:
        """Windows per batch."""
        model, batch = self.model, self.config.eval.batch_seqs
        return batch_size(batch, model.config, model.compute_dtype, model.qo_bank.device, self.world)

    def adapting_size(self, ttt: TTTConfig) -> BatchSize:
        """Return windows per batch so that eight ranks share a chunk, if each batch gets four or more."""
        if self.config.eval.batch_seqs is not None:
            return self.size
        lora = ttt.lora
        tokens = lora.segment_tokens * lora.documents if ttt.by_document else ttt.chunk_tokens
        return lambda length: min(self.size(length), max(4, tokens // self.config.eval.stride // 8))

    def scorer(self, windows: Windows, size: BatchSize | None = None) -> Scorer:
        return Scorer(self.stream, windows, self.config.eval_seq_len, size or self.size, self.world)

    @property
    def _compile(self) -> bool:
        cuda, wanted = self.model.qo_bank.device.type == "cuda", self.config.eval.compile
        return cuda if wanted is None else wanted

    def frozen_adapter(self) -> Frozen:
        return Frozen(self.model, compile=self._compile)

    @contextmanager
    def adapter(self, ttt: TTTConfig) -> Iterator[Adapter]:
        """Yield the configured adapter; the model is restored on exit."""
        config, cuda = self.config, self.model.qo_bank.device.type == "cuda"
        grid = self.grid or make_fake(config.quant.bits, config.quant.scale_floor)
        graph, seq_len = cuda and config.eval.cuda_graph is not False, config.eval_seq_len
        with self.model.unpacked(), borrowed(self.model):
            yield make_adapter(self.model, ttt, seq_len, grid, compile=self._compile, cuda_graph=graph)

    def frozen(self, windows: Windows, what: str, saved: SavedState | None = None) -> Pass:
        """Score every window with the weights as they are. `what` labels the progress display."""
        scorer, chunks = self.scorer(windows), window_chunks(windows, self.size)
        return Pass(score_and_adapt(self.frozen_adapter(), scorer, chunks, what, saved), scorer)

    def adapted(
        self,
        windows: Windows,
        ttt: TTTConfig,
        what: str,
        saved: SavedState | None = None,
        *,
        allow_illegal: bool = False,
    ) -> Pass:
        """Score every window, adapting on each chunk after it is scored and never after the last.

        Adapters that break this rule (`TTTConfig.illegal`) raise PgolfError unless `allow_illegal`.
        """
        need_legal(ttt, allow_illegal)
        windows, chunks = adapting_chunks(windows, self.stream, ttt)
        scorer = self.scorer(windows, self.adapting_size(ttt))
        with self.adapter(ttt) as adapter:
            by_chunk = protocol_of(ttt)(adapter, scorer, chunks, what, saved)
        return Pass(by_chunk, scorer, adapter.trainable, adapter.updates)


PLAIN, SLIDING, TTT = SCORES.values()


@dataclass(frozen=True)
class ThreeScores:
    """Non-overlapping windows; sliding windows; sliding windows with test-time training."""

    plain: Score
    sliding: Score
    ttt: Pass
    seconds: dict[str, float]
    scorers: dict[str, Scorer]  # hold each score's losses, by the names in `to_dict`
    illegal: str | None = None  # why the third breaks the rules, if it was allowed to

    def table(self, title: str = "windows") -> Table:
        """Return `score_table` of these scores, with seconds; `title` heads the first column."""
        return score_table(self.to_dict(), self.seconds, title)

    def __str__(self) -> str:
        return self.table("score").text()

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON, the same ones when the same is scored again."""
        return {
            "non_overlapping": self.plain.to_dict(),
            "sliding": self.sliding.to_dict(),
            "sliding_ttt": self.ttt.score.to_dict(),
            "illegal": self.illegal,
            "ttt_updates": self.ttt.updates,
            "ttt_trainable_parameters": self.ttt.trainable,
            "ttt_bpb_by_chunk": [score.to_dict()["bpb"] for score in self.ttt.by_chunk],
        }


def labeled(name: str, illegal: object) -> str:
    """Return a score's or adapter's name for a table; appends (ILLEGAL) if it breaks the rules."""
    return f"{name} (ILLEGAL)" if illegal else name


def plain_score(
    model: GPT, stream: Stream, config: RunConfig, world: World = SINGLE, what: str = PLAIN
) -> Score:
    """Return the score of non-overlapping windows, by all ranks together, with progress shown as `what`."""
    evaluator = Evaluator(model, stream, config, world=world)
    scorer = evaluator.scorer(evaluator.plain_windows())
    scorer.what = what
    return scorer.score(Frozen(model).score, 0, len(scorer.windows))


def three_scores(
    model: GPT,
    stream: Stream,
    config: RunConfig,
    grid: Transform = None,
    *,
    world: World = SINGLE,
    resume: Resume | None = None,
    allow_illegal: bool = False,
) -> ThreeScores:
    """Return all three scores of a model, whose weights are unchanged afterward; `grid` as in `Evaluator`.

    Raises PgolfError, before anything is scored, for test-time training that breaks the rules, unless
    `allow_illegal`. With `resume`, resumes from the states saved there.
    """
    need_legal(config.ttt, allow_illegal)
    evaluator = Evaluator(model, stream, config, grid, world)
    plain, sliding = evaluator.plain_windows(), evaluator.sliding_windows()
    runs: dict[str, Callable[..., Pass]] = {
        PLAIN: partial(evaluator.frozen, plain, PLAIN),
        SLIDING: partial(evaluator.frozen, sliding, SLIDING),
        TTT: partial(evaluator.adapted, sliding, config.ttt, TTT, allow_illegal=allow_illegal),
    }
    passes, seconds = dict[str, Pass](), dict[str, float]()
    for name, run in runs.items():
        count = len(plain if name == PLAIN else sliding)
        console.logger.info("%s: scoring %d windows on %s", name, count, world.device)
        start = time.perf_counter()
        saved = None if resume is None else resume.of(name.replace(" + ", "_"))
        passes[name] = run(saved=saved)
        seconds[name] = time.perf_counter() - start + (0.0 if saved is None else saved.spent)
        console.logger.info("%s: done in %s", name, console.duration(seconds[name]))
    scorers = {key: passes[name].scorer for key, name in SCORES.items()}
    plain_pass, sliding_pass, ttt = passes.values()
    return ThreeScores(plain_pass.score, sliding_pass.score, ttt, seconds, scorers, config.ttt.illegal)


def score_table(scores: dict, seconds: dict[str, float] | None = None, title: str = "windows") -> Table:
    """Tabulate the scores of a scores file or of `ThreeScores.to_dict`: bits per byte and nats per token.

    The last column is `seconds`, by name, or the number of targets. A missing or non-finite score has no row.
    """
    rows = []
    for key, name in SCORES.items():
        score = scores.get(key) or {}
        bpb, loss = (number(score.get(unit), ".6f") for unit in ("bpb", "loss"))
        if "-" not in (bpb, loss):
            last = f"{score['tokens']:,}" if seconds is None else f"{seconds[name]:.1f}"
            rows.append((labeled(name, key == "sliding_ttt" and scores.get("illegal")), bpb, loss, last))
    return Table((title, "bpb", "nats/token", "targets" if seconds is None else "seconds"), rows)
