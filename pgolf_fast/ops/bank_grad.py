"""How a bank-indexed op hands back the gradient of one slot.

With a gradient bank, the backward op adds into its slot and autograd is told there is nothing left to do.
Without one (gradcheck, one-off gradients), autograd gets a bank-sized tensor that is zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_matmul(grad_bank: Tensor, slot: int, left: Tensor, right: Tensor) -> None:
    """grad_bank[slot] += left @ right, in the gradient bank's dtype."""
    if left.dtype == grad_bank.dtype:
        grad_bank[slot].addmm_(left, right)
    else:
        grad_bank[slot].add_(left @ right)


def scatter_slots(bank: Tensor, slots: Sequence[int], grads: Sequence[Tensor] | Tensor) -> Tensor:
    """A gradient for the whole bank from the gradients of some of its slots."""
    full = torch.zeros_like(bank)
    for slot, grad in zip(slots, grads, strict=True):
        full[slot] = grad
    return full


def expect_slot(op: str, slot: int, slots: int) -> None:
    """Raise ValueError unless `slot` names one of the bank's layers."""
    if not 0 <= slot < slots:
        raise ValueError(f"pgolf::{op}: slot is {slot}, but the bank has layers 0 to {slots - 1}")
