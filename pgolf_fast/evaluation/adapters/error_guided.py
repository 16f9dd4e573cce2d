"""Error-guided test-time training (PR 296): train on the hardest windows, then score. It breaks the rules.

A first pass finds the windows of the highest loss, low-rank changes of the last MLPs are trained on these,
and a second pass scores all windows. So tokens are learned from before they are scored, against condition 3
of the challenge's issue 1017. For measurement only; never submit it: `pgolf eval` requires --allow-illegal,
and `pgolf audit` fails it. Unlike every other adapter it bypasses the ledger of `evaluation.protocol`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import ops
from pgolf_fast.config.ttt import GuidedConfig, TTTConfig
from pgolf_fast.evaluation.adapters.base import Adapter, Learner, Scored, Tensors, freeze
from pgolf_fast.evaluation.adapters.lora import fresh_factors, matrices
from pgolf_fast.evaluation.protocol import Chunks, Saved, score_and_adapt
from pgolf_fast.evaluation.score import Score, Scorer
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.model.bank import Transform
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.plan import Visit
from pgolf_fast.ops import reference
from pgolf_fast.quant.grid import fake_int6


class ErrorGuided(Learner):
    """Low-rank changes of the last blocks' MLP matrices, as in `lora` but for all text, trained by Adam.

    Every call of `adapt` is one step on one window.
    """

    def __init__(
        self, model: GPT, config: TTTConfig, seq_len: int, grid: Transform = fake_int6, **unused: bool
    ):
        """Round banks to `grid` if `config.quantize_forward` says so; `unused` is for other adapters."""
        freeze(model)
        self.model, self.config = model, config
        self._banks = banks = model.banks(grid if config.quantize_forward == "banks" else None)
        c, layers = model.config, config.guided.blocks(model.config.num_layers)
        self._first = c.num_layers - layers
        sizes = {name: (layers, *matrices(c)[name][1:]) for name in ("up", "down")}
        pairs = fresh_factors(sizes, config.guided.rank, 1, banks.up.device).values()
        self._factors = [factor[0].requires_grad_() for pair in pairs for factor in pair]
        self._adam = torch.optim.Adam(self._factors, lr=config.guided.lr, fused=True)
        self.trainable = sum(f.numel() for f in self._factors)

    def score(self, tokens: Tensor, targets: Tensor, context: int, rows: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self.model.token_losses(tokens, targets, self._banks, context=context, mlp=self._mlp)

    def adapt(self, scored: Scored) -> None:
        x, y = scored.tokens[:, :-1], scored.tokens[:, 1:]
        self.model.token_losses(x, y, self._banks, mlp=self._mlp).mean().backward()
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self._factors, self.config.grad_clip)
        self._adam.step()
        self._adam.zero_grad()
        self.updates += 1

    def _mlp(self, visit: Visit, x: Tensor) -> Tensor:
        banks, kind, layer = self._banks, self.model.config.mlp_activation, visit.layer
        if layer < self._first:
            return ops.mlp(x, banks.up, banks.down, layer, kind)
        a_up, b_up, a_down, b_down = (factor[layer - self._first].to(x.dtype) for factor in self._factors)
        hidden = reference.activation(F.linear(x, banks.up[layer]) + x @ a_up.T @ b_up.T, kind)
        return F.linear(hidden, banks.down[layer]) + hidden @ a_down.T @ b_down.T

    def _lists(self) -> dict[str, Tensors]:
        return {"factor": self._factors}


def learn_and_score(
    config: GuidedConfig, adapter: Adapter, scorer: Scorer, chunks: Chunks, what: str, saved: Saved = None
) -> list[Score]:
    """Run both passes in place of `protocol.score_and_adapt`. Every rank runs the first pass by itself.

    `chunks` must be a single one, after which nothing is learned. `saved` covers the second pass.
    """
    stream = scorer.stream
    windows = plain_windows(stream.num_targets, config.window_tokens)
    first = Scorer(stream, windows, config.window_tokens, scorer.size)
    first.score(adapter.score, 0, len(windows))
    nats = np.add.reduceat(first.losses.double().cpu().numpy(), first.places[:-1])
    hardest = np.argsort(-nats / np.diff(first.places), kind="stable")[: config.hard_windows(len(windows))]
    for _ in range(config.epochs):
        for number, window in enumerate(hardest):
            tokens = stream.tokens[None, windows.start[window] : windows.end[window] + 1].clone()
            # breaks the promise of `Scored`: these targets have no score yet
            adapter.adapt(Scored(tokens, number, len(hardest)))
    return score_and_adapt(adapter, scorer, chunks, what, saved)
