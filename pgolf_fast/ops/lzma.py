"""pgolf::lzma_compress and pgolf::lzma_decompress — bytes to one .xz stream (LZMA2, CRC32) and back.

Compress one byte per weight: codes packed to 6 bits first come out 6 to 13 % larger.
Both release the GIL, so threads compress in parallel.
"""

from types import ModuleType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.ops import native, reference_bytes
from pgolf_fast.ops.checks import expect_dtype, expect_shape

MODES = ("fast", "normal")


def compress_bytes(
    data: bytes,
    preset: int = 9,
    *,
    extreme: bool = False,
    lc: int | None = None,
    lp: int | None = None,
    pb: int | None = None,
    nice_len: int | None = None,
    mode: Literal["fast", "normal"] | None = None,
) -> bytes:
    """Compress `data` to one .xz stream; `preset` is 0 (fast) to 9 (small), `extreme` tries harder.

    The other settings override the preset's. Literals are predicted from lc bits (0..4) of the previous byte
    and lp bits (0..4, lc + lp at most 4) of the position, everything else from pb bits (0..4) of the
    position; nice_len (2..273) is the match length at which the search stops; mode is the search itself.
    Raises ValueError for settings out of range. The bytes depend on the version of liblzma.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"mode is {mode!r}, but LZMA's modes are fast and normal")
    number = None if mode is None else 1 + MODES.index(mode)
    settings = {"extreme": extreme, "lc": lc, "lp": lp, "pb": pb, "nice_len": nice_len, "mode": number}
    return lzma_compress(_tensor(data), preset, **settings).numpy().tobytes()


def decompress_bytes(data: bytes, size: int) -> bytes:
    """Decompress one .xz stream of exactly `size` bytes.

    Raises ValueError that says whether the stream is truncated, corrupt, longer or shorter than `size`, or
    followed by other bytes. Never writes more than `size` bytes; the decoder itself uses at most 256 MiB.
    """
    try:
        return lzma_decompress(_tensor(data), size).numpy().tobytes()
    except ValueError as error:  # callers are about files, not about ops
        raise ValueError(str(error).removeprefix("pgolf::lzma_decompress: ")) from error


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))


def backend() -> str:
    """Name the LZMA in use: "liblzma 5.4.1" or Python's lzma module, with the reason."""
    codec = _codec()
    if codec is not reference_bytes:
        return f"liblzma {codec.lzma_version()}"
    reason = "extension not built" if native.extension() is None else "extension built without liblzma"
    return f"Python's lzma module ({reason})"


def _codec() -> ModuleType:
    extension = native.extension()
    return extension if extension is not None and hasattr(extension, "lzma_compress") else reference_bytes


# Not by `torch.library.custom_op`: its first call imports PyTorch's compiler, which would add 2 s to every
# command that reads an artifact.
_LIBRARY = torch.library.Library("pgolf", "FRAGMENT")
_LIBRARY.define(
    "lzma_compress(Tensor data, int preset=9, *, bool extreme=False, int? lc=None, int? lp=None, "
    "int? pb=None, int? nice_len=None, int? mode=None) -> Tensor"
)
_LIBRARY.define("lzma_decompress(Tensor data, int size) -> Tensor")


def lzma_compress(data: Tensor, preset: int = 9, **settings: int | None) -> Tensor:
    """Compress `data` uint8 (n,) to one .xz stream, uint8 (m,); m depends on the data.

    settings: those of `compress_bytes`, with `mode` 1 for fast and 2 for normal. Inference only, no autograd;
    CPU only. Raises ValueError for another dtype or shape, or settings out of range.
    """
    return torch.ops.pgolf.lzma_compress(data, preset, **settings)


def _compress(data: Tensor, preset: int = 9, *, extreme: bool = False, **settings: int | None) -> Tensor:
    given = {name: value for name, value in settings.items() if value is not None}
    return _run("lzma_compress", data, preset, extreme, **given)


def lzma_decompress(data: Tensor, size: int) -> Tensor:
    """Decompress the .xz stream `data`, uint8 (m,), to uint8 (size,).

    Inference only, no autograd; CPU only. Raises ValueError as `decompress_bytes` does.
    """
    return torch.ops.pgolf.lzma_decompress(data, size)


def _decompress(data: Tensor, size: int) -> Tensor:
    return _run("lzma_decompress", data, size)


_LIBRARY.impl("lzma_compress", _compress, "CPU")
_LIBRARY.impl("lzma_decompress", _decompress, "CPU")


@torch.library.register_fake("pgolf::lzma_compress", lib=_LIBRARY)
def _(data: Tensor, preset: int = 9, **settings: int | None) -> Tensor:
    _check_bytes("lzma_compress", data)
    return data.new_empty(torch.library.get_ctx().new_dynamic_size())


@torch.library.register_fake("pgolf::lzma_decompress", lib=_LIBRARY)
def _(data: Tensor, size: int) -> Tensor:
    _check_bytes("lzma_decompress", data)
    return data.new_empty(size)


def _check_bytes(op: str, data: Tensor) -> None:
    expect_dtype(op, "data", data, torch.uint8)
    expect_shape(op, "data", data, (None,))


def _run(op: str, data: Tensor, *arguments: int, **settings: int) -> Tensor:
    _check_bytes(op, data)
    try:
        return _tensor(getattr(_codec(), op)(data.numpy().tobytes(), *arguments, **settings))
    except ValueError as error:
        raise ValueError(f"pgolf::{op}: {error}") from error
