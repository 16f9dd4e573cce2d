"""pgolf::int6_pack, pgolf::int6_unpack, pgolf::int6_matmul — matrices of 6-bit codes with a scale per row.

Layout, the "4+2 split": a row of K codes in -32..31 is padded with code 0 to K8, the next multiple of 8. With
u = code + 32 (0..63), the packed row is a low plane of K8/2 bytes and then a high plane of K8/4 bytes:

    low [j] = (u[2j] & 15) | (u[2j+1] & 15) << 4
    high[j] = u[4j] >> 4 | (u[4j+1] >> 4) << 2 | (u[4j+2] >> 4) << 4 | (u[4j+3] >> 4) << 6

so a row takes 3 * K8 / 4 bytes. The C++ codec (csrc/int6.h) and the torch reference agree to the bit. This is
a format for memory: files hold one byte per code, which LZMA makes smaller than it makes packed bytes.
All three ops are for inference only: no autograd is registered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf_fast.ops import native, reference_bytes
from pgolf_fast.ops.checks import expect_dtype, expect_floating, expect_shape, same_device


def row_bytes(columns: int) -> int:
    """Bytes of one packed row of `columns` codes."""
    return (columns + 7) // 8 * 6


@torch.library.custom_op("pgolf::int6_pack", mutates_args=())
def int6_pack(codes: Tensor) -> Tensor:
    """Pack int8 codes (R, K), each in -32..31, into uint8 (R, 3 * K8 / 4).

    Raises ValueError for another dtype or shape, and for a code out of range, naming its row and column.
    """
    _check_codes(codes)
    extension = native.extension()
    try:
        if extension is None or codes.device.type != "cpu":
            return reference_bytes.int6_pack(codes)
        return torch.from_numpy(extension.int6_pack(codes.contiguous().numpy()))
    except ValueError as error:
        raise ValueError(f"pgolf::int6_pack: {error}") from error


@int6_pack.register_fake
def _(codes: Tensor) -> Tensor:
    _check_codes(codes)
    return codes.new_empty((codes.shape[0], row_bytes(codes.shape[1])), dtype=torch.uint8)


@torch.library.custom_op("pgolf::int6_unpack", mutates_args=())
def int6_unpack(packed: Tensor, columns: int) -> Tensor:
    """The int8 codes (R, columns) of packed uint8 (R, 3 * K8 / 4); the inverse of `int6_pack`.

    Raises ValueError when rows of that many bytes do not hold `columns` codes.
    """
    _check_packed("int6_unpack", packed, columns)
    return _unpack(packed, columns)


@int6_unpack.register_fake
def _(packed: Tensor, columns: int) -> Tensor:
    _check_packed("int6_unpack", packed, columns)
    return packed.new_empty((packed.shape[0], columns), dtype=torch.int8)


@torch.library.custom_op("pgolf::int6_matmul", mutates_args=())
def int6_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """y[..., n] = scale[n] * sum_k x[..., k] * codes[n, k], for inference: no autograd.

    x is (..., K), scale (N,), both floating point; packed uint8 (N, 3 * K8 / 4) holds codes (N, K).
    The sum is taken in at least float32 and rounded once; y is (..., N) in x's dtype.
    Raises ValueError where shapes, dtypes or devices do not fit together.
    """
    _check_matmul(x, packed, scale)
    return reference_bytes.scaled_matmul(x, _unpack(packed, x.shape[-1]), scale).contiguous()


@int6_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    _check_matmul(x, packed, scale)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _unpack(packed: Tensor, columns: int) -> Tensor:
    extension = native.extension()
    if extension is None or packed.device.type != "cpu":
        return reference_bytes.int6_unpack(packed, columns)
    return torch.from_numpy(extension.int6_unpack(packed.contiguous().numpy(), columns))


def _check_codes(codes: Tensor) -> None:
    expect_dtype("int6_pack", "codes", codes, torch.int8)
    expect_shape("int6_pack", "codes", codes, (None, None))


def _check_packed(op: str, packed: Tensor, columns: int) -> None:
    if columns < 0:
        raise ValueError(f"pgolf::{op}: columns is {columns}, but it must not be negative")
    expect_dtype(op, "packed", packed, torch.uint8)
    expect_shape(op, "packed", packed, (None, row_bytes(columns)))


def _check_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    expect_floating("int6_matmul", "x", x)
    expect_floating("int6_matmul", "scale", scale)
    if x.dim() == 0:
        raise ValueError("pgolf::int6_matmul: x.shape is (), but at least one dimension is needed")
    _check_packed("int6_matmul", packed, x.shape[-1])
    expect_shape("int6_matmul", "scale", scale, (packed.shape[0],))
    same_device("int6_matmul", x=x, packed=packed, scale=scale)
