"""The byte ops in Python: used where the C++ codecs are missing, and as the tests' reference."""

import functools
import lzma

import torch
from torch import Tensor

# Repeated in csrc/lzma_codec.h.
DECODER_MEMORY_LIMIT = 256 << 20
PRESET_DICTIONARY = (256 << 10, *(n << 20 for n in (1, 2, 4, 4, 8, 8, 16, 32, 64)))
LZMA_RANGES = {"lc": (0, 4), "lp": (0, 4), "pb": (0, 4), "nice_len": (2, 273), "mode": (1, 2)}


def lzma_compress(data: bytes, preset: int, extreme: bool, **settings: int) -> bytes:
    """Compress `data` to one .xz stream (LZMA2, CRC32) with a dictionary no larger than the data needs.

    settings: names of LZMA_RANGES; they override the preset's. Raises ValueError for anything out of range.
    """
    if not 0 <= preset <= 9:
        raise ValueError(f"preset is {preset}, but LZMA presets are 0..9")
    for name, value in settings.items():
        low, high = LZMA_RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, but must be in {low}..{high}")
    if (literal := settings.get("lc", 3) + settings.get("lp", 0)) > 4:
        raise ValueError(f"lc + lp is {literal}, but must be at most 4")
    dictionary = 4096
    while dictionary < min(len(data), PRESET_DICTIONARY[preset]):
        dictionary *= 2
    lzma2 = {
        "id": lzma.FILTER_LZMA2,
        "preset": preset | (lzma.PRESET_EXTREME if extreme else 0),
        "dict_size": dictionary,
        **settings,
    }
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=[lzma2])


def lzma_decompress(data: bytes, size: int) -> bytes:
    """Decompress one .xz stream of exactly `size` bytes. Raises ValueError that says what is wrong."""
    if size < 0:
        raise ValueError(f"size is {size}, but must not be negative")
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DECODER_MEMORY_LIMIT)
    try:
        out = decoder.decompress(data, max_length=size + 1)  # +1 detects trailing output
    except lzma.LZMAError as error:
        if "format" in str(error):
            raise ValueError("the bytes are not an LZMA (.xz) stream") from error
        if "Memory usage limit" in str(error):
            limit = DECODER_MEMORY_LIMIT >> 20
            raise ValueError(f"the LZMA stream asks for more than {limit} MiB of memory") from error
        raise ValueError(f"the LZMA stream is corrupt: {error}") from error
    if len(out) > size:
        raise ValueError(f"the LZMA stream holds more than the stated {size} bytes")
    if not decoder.eof:
        raise ValueError(f"the LZMA stream is truncated: it does not end within its {len(data)} bytes")
    if len(out) < size:
        raise ValueError(f"the LZMA stream holds {len(out)} bytes, but {size} were stated")
    if decoder.unused_data:
        raise ValueError(f"{len(decoder.unused_data)} bytes follow the end of the LZMA stream")
    return out


# Planes of a packed row by width: (bits of u in the plane, its lowest bit); ops/bits.py defines the layout.
PLANES = {6: ((4, 0), (2, 4))}


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack int8 (R, C) to uint8 (R, row_bytes(C, bits)), in the planes that ops/bits.py defines."""
    if bits == 8:
        return codes.contiguous().view(torch.uint8).clone()
    half = 1 << (bits - 1)
    outside = ((codes < -half) | (codes >= half)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        value = codes[row, column].item()
        why = f"codes[{row}, {column}] is {value}, but {bits}-bit codes are in {-half}..{half - 1}"
        raise ValueError(why)
    u = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).add(half).to(torch.uint8)
    planes = []
    for width, lowest in PLANES[bits]:
        piece, step = u >> lowest & (1 << width) - 1, 8 // width
        shifted = (piece[:, i::step] << i * width for i in range(step))
        planes.append(functools.reduce(torch.bitwise_or, shifted))
    return torch.cat(planes, dim=1)


def unpack_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Unpack uint8 (R, row_bytes(columns, bits)) to int8 (R, columns), dropping the padding."""
    if bits == 8:
        return packed.contiguous().view(torch.int8).clone()
    eighth = packed.shape[1] // bits
    planes = packed.split([eighth * width for width, _ in PLANES[bits]], dim=1)
    u = torch.zeros(len(packed), 8 * eighth, dtype=torch.uint8, device=packed.device)
    for plane, (width, lowest) in zip(planes, PLANES[bits], strict=True):
        pieces = [plane >> shift & (1 << width) - 1 for shift in range(0, 8, width)]
        u |= torch.stack(pieces, dim=-1).flatten(1) << lowest
    return (u.to(torch.int8) - (1 << (bits - 1)))[:, :columns].contiguous()


def dequantize_bits(packed: Tensor, scale: Tensor, columns: int, bits: int, dtype: torch.dtype) -> Tensor:
    """Return codes * scale (R, columns), multiplied in float32 and rounded once to `dtype`."""
    return (unpack_bits(packed, columns, bits).float() * scale.float()[:, None]).to(dtype)


def scaled_matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return x (..., K) times (codes (N, K) * scale (N,))^T; accumulates in float32 or wider, rounds once."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return (x.to(acc) @ codes.to(acc).t() * scale.to(acc)).to(x.dtype)
