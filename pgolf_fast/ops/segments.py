"""Document segments of a batch: positions attend only to those of their own segment.

Boundaries are as in FlashAttention: `cu_seqlens` (n,) int32 holds the starts of all segments among the B * T
positions of the flattened batch, rises from 0 to B * T, and may end with repeats of B * T.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf_fast.ops.checks import expect_dtype, expect_shape, same_device


class Segments(NamedTuple):
    """Segments of B rows of T positions, as each kind of attention reads them."""

    starts: Tensor  # (B, T) int32: the first position of the row that belongs to each position's segment
    ends: Tensor  # (B, T) int32: one past the last
    cu_seqlens: Tensor
    longest: int  # a bound on the length of a segment

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """Boundaries and longest segments of queries and keys, as libraries take them."""
        return self.cu_seqlens, self.cu_seqlens, self.longest, self.longest

    def visible(self, queries: int) -> Tensor:
        """Return which keys (B, 1, W, T) the last W positions attend to, in their causal segments."""
        position = torch.arange(self.starts.shape[1], device=self.starts.device)
        first = self.starts[:, None, len(position) - queries :, None]
        return (position >= first) & (position <= position[len(position) - queries :, None])


def check_segments(op: str, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> None:
    """Raise ValueError for what can be seen without reading `cu_seqlens`."""
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"pgolf::{op}: max_seqlen is {max_seqlen}, but cu_seqlens is None: give both")
        return
    expect_shape(op, "cu_seqlens", cu_seqlens, (None,))
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"pgolf::{op}: cu_seqlens has {cu_seqlens.shape[0]} boundaries, but 2 are needed")
    expect_dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    same_device(op, x=x, cu_seqlens=cu_seqlens)
    if max_seqlen is not None and max_seqlen < 1:
        raise ValueError(f"pgolf::{op}: max_seqlen is {max_seqlen}, but 1 or more is needed")


def check_boundaries(
    op: str, cu_seqlens: Tensor | None, max_seqlen: int | None, batch: int, length: int
) -> None:
    """Raise ValueError for wrong boundaries; on the CPU only, since reading a GPU synchronizes."""
    if cu_seqlens is None or not cu_seqlens.is_cpu:
        return
    values, total = cu_seqlens.tolist(), batch * length
    sizes = [end - start for start, end in pairwise(values)]
    missing, longest = {*range(0, total, max(1, length))} - {*values}, max(sizes)
    problems = {
        f"begins with {values[0]}, but 0 is needed": values[0] != 0,
        f"falls by {-min(sizes)}, but it must not decrease": min(sizes) < 0,
        f"ends with {values[-1]}, but {total} positions are needed": values[-1] != total,
        f"lacks {min(missing, default=0)}, but every start of a row of {length} is needed": bool(missing),
        f"has a segment of {longest}, but max_seqlen is {max_seqlen}": longest > (max_seqlen or total),
    }
    if why := next((problem for problem, found in problems.items() if found), None):
        raise ValueError(f"pgolf::{op}: cu_seqlens {why}")


def segments_of(
    cu_seqlens: Tensor | None, max_seqlen: int | None, batch: int, length: int
) -> Segments | None:
    """Derive `Segments` without synchronizing; wrong boundaries give wrong ones, but none outside a row."""
    if cu_seqlens is None:
        return None
    cu_seqlens = cu_seqlens.contiguous()
    flat = torch.arange(batch * length, dtype=torch.int32, device=cu_seqlens.device)
    after = torch.searchsorted(cu_seqlens, flat, right=True).clamp_(1, cu_seqlens.shape[0] - 1)
    position = flat % max(1, length)
    row = flat - position
    starts = torch.minimum((cu_seqlens[after - 1] - row).clamp_(min=0), position)
    ends = torch.maximum((cu_seqlens[after] - row).clamp_(max=length), position + 1)
    longest = length if max_seqlen is None else min(max_seqlen, length)
    return Segments(starts.view(batch, length), ends.view(batch, length), cu_seqlens, max(1, longest))
