"""Input checks and memory layouts shared by the ops.

Every message names the op and the argument, what it is and what it should be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def same_dtype_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share dtype, a floating-point one, and device with the first."""
    expect_floating(op, *next(iter(tensors.items())))
    _same(op, ("dtype", "device"), tensors)


def same_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    _same(op, ("device",), tensors)


def _same(op: str, attributes: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    (first_name, first), *rest = tensors.items()
    for name, tensor in rest:
        for attribute in attributes:
            want, got = getattr(first, attribute), getattr(tensor, attribute)
            if want != got:
                why = f"pgolf::{op}: {name}.{attribute} is {got}, but {first_name}.{attribute} is {want}"
                raise ValueError(why)


def expect_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor.shape` is `shape`; None matches any size."""
    sizes = tuple(tensor.shape)
    match = (want is None or got == want for got, want in zip(sizes, shape, strict=False))
    if len(sizes) != len(shape) or not all(match):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        wanted += "," if len(shape) == 1 else ""
        raise ValueError(f"pgolf::{op}: {name}.shape is {sizes}, but ({wanted}) is needed")


def expect_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor.dtype` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"pgolf::{op}: {name}.dtype is {tensor.dtype}, but {wanted} is needed")


def expect_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` has a floating-point dtype."""
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"pgolf::{op}: {name}.dtype is {tensor.dtype}, but a floating-point type is needed")


def expect_integer(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` has a floating-point or complex dtype."""
    if tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"pgolf::{op}: {name}.dtype is {tensor.dtype}; it must be an integer type")


def expect_slot(op: str, slot: int, slots: int) -> None:
    """Raise ValueError unless `slot` is one of the bank's layers."""
    if not 0 <= slot < slots:
        raise ValueError(f"pgolf::{op}: slot is {slot}, but the bank has layers 0 to {slots - 1}")


def expect_ids(op: str, name: str, ids: Tensor, holder: str, count: int) -> None:
    """Raise IndexError for an id outside 0..count - 1; on the CPU only, since reading a GPU synchronizes."""
    if ids.is_cuda or not ids.numel():
        return
    low, high = (int(value) for value in ids.long().aminmax())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise IndexError(f"pgolf::{op}: {name} hold {wrong}, but {holder} has ids 0 to {count - 1}")


def dense(t: Tensor | None) -> Tensor | None:
    """Return `t` contiguous; None stays None."""
    return None if t is None else t.contiguous()


def unit_inner_stride(t: Tensor) -> Tensor:
    """`t`, copied only if its last dimension is strided: kernels read rows of adjacent elements."""
    return t if t.stride(-1) == 1 else t.contiguous()


def as_rows(t: Tensor) -> Tensor:
    """(..., D) as (rows, D) with unit inner stride, copied only if no view can do it."""
    return unit_inner_stride(t.reshape(t.shape[:-1].numel(), t.shape[-1]))  # -1 is ambiguous for D = 0
