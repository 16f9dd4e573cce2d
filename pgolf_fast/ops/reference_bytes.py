"""What the byte ops mean, in Python: used where the C++ codecs are missing, and as the tests' oracle."""

from __future__ import annotations

import lzma

import torch
from torch import Tensor

# Repeated in csrc/lzma_codec.h.
DECODER_MEMORY_LIMIT = 256 << 20
PRESET_DICTIONARY = (256 << 10, *(n << 20 for n in (1, 2, 4, 4, 8, 8, 16, 32, 64)))
LZMA_RANGES = {"lc": (0, 4), "lp": (0, 4), "pb": (0, 4), "nice_len": (2, 273), "mode": (1, 2)}


def lzma_compress(data: bytes, preset: int, extreme: bool, **settings: int) -> bytes:
    """`data` as one .xz stream (LZMA2, CRC32) with a dictionary no larger than the data needs.

    settings: those of LZMA_RANGES that are not the preset's. Raises ValueError for anything out of range.
    """
    if not 0 <= preset <= 9:
        raise ValueError(f"preset is {preset}, but LZMA presets are 0..9")
    for name, value in settings.items():
        low, high = LZMA_RANGES[name]
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, but it must lie in {low}..{high}")
    if (literal := settings.get("lc", 3) + settings.get("lp", 0)) > 4:
        raise ValueError(f"lc + lp is {literal}, but it must be at most 4")
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
    """The exactly `size` bytes of one .xz stream; ValueError says how the stream disagrees."""
    if size < 0:
        raise ValueError(f"size is {size}, but it must not be negative")
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DECODER_MEMORY_LIMIT)
    try:
        out = decoder.decompress(data, max_length=size + 1)  # one byte of room, to see that there is no more
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


def int6_pack(codes: Tensor) -> Tensor:
    """int8 (R, K) -> uint8 (R, 3 * K8 / 4), the 4+2 split written down in ops/int6.py."""
    outside = ((codes < -32) | (codes > 31)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        value = codes[row, column].item()
        raise ValueError(f"codes[{row}, {column}] is {value}, but int6 codes lie in -32..31")
    padding = -codes.shape[1] % 8
    u = torch.nn.functional.pad(codes, (0, padding)).add(32).to(torch.uint8)
    low, high = u & 15, u >> 4
    low = low[:, 0::2] | low[:, 1::2] << 4
    high = high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6
    return torch.cat([low, high], dim=1)


def int6_unpack(packed: Tensor, columns: int) -> Tensor:
    """uint8 (R, 3 * K8 / 4) -> int8 (R, columns); padding is dropped."""
    row_bytes = packed.shape[1]
    low, high = packed.split([row_bytes // 3 * 2, row_bytes // 3], dim=1)
    low = torch.stack([low & 15, low >> 4], dim=-1).flatten(1)
    high = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    codes = (low | high << 4).to(torch.int8) - 32
    return codes[:, :columns].contiguous()


def int6_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times the transposed matrix of codes * scale; see ops/int6.py."""
    return scaled_matmul(x, int6_unpack(packed, x.shape[-1]), scale)


def scaled_matmul(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times (codes (N, K) * scale (N,))^T in at least float32, rounded once to x's dtype."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return (x.to(acc) @ codes.to(acc).t() * scale.to(acc)).to(x.dtype)
