"""Input checks shared by the ops. Every message names op and argument, what it is and what it should be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def same_dtype_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share dtype and device with the first."""
    _same(op, ("dtype", "device"), tensors)


def same_shape_dtype_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors share shape, dtype and device with the first."""
    _same(op, ("shape", "dtype", "device"), tensors)


def same_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    _same(op, ("device",), tensors)


def expect_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor.shape` is `shape`; None stands for any size."""
    sizes = tuple(tensor.shape)
    matches = len(sizes) == len(shape) and all(
        want is None or got == want for got, want in zip(sizes, shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        wanted += "," if len(shape) == 1 else ""
        raise ValueError(f"pgolf::{op}: {name}.shape is {sizes}, but ({wanted}) is needed")


def expect_dtype(op: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor.dtype` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"pgolf::{op}: {name}.dtype is {tensor.dtype}, but {wanted} is needed")


def expect_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` holds floating-point numbers."""
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"pgolf::{op}: {name}.dtype is {tensor.dtype}, but a floating-point type is needed")


def _same(op: str, attributes: tuple[str, ...], tensors: dict[str, Tensor]) -> None:
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        for attribute in attributes:
            want, got = getattr(first, attribute), getattr(tensor, attribute)
            if want != got:
                if attribute == "shape":
                    want, got = tuple(want), tuple(got)
                raise ValueError(
                    f"pgolf::{op}: {name}.{attribute} is {got}, but {first_name}.{attribute} is {want}"
                )
