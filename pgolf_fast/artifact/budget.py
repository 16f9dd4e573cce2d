"""Fitting a model into its bytes: what the code costs, and which weights become zero when it is too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pgolf_fast
from pgolf_fast.report import logger

# What loading and scoring an artifact runs, by folder of the package; None stands for every file.
EVALUATION_SOURCES: dict[str, tuple[str, ...] | None] = {
    ".": ("__init__.py", "errors.py", "files.py", "report.py", "tensor_file.py"),
    "artifact": None,
    "config": None,
    "data": ("__init__.py", "shards.py", "tokenizer.py"),
    "evaluation": None,
    "kernels": None,
    "model": None,
    "ops": None,
    "quant": None,
    "csrc": None,
}
_BESIDE_THE_PACKAGE = ("kernels", "csrc")  # in a source checkout
_SUFFIXES = (".py", ".cpp", ".h")
PROBES = 6  # compressions that look for the number of codes to prune, after the first and before the last


def code_files() -> list[Path]:
    """The sources that `code_bytes` counts: all of EVALUATION_SOURCES that is installed.

    An installed wheel has no csrc/ (Python's lzma module can stand in for it), a source checkout has.
    """
    package = Path(pgolf_fast.__file__).parent
    files: list[Path] = []
    for folder, names in EVALUATION_SOURCES.items():
        place = package / folder
        if folder in _BESIDE_THE_PACKAGE and not place.is_dir():
            place = package.parent / folder
        found = place.iterdir() if names is None and place.is_dir() else (place / n for n in names or ())
        files += sorted(file for file in found if file.suffix in _SUFFIXES and file.is_file())
    return files


def code_bytes() -> int:
    """Bytes of the package's sources that evaluation needs, uncompressed and with their comments."""
    return sum(file.stat().st_size for file in code_files())


@dataclass(frozen=True, eq=False)
class Pruned:
    """Matrices after pruning: `count` of `candidates` +-1 codes are zero; `fits`: whether that is enough."""

    codes: list[NDArray[np.int8]]
    count: int
    candidates: int
    compressions: int
    fits: bool


def prune_to_fit(
    matrices: Sequence[tuple[NDArray[np.int8], NDArray[np.float16]]],
    budget: int,
    first_size: int,
    compressed_size: Callable[[bytes], int],
    tolerance: int,
) -> Pruned:
    """Zero +-1 codes, those of the rows with the smallest squared scale first, until the codes fit (PR 1501).

    matrices: (codes (R, C), scale (R,)), in file order; ties go in file order too, which is what saves most:
    entropy falls once a matrix has lost all its +-1 codes, and hardly when every matrix has lost a few.
    budget: bytes that the compressed codes may take; first_size: what they take now.
    The smallest number that fits is searched with the order-0 entropy of each matrix as a stand-in for the
    compressor, corrected by every real compression; it ends within `tolerance` bytes under the budget or
    after PROBES compressions, with the smallest number found to fit.
    """
    order = _Order(matrices)
    low, low_size, high, high_size, probes = 0, first_size, None, 0, 0
    while probes < PROBES and not (high is not None and (budget - high_size <= tolerance or high - low <= 1)):
        guess = _guess(
            order, (low, low_size), None if high is None else (high, high_size), budget - tolerance // 2
        )
        if high is None and probes == PROBES - 1:
            guess = order.candidates
        size, probes = compressed_size(order.pruned(guess).tobytes()), probes + 1
        logger.info("prune: %d of %d codes -> %d bytes, budget %d", guess, order.candidates, size, budget)
        if size <= budget:
            high, high_size = guess, size
        elif guess == order.candidates:
            return Pruned([], guess, order.candidates, probes, False)
        else:
            low, low_size = guess, size
    assert high is not None  # the last probe prunes everything if none before fitted
    flat = order.pruned(high)
    ends = np.cumsum([codes.size for codes, _ in matrices])[:-1]
    parts = [part.reshape(m[0].shape) for part, m in zip(np.split(flat, ends), matrices, strict=True)]
    return Pruned(parts, high, order.candidates, probes, True)


def _guess(order: _Order, low: tuple[int, int], high: tuple[int, int] | None, target: int) -> int:
    """The least number of codes whose predicted size is at most `target`, strictly inside the bracket."""
    (low_n, low_size), low_model = low, order.entropy_bytes(low[0])
    if high is None:
        goal, last = low_model * target / max(low_size, 1), order.candidates
    else:
        share = (low_size - target) / max(low_size - high[1], 1)
        goal = low_model + share * (order.entropy_bytes(high[0]) - low_model)
        last = high[0] - 1
    first = min(low_n + 1, last)
    while first < last:
        middle = (first + last) // 2
        if order.entropy_bytes(middle) <= goal:
            last = middle
        else:
            first = middle + 1
    return first


class _Order:
    """The order in which +-1 codes are zeroed, and the entropy after any number of them."""

    def __init__(self, matrices: Sequence[tuple[NDArray[np.int8], NDArray[np.float16]]]):
        self.flat = np.concatenate([codes.ravel() for codes, _ in matrices])
        places, costs, owners, start = [], [], [], 0
        for index, (codes, scale) in enumerate(matrices):
            flat = codes.ravel()
            ones = np.flatnonzero(np.abs(flat) == 1)
            places.append(start + ones)
            costs.append(np.square(scale.astype(np.float32))[ones // codes.shape[1]])
            owners.append(2 * index + (flat[ones] > 0))
            start += flat.size
        rank = np.argsort(np.concatenate(costs), kind="stable")
        self.places, self.owners = np.concatenate(places)[rank], np.concatenate(owners)[rank]
        self.candidates = len(rank)
        self.counts = np.stack(
            [np.bincount(c.ravel().astype(np.int64) + 128, minlength=256) for c, _ in matrices]
        )

    def pruned(self, number: int) -> NDArray[np.int8]:
        """All codes, flat, with the first `number` candidates zero."""
        flat = self.flat.copy()
        flat[self.places[:number]] = 0
        return flat

    def entropy_bytes(self, number: int) -> float:
        """Bytes of an ideal order-0 coder that knows each matrix's histogram."""
        removed = np.bincount(self.owners[:number], minlength=2 * len(self.counts)).reshape(-1, 2)
        counts: NDArray[Any] = self.counts.copy()
        counts[:, 127] -= removed[:, 0]
        counts[:, 129] -= removed[:, 1]
        counts[:, 128] += removed.sum(1)
        totals = counts.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = np.where(counts > 0, counts * np.log2(totals / counts), 0.0)
        return float(bits.sum() / 8)
