"""How the bytes of a section are coded: one interface over all codecs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pgolf_fast.ops import native
from pgolf_fast.ops.lzma import compress_bytes, decompress_bytes

Shape = tuple[int, int, int]  # rows, columns, item size in bytes
CODECS = {"raw": 0, "lzma": 1, "rans": 2, "zstd": 3, "brotli": 4}


def encode(codec: str, data: bytes, shapes: Sequence[Shape], *, preset: int = 9) -> bytes:
    """`data`, which is arrays of these shapes one after another, as `codec` stores it."""
    if codec == "raw":
        return data
    if codec == "lzma":
        return compress_bytes(data, preset)
    if codec == "rans" and (extension := native.extension()):
        return extension.rans_encode(data, shapes)
    raise ValueError(f"codec {codec} is not available here")


def decode(codec: str, stored: bytes, raw_bytes: int, shapes: Sequence[Shape]) -> bytes:
    """The exactly `raw_bytes` bytes that `encode` was given; ValueError when `stored` holds anything else."""
    if codec == "raw":
        if len(stored) != raw_bytes:
            raise ValueError(f"the raw bytes hold {len(stored)} bytes, but {raw_bytes} were stated")
        return stored
    if codec == "lzma":
        return decompress_bytes(stored, raw_bytes)
    if codec == "rans" and (extension := native.extension()):
        return extension.rans_decode(stored, shapes, raw_bytes)
    raise ValueError(f"codec {codec} is not available here")


def smallest(
    data: bytes,
    shapes: Sequence[Shape],
    candidates: Sequence[str] = ("rans", "lzma"),
    settings: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[str, bytes]:
    """The candidate that stores `data` in the fewest bytes, and those; raw if none is smaller."""
    stored = {"raw": data}
    for codec in candidates:
        if codec in ("raw", "lzma") or native.extension():
            stored[codec] = encode(codec, data, shapes, **(settings or {}).get(codec, {}))
    best = min(stored, key=lambda codec: len(stored[codec]))
    return best, stored[best]
