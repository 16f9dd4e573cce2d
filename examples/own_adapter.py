"""Write a test-time-training adapter of your own, and audit it: python examples/own_adapter.py RUN [--leak]

The adapter mixes the model's distribution with the frequencies of the tokens scored so far. With --leak it
counts the targets while it scores them, which breaks the rules; the audit says so.
"""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from pgolf_fast.console import Table
from pgolf_fast.evaluation.adapters.base import Adapter, Frozen
from pgolf_fast.lab.audit.check import run_checks
from pgolf_fast.lab.audit.rules import checks
from pgolf_fast.lab.audit.target import open_target

CHECKS = ("C1", "C2", "C3", "C4", "C5", "C7", "C15", "C16")  # the others concern the artifact and training
SHARE = 0.05  # of the frequencies in the mixture


class Frequencies(Adapter):
    def __init__(self, model, leak):
        self.frozen, self.leak = Frozen(model), leak
        self.counts = torch.ones(model.config.vocab_size, device=model.qo_bank.device)

    def score(self, tokens, targets, context, rows=None):
        """Return the losses (B, W) in nats of the targets, the last W positions of tokens (B, T)."""
        if self.leak:
            self.count(targets)
        frequencies = (self.counts / self.counts.sum())[targets]
        probabilities = torch.exp(-self.frozen.score(tokens, targets, context))
        return -torch.log((1 - SHARE) * probabilities + SHARE * frequencies)

    def adapt(self, scored):
        """Learn from a chunk whose targets all have their final score."""
        self.count(scored.tokens[:, 1:])  # (rows, n + 1): the first column is context only

    def count(self, ids):
        self.counts += torch.bincount(ids.flatten(), minlength=len(self.counts))

    def state(self):
        return {"counts": self.counts}

    def load_state(self, state):
        self.counts.copy_(state["counts"])


if __name__ == "__main__":
    subject = open_target(Path(sys.argv[1]))
    model, leak = subject.model, "--leak" in sys.argv
    method = replace(subject.method, adapter=lambda: nullcontext(Frequencies(model, leak)))
    selected = [check for check in checks(replace(subject, method=method)) if check.id in CHECKS]
    rows = [(result.id, result.title, result.verdict, result.evidence) for result in run_checks(selected)]
    print(Table(("check", "property", "verdict", "evidence"), rows))
