"""Full-size codes through rANS: bytes beside entropy and oracle, seconds in C++ and numpy. Prints a table.

The oracle knows the scale of every row and column: the sum of -log2 p(code | its scale) over all codes.
Usage: python benchmarks/rans_table.py [--threads 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from pgolf_fast import _C
from pgolf_fast.artifact import rans_decoder

SHAPES = [(512, 512), (512, 512), (256, 512), (256, 512), (1536, 512), (512, 1536)] * 11  # exp101
SIGMA = 4.83  # P(|code| = 1) = 16.19 %, as in the log of PR 1501
SPREADS = {"equal rows": (0.0, 0.0), "row spread": (0.25, 0.0), "row and column spread": (0.25, 0.25)}


def matrices(row_spread: float, column_spread: float) -> tuple[list[np.ndarray], float]:
    """int8 codes -31..31 of every shape, and the oracle's bytes."""
    random, codes, bits = np.random.default_rng(0), [], 0.0
    for rows, columns in SHAPES:
        factors = random.normal(0, row_spread, (rows, 1)) + random.normal(0, column_spread, (1, columns))
        scale = np.exp(factors) * SIGMA
        code = (random.standard_normal((rows, columns)) * scale).round().clip(-31, 31)
        edges = (np.abs(code) - 0.5, np.where(np.abs(code) == 31, np.inf, np.abs(code) + 0.5))
        near, far = (torch.special.ndtr(torch.from_numpy(-edge / scale)).numpy() for edge in edges)
        bits -= np.log2(near - far).sum()
        codes.append(code.astype(np.int8))
    return codes, bits / 8


def entropy(codes: list[np.ndarray]) -> float:
    """Bytes of the order-0 entropy of all codes."""
    counts = sum(np.bincount(code.view(np.uint8).reshape(-1), minlength=256) for code in codes)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def best_of(repeats: int, run: Callable[[], bytes]) -> tuple[bytes, float]:
    """The result and the least seconds of a few runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return result, min(times)


def row(name: str, threads: int, repeats: int) -> str:
    codes, oracle = matrices(*SPREADS[name])
    data, shapes = b"".join(code.tobytes() for code in codes), [(*code.shape, 1) for code in codes]
    packed, encode_s = best_of(repeats, lambda: _C.rans_encode(data, shapes, threads))
    again, decode_s = best_of(repeats, lambda: _C.rans_decode(packed, shapes, len(data), threads))
    plain, numpy_s = best_of(1, lambda: rans_decoder.decode(packed, shapes))
    assert data == again == plain
    to_entropy, to_oracle = (100 * (len(packed) / bound - 1) for bound in (entropy(codes), oracle))
    return (
        f"| {name} | {len(packed):,} | {to_entropy:+.2f} % | {to_oracle:+.2f} % "
        f"| {encode_s:.2f} | {decode_s:.2f} | {numpy_s:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print("| codes | bytes | to order 0 | to oracle | encode s | decode s | numpy s |")
    print("|---|---|---|---|---|---|---|")
    for name in SPREADS:
        print(row(name, given.threads, given.repeats))


if __name__ == "__main__":
    main()
