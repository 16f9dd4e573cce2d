"""What is left of a meta step's inner step once the stepped banks are rounded to the forward's dtype.

    python benchmarks/inner_step.py RUN [RUN ...]

The step that train.meta wants, W - inner_lr * g, is cast to the compute dtype before the outer half reads it,
here as in the original programs. For the trained weights of each run and batches of its training data: the
lengths of the step as wanted and as the forward sees it (over all banks), the cosine between the two, by how
much the inner half's loss falls with its own step, and the cosine between the outer half's gradients with the
step and without. Where the last is 1, the meta step is an ordinary step on the outer half.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.steps import float_model
from pgolf_fast.config.meta import MetaConfig
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import make_banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.meta.step import Batch, bank_gradients, halves, inner_gradients

BATCHES = 4
DTYPES = (torch.bfloat16, torch.float32)
HEADER = ("run", "dtype", "step wanted", "step seen", "cosine", "inner loss", "its change", "outer gradients")


@dataclass(frozen=True)
class Kept:
    """Medians over batches; lengths are over all banks, losses in nats per token."""

    dtype: str
    wanted: float
    seen: float
    cosine: float
    before: float
    after: float
    outer: float

    def row(self) -> tuple[str, ...]:
        lengths = (f"{self.wanted:.2e}", f"{self.seen:.2e}", f"{self.cosine:.3f}")
        change = f"{self.after - self.before:+.6f}"
        return self.dtype, *lengths, f"{self.before:.5f}", change, f"{self.outer:.5f}"


def kept(path: Path, dtype: torch.dtype) -> Kept:
    """Of a run's final float weights and the first batches of its data; without train.meta, as by default."""
    folder = RunFolder(path)
    config = folder.read_config()
    model, source = float_model(folder, config), open_source(config.data, config.model.vocab_size)
    model.compute_dtype = dtype
    with make_loader(source.train_shards(), config) as loader:
        found = [one(model, loader.next_batch(), config.train.meta or MetaConfig()) for _ in range(BATCHES)]
    return Kept(
        str(dtype).removeprefix("torch."),
        *(statistics.median(column) for column in zip(*found, strict=True)),
    )


def one(model: GPT, batch: Batch, meta: MetaConfig) -> tuple[float, ...]:
    """What `Kept` holds, of one batch (B, T)."""
    inner, outer = halves(*batch, across_batch=meta.method != "fomaml")
    wanted = [-meta.inner_lr * gradient for gradient in inner_gradients(model, inner, meta)]
    masters = [master.detach() for master in model.bank_parameters()]
    plain = [master.to(model.compute_dtype) for master in masters]
    stepped = [(m + way).to(model.compute_dtype) for m, way in zip(masters, wanted, strict=True)]
    seen = [after.float() - before.float() for after, before in zip(stepped, plain, strict=True)]
    with torch.no_grad():
        losses = [float(model.loss(*inner, make_banks(banks))) for banks in (plain, stepped)]
    gradients = [bank_gradients(model, outer, banks, 0) for banks in (plain, stepped)]
    return *lengths(wanted, seen), *losses, lengths(*gradients)[2]


def lengths(a: list[Tensor], b: list[Tensor]) -> tuple[float, float, float]:
    """Norms of two lists of tensors, each as one vector, and the cosine between them."""
    x, y = (torch.cat([part.flatten().double() for part in parts]) for parts in (a, b))
    return float(x.norm()), float(y.norm()), float(x @ y / (x.norm() * y.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    try:
        rows = [(run.name, *kept(run, dtype).row()) for run in parser.parse_args().runs for dtype in DTYPES]
    except PgolfError as error:
        sys.exit(str(error))
    print(console.table(rows, HEADER))


if __name__ == "__main__":
    main()
