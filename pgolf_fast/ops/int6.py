"""pgolf::int6_matmul: products with a matrix of packed 6-bit codes and a scale per row.

`int6_pack` and `int6_unpack` are `pack_bits` and `unpack_bits` with 6 bits. ops/bits.py defines the layout,
the "4+2 split" of 3 * K8 / 4 bytes per row (K8: K padded to a multiple of 8).
Inference only: no autograd is registered.
"""

import functools

import torch
from torch import Tensor

from pgolf_fast.ops import native, reference_bytes, tiles
from pgolf_fast.ops.bits import check_packed, pack_bits, unpack_bits
from pgolf_fast.ops.checks import as_rows, expect_floating, expect_shape, same_device
from pgolf_fast.ops.tiles import Tile

# Not measured. sm80 also serves GPUs with 99 KiB of shared memory per block, hence the smaller tiles.
tiles.declare("int6_matmul_skinny", Tile(64, 64, 128, 4, 3))
tiles.declare("int6_unpack", Tile(16, 256, 32, 4, 1))
tiles.declare("int6_matmul", sm90=Tile(128, 256, 64, 8, 3), sm80=Tile(128, 128, 32, 8, 3))

# With more rows of x, the matrix is unpacked once instead of in every tile of rows.
SKINNY_ROWS = 64


def int6_pack(codes: Tensor) -> Tensor:
    """Pack int8 codes (R, K), each in -32..31, into uint8 (R, 3 * K8 / 4); see `pack_bits`."""
    return pack_bits(codes, 6)


def int6_unpack(packed: Tensor, columns: int) -> Tensor:
    """Return the int8 codes (R, columns) of packed uint8 (R, 3 * K8 / 4); see `unpack_bits`."""
    return unpack_bits(packed, columns, 6)


@torch.library.custom_op("pgolf::int6_matmul", mutates_args=())
def int6_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Return `y[..., n] = scale[n] * sum_k x[..., k] * codes[n, k]`; no autograd is registered.

    x (..., K) and scale (N,) are floating point; packed uint8 (N, 3 * K8 / 4) holds codes (N, K). The sum is
    taken in at least float32 and rounded once; y is (..., N) in x's dtype. Up to SKINNY_ROWS rows of x
    (decoding) are multiplied by the packed codes directly: 16-bit x on a GPU; float32 and bfloat16 x on a
    CPU, in C++, with the same result for any number of threads. Otherwise the codes are first unpacked to a
    dtype in which they are exact. In all cases the scale multiplies a sum of at least float32.
    Raises ValueError if shapes, dtypes or devices do not match.
    """
    _check_matmul(x, packed, scale)
    if tiles.uses_kernels("int6_matmul", x):
        return _cuda(x, packed, scale)
    rows = x.shape[:-1].numel()
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and 0 < rows <= _direct_rows():
        return _cpu(x, packed, scale)
    return reference_bytes.scaled_matmul(x, int6_unpack(packed, x.shape[-1]), scale).contiguous()


@int6_matmul.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    _check_matmul(x, packed, scale)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@functools.cache
def _direct_rows() -> int:
    """Return the most rows of x that C++ multiplies: few in its portable form, which reads x per code row."""
    extension = native.extension()
    return 0 if extension is None else SKINNY_ROWS if extension.int6_simd() else 4


def _cpu(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    extension = native.extension()
    assert extension is not None  # by _direct_rows
    y = x.new_empty((*x.shape[:-1], len(packed)))
    result = y.view(x.shape[:-1].numel(), len(packed))
    native.call(extension.int6_matmul, as_rows(x), packed, scale.float(), result)
    return y


def _cuda(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    from pgolf_fast.kernels import int6_matmul as kernels

    columns, depth = packed.shape[0], x.shape[-1]
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel() == 0 or depth == 0:
        return y.zero_()
    rows, flat_y = x.reshape(-1, depth), y.view(-1, columns)
    scale, packed = scale.contiguous(), packed.contiguous()
    if packed.data_ptr() % 2:  # the low plane is read as 16-bit words
        packed = packed.clone()
    words = packed.view(-1).view(torch.int16)
    with tiles.on_device_of(x):
        if len(rows) <= SKINNY_ROWS and x.dtype != torch.float32:
            tile = tiles.lookup("int6_matmul_skinny", x)
            kernels.launch_int6_matmul_skinny(rows, words, packed, scale, flat_y, tile)
            return y
        codes = x.new_empty(columns, depth)
        kernels.launch_int6_unpack(words, packed, codes, tiles.lookup("int6_unpack", x))
        if x.dtype == torch.float32:
            # Exact in float32; Triton 3.7 would compute this product in TF32 on sm_100.
            torch.mul(rows @ codes.t(), scale.float(), out=flat_y)
        else:
            kernels.launch_int6_matmul(rows, codes, scale, flat_y, tiles.lookup("int6_matmul", x))
    return y


def _check_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> None:
    expect_floating("int6_matmul", "x", x)
    expect_floating("int6_matmul", "scale", scale)
    if x.dim() == 0:
        raise ValueError("pgolf::int6_matmul: x.shape is (), but at least one dimension is needed")
    check_packed("int6_matmul", packed, x.shape[-1], 6)
    expect_shape("int6_matmul", "scale", scale, (packed.shape[0],))
    same_device("int6_matmul", x=x, packed=packed, scale=scale)
