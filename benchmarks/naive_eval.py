"""The baseline of fast scoring: sliding windows in batches, computing every position of every layer.

Nothing is skipped or shared between windows, and test-time training is PyTorch's own SGD.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.adapters.descent import chunk_lr
from pgolf_fast.evaluation.protocol import Chunk
from pgolf_fast.evaluation.windows import Windows

# (tokens, targets), both (B, T) -> losses (B, T)
Losses = Callable[[Tensor, Tensor], Tensor]


def score(losses_of: Losses, tokens: Tensor, windows: Windows, seq_len: int, batch: int) -> Tensor:
    """Return the loss of every scored target, in the order of the windows."""
    offsets = torch.arange(seq_len, device=tokens.device)
    found = []
    for at in range(0, len(windows), batch):
        part = windows[at : at + batch]
        edges = (part.start, part.end, part.first)
        start, end, first = (torch.from_numpy(t).to(tokens.device)[:, None] for t in edges)
        index = start + offsets
        inside = index < end
        index = torch.where(inside, index, 0)
        with torch.no_grad():
            losses = losses_of(tokens[index], tokens[index + 1])
        found.append(losses[inside & (index >= first)])
    return torch.cat(found)


class SGD:
    """Test-time training of some parameters, written without regard to speed."""

    def __init__(
        self, mean_loss: Losses, parameters: Sequence[nn.Parameter], config: TTTConfig, seq_len: int
    ):
        self.mean_loss, self.parameters, self.config, self.seq_len = mean_loss, parameters, config, seq_len
        self.sgd = torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum)

    def adapt(self, tokens: Tensor, chunk: int, chunks: int) -> None:
        """Update on a chunk's tokens (n + 1,)."""
        for group in self.sgd.param_groups:
            group["lr"] = chunk_lr(self.config, chunk, chunks)
        sequences = (len(tokens) - 1) // self.seq_len
        x, y = (tokens[i : i + sequences * self.seq_len].view(sequences, -1) for i in (0, 1))
        for _ in range(self.config.epochs):
            for first in range(0, sequences, self.config.batch_seqs):
                rows = slice(first, first + self.config.batch_seqs)
                self.mean_loss(x[rows], y[rows]).backward()
                nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
                self.sgd.step()
                self.sgd.zero_grad()


def score_and_adapt(
    losses_of: Losses,
    learner: SGD,
    tokens: Tensor,
    windows: Windows,
    chunks: Sequence[Chunk],
    seq_len: int,
    batch: int,
) -> Tensor:
    """Return the losses of `score`, updating after each chunk but the last."""
    found = []
    for number, chunk in enumerate(chunks):
        found.append(score(losses_of, tokens, windows[chunk.low : chunk.high], seq_len, batch))
        if number < len(chunks) - 1:
            start = chunk.starts[0]
            learner.adapt(tokens[start : start + chunk.length + 1], number, len(chunks))
    return torch.cat(found)
