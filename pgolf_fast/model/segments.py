"""Texts that share one packed row, and do not see each other."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Where the segments of a packed row of T tokens begin.

    cu_seqlens: int32 (S + 1,), from 0 to T, not falling; repeated entries are empty segments. max_seqlen: no
    segment is longer.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    def apart(self, function: Callable[[Tensor], Tensor], row: Tensor) -> Tensor:
        """Return `function` of (B, T, ...) of a row (1, T, ...), with each segment as a row of its own."""
        starts = self.cu_seqlens
        positions = torch.arange(row.shape[1], dtype=starts.dtype, device=row.device)
        segment = torch.searchsorted(starts, positions, right=True) - 1
        offset = positions - starts[segment]
        rows = row.new_zeros(len(starts) - 1, self.max_seqlen, *row.shape[2:])
        return function(rows.index_put((segment, offset), row[0]))[segment, offset][None]
