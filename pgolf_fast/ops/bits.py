"""pgolf::pack_bits, pgolf::unpack_bits, pgolf::dequantize_bits: matrices of codes of 6 or 8 bits.

Layout: a row of C 6-bit codes in -32..31 is padded with code 0 to K, the next multiple of 8. With
u = code + 32, the packed row is two planes, one after the other: the "4+2 split" that `int6_matmul` reads.

    low[j] = (u[2j] & 15) | (u[2j+1] & 15) << 4                     K/2 bytes
    two[j] = sum over i < 4 of (u[4j+i] >> 4) << 2i                 K/4 bytes

Codes of 8 bits are the bytes themselves, without padding. The C++ code (csrc/bits.h) and the torch reference
agree bitwise. This is a format for memory: files hold one byte per code, which every entropy coder compresses
better than packed bytes. Inference only: no autograd is registered.
"""

import torch
from torch import Tensor

from pgolf_fast.ops import native, reference_bytes
from pgolf_fast.ops.checks import expect_dtype, expect_shape, same_device

WIDTHS = (6, 8)


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of one packed row of `columns` codes."""
    return columns if bits == 8 else (columns + 7) // 8 * bits


@torch.library.custom_op("pgolf::pack_bits", mutates_args=())
def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 codes (R, C) of `bits` bits, 6 or 8, into uint8 (R, row_bytes(C, bits)).

    Raises ValueError for any other dtype, shape or width, and for a code out of range, naming its position.
    """
    _check_codes(codes, bits)
    extension = native.extension()
    try:
        if extension is None or codes.device.type != "cpu":
            return reference_bytes.pack_bits(codes, bits)
        threads = torch.get_num_threads()
        return torch.from_numpy(extension.pack_bits(codes.contiguous().numpy(), bits, threads))
    except ValueError as error:
        raise ValueError(f"pgolf::pack_bits: {error}") from error


@pack_bits.register_fake
def _(codes: Tensor, bits: int) -> Tensor:
    _check_codes(codes, bits)
    return codes.new_empty((codes.shape[0], row_bytes(codes.shape[1], bits)), dtype=torch.uint8)


@torch.library.custom_op("pgolf::unpack_bits", mutates_args=())
def unpack_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Return the int8 codes (R, columns) of packed uint8 (R, row_bytes(columns, bits)).

    The inverse of `pack_bits`. Raises ValueError if rows of that many bytes do not hold `columns` codes.
    """
    check_packed("unpack_bits", packed, columns, bits)
    extension = native.extension()
    if extension is None or packed.device.type != "cpu":
        return reference_bytes.unpack_bits(packed, columns, bits)
    threads = torch.get_num_threads()
    return torch.from_numpy(extension.unpack_bits(packed.contiguous().numpy(), columns, bits, threads))


@unpack_bits.register_fake
def _(packed: Tensor, columns: int, bits: int) -> Tensor:
    check_packed("unpack_bits", packed, columns, bits)
    return packed.new_empty((packed.shape[0], columns), dtype=torch.int8)


@torch.library.custom_op("pgolf::dequantize_bits", mutates_args=())
def dequantize_bits(packed: Tensor, scale: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Return codes * scale of packed codes (R, columns) in `dtype`, float32 or bfloat16, in one pass.

    packed uint8 (R, row_bytes(columns, bits)), scale (R,) float16 or float32. The product is taken in float32
    and rounded once, to nearest even: bitwise (codes.float() * scale.float()[:, None]).to(dtype).
    Raises ValueError if shapes, dtypes or devices do not match.
    """
    return _dequantize(packed, scale, columns, bits, dtype)


@dequantize_bits.register_fake
def _(packed: Tensor, scale: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(packed, scale, columns, bits, dtype)
    return packed.new_empty((packed.shape[0], columns), dtype=dtype)


def dequantize_bytes(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return codes * scale[:, None] of int8 codes (R, C): `dequantize_bits` with 8 bits, but not as an op.

    For loading: the first call of any Python custom op imports PyTorch's compiler, which takes longer.
    """
    return _dequantize(codes.view(torch.uint8), scale, codes.shape[1], 8, dtype)


def _dequantize(packed: Tensor, scale: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    _check_dequantize(packed, scale, columns, bits, dtype)
    extension = native.extension()
    if extension is None or packed.device.type != "cpu":
        return reference_bytes.dequantize_bits(packed, scale, columns, bits, dtype)
    values = packed.new_empty((packed.shape[0], columns), dtype=dtype)
    native.call(extension.dequantize_bits, packed, scale.float(), bits, values)
    return values


def check_packed(op: str, packed: Tensor, columns: int, bits: int) -> None:
    """Raise ValueError unless `packed` has rows that hold `columns` codes of `bits` bits."""
    _check_bits(op, bits)
    if columns < 0:
        raise ValueError(f"pgolf::{op}: columns is {columns}, but it must not be negative")
    expect_dtype(op, "packed", packed, torch.uint8)
    expect_shape(op, "packed", packed, (None, row_bytes(columns, bits)))


def _check_bits(op: str, bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"pgolf::{op}: bits is {bits}, but codes have 6 or 8 bits")


def _check_codes(codes: Tensor, bits: int) -> None:
    _check_bits("pack_bits", bits)
    expect_dtype("pack_bits", "codes", codes, torch.int8)
    expect_shape("pack_bits", "codes", codes, (None, None))


def _check_dequantize(packed: Tensor, scale: Tensor, columns: int, bits: int, dtype: torch.dtype) -> None:
    op = "dequantize_bits"
    check_packed(op, packed, columns, bits)
    expect_dtype(op, "scale", scale, torch.float16, torch.float32)
    expect_shape(op, "scale", scale, (packed.shape[0],))
    same_device(op, packed=packed, scale=scale)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"pgolf::{op}: dtype is {dtype}, but torch.float32 or torch.bfloat16 is needed")
