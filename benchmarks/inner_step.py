"""Measure how much of a meta step's inner step survives rounding to the compute dtype.

    python benchmarks/inner_step.py RUN [RUN ...]

The stepped banks W - inner_lr * g are cast to the compute dtype before the outer half reads them, here as in
the original programs. Prints, for the trained weights of each run on its training data: the length of the
exact step and of the rounded one (over all banks), the cosine between them, the change of the inner half's
loss by its own step, and the cosine between the outer half's gradients with the step and without. If the
last is 1, the meta step is an ordinary step on the outer half.
"""

import argparse
import contextlib
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.load import load
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import MetaConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import make_banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.meta import Batch, bank_gradients, halves, inner_gradients

BATCHES = 4
DTYPES = (torch.bfloat16, torch.float32)
HEADER = ("run", "dtype", "exact step", "rounded step", "cosine", "inner loss", "change", "outer gradients")


@dataclass(frozen=True)
class InnerStep:
    """Medians over batches; lengths are over all banks, losses in nats per token."""

    dtype: str
    exact: float
    rounded: float
    cosine: float
    before: float
    after: float
    outer: float

    def row(self) -> tuple[str, ...]:
        lengths = (f"{self.exact:.2e}", f"{self.rounded:.2e}", f"{self.cosine:.3f}")
        change = f"{self.after - self.before:+.6f}"
        return self.dtype, *lengths, f"{self.before:.5f}", change, f"{self.outer:.5f}"


def measure(path: Path, dtype: torch.dtype) -> InnerStep:
    """Measure a run's final float weights on the first batches of its data."""
    folder = RunFolder(path)
    config = folder.read_config()
    model = load(folder, "float", config=config).model
    source = open_source(config.data, config.model.vocab_size)
    model.compute_dtype = dtype
    with contextlib.closing(make_loader(source.train_shards(), config)) as loader:
        rows = [one(model, loader.next_batch(), config.train.meta or MetaConfig()) for _ in range(BATCHES)]
    medians = map(statistics.median, zip(*rows, strict=True))
    return InnerStep(str(dtype).removeprefix("torch."), *medians)


def one(model: GPT, batch: Batch, meta: MetaConfig) -> tuple[float, ...]:
    """Return the numbers of `InnerStep` for one batch (B, T)."""
    inner, outer = halves(*batch, across_batch=meta.method != "fomaml")
    exact = [-meta.inner_lr * gradient for gradient in inner_gradients(model, inner, meta)]
    masters = [master.detach() for master in model.bank_parameters()]
    plain = [master.to(model.compute_dtype) for master in masters]
    stepped = [(m + step).to(model.compute_dtype) for m, step in zip(masters, exact, strict=True)]
    rounded = [after.float() - before.float() for after, before in zip(stepped, plain, strict=True)]
    with torch.no_grad():
        losses = [float(model.loss(*inner, make_banks(banks))) for banks in (plain, stepped)]
    gradients = [bank_gradients(model, outer, banks, 0) for banks in (plain, stepped)]
    return *lengths(exact, rounded), *losses, lengths(*gradients)[2]


def lengths(a: list[Tensor], b: list[Tensor]) -> tuple[float, float, float]:
    """Return the norms of two lists of tensors, each taken as one vector, and their cosine."""
    x, y = (torch.cat([part.flatten().double() for part in parts]) for parts in (a, b))
    return float(x.norm()), float(y.norm()), float(x @ y / (x.norm() * y.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    runs = parser.parse_args().runs
    try:
        rows = [(run.name, *measure(run, dtype).row()) for run in runs for dtype in DTYPES]
    except PgolfError as error:
        sys.exit(str(error))
    print(console.Table(HEADER, rows).text())


if __name__ == "__main__":
    main()
