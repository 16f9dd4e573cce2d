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

from pgolf_fast.ops import launch, native, reference_bytes
from pgolf_fast.ops.checks import expect_dtype, expect_floating, expect_shape, same_device
from pgolf_fast.ops.launch import Launch

launch.declare("int6_skinny", sm90=Launch(64, 64, 128, num_warps=4, num_stages=3))
launch.declare("int6_codes", sm90=Launch(16, 256, 32, num_warps=4, num_stages=1))
launch.declare(
    "int6_matmul",
    sm90=Launch(128, 256, 64, num_warps=8, num_stages=3),
    sm80=Launch(128, 128, 32, num_warps=8, num_stages=3),
)

# For more rows of x than this, the matrix is unpacked once instead of in every tile of rows.
SKINNY_ROWS = 64


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
    The sum is taken in at least float32 and rounded once; y is (..., N) in x's dtype. On a GPU, up to
    SKINNY_ROWS rows of 16-bit x (decoding) are multiplied by the packed codes themselves; otherwise the codes
    are first unpacked to x's dtype, in which they are exact. Both ways the scale multiplies a float32 sum.
    Raises ValueError where shapes, dtypes or devices do not fit together.
    """
    _check_matmul(x, packed, scale)
    if launch.uses_kernels("int6_matmul", x):
        return _matmul_kernels(x, packed, scale)
    return reference_bytes.scaled_matmul(x, _unpack(packed, x.shape[-1]), scale).contiguous()


@int6_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    _check_matmul(x, packed, scale)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _matmul_kernels(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    from pgolf_fast.kernels.int6_matmul import launch_int6_codes, launch_int6_matmul, launch_int6_skinny

    columns, depth = packed.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel() == 0 or depth == 0:
        return y.zero_()
    rows, scale = x.reshape(-1, depth), scale.contiguous()
    flat_y = y.view(-1, columns)
    packed = packed.contiguous()
    if packed.data_ptr() % 2:  # the low plane is read as 16-bit words
        packed = packed.clone()
    words = packed.view(-1).view(torch.int16)
    with launch.on_device_of(x):
        if len(rows) <= SKINNY_ROWS and x.dtype != torch.float32:
            launch_int6_skinny(rows, words, packed, scale, flat_y, launch.launch("int6_skinny", x))
            return y
        codes = x.new_empty(columns, depth)
        launch_int6_codes(words, packed, codes, launch.launch("int6_codes", x))
        if x.dtype == torch.float32:
            # Nothing is rounded in between. Triton 3.7 would take such a product in TF32 on sm_100.
            torch.mul(rows @ codes.t(), scale.float(), out=flat_y)
        else:
            launch_int6_matmul(rows, codes, scale, flat_y, launch.launch("int6_matmul", x))
    return y


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
