"""Passes of one model over one stream, frozen or adapting, with the settings of one configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.distributed import SINGLE, World
from pgolf_fast.evaluation.adapters.base import Adapter, borrowed
from pgolf_fast.evaluation.adapters.frozen import Frozen
from pgolf_fast.evaluation.adapters.registry import (
    adapting_chunks,
    make_adapter,
    need_legal,
    protocol_of,
)
from pgolf_fast.evaluation.protocol import score_and_adapt, window_chunks
from pgolf_fast.evaluation.resume import SavedState
from pgolf_fast.evaluation.score import Score, Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import BatchSize, Windows, plain_windows, sliding_windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import make_fake


@dataclass(frozen=True)
class Pass:
    """Result of one pass over windows."""

    by_chunk: list[Score]
    """The running score after each chunk."""
    scorer: Scorer
    """Holds the losses themselves."""
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
        config = self.config
        return sliding_windows(
            self.stream.num_targets,
            config.eval_seq_len,
            config.eval.stride,
            repeat_tail=config.eval.repeat_tail,
        )

    @cached_property
    def size(self) -> BatchSize:
        """Windows per batch."""
        model, batch = self.model, self.config.eval.batch_seqs
        device = model.qo_bank.device
        return batch_size(batch, model.config, model.compute_dtype, device, self.world)

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
        quant, cuda = self.config.quant, self.model.qo_bank.device.type == "cuda"
        with borrowed(self.model):
            yield make_adapter(
                self.model,
                ttt,
                self.config.eval_seq_len,
                self.grid or make_fake(quant.bits, quant.scale_floor),
                compile=self._compile,
                cuda_graph=cuda and self.config.eval.cuda_graph is not False,
            )

    def frozen(self, windows: Windows, what: str, saved: SavedState | None = None) -> Pass:
        """Score every window with the weights as they are. Progress is shown as `what`."""
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
        before_restore: Callable[[], object] | None = None,
    ) -> Pass:
        """Score every window, adapting on each chunk after it is scored and never after the last.

        Adapters that break this rule (`TTTConfig.illegal`) raise PgolfError unless `allow_illegal`.
        `before_restore` is called while the model still has the adapted weights.
        """
        need_legal(ttt, allow_illegal)
        windows, chunks = adapting_chunks(windows, self.stream, ttt)
        scorer = self.scorer(windows, self.adapting_size(ttt))
        with self.adapter(ttt) as adapter:
            by_chunk = protocol_of(ttt)(adapter, scorer, chunks, what, saved)
            if before_restore is not None:
                before_restore()
        return Pass(by_chunk, scorer, adapter.trainable, adapter.updates)
