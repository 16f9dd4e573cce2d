"""The codecs of an artifact's sections: raw, LZMA and rANS, plus zstd and brotli as extras.

A section is a list of arrays, coded as one string of bytes. Every codec receives the arrays' shapes; only
rANS uses them. Damaged bytes raise ValueError; no decoder uses much more memory than its output.
"""

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

from pgolf_fast import cores
from pgolf_fast.artifact import rans_decoder
from pgolf_fast.config.checks import need
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import native
from pgolf_fast.ops.lzma import compress_bytes, decompress_bytes

Shape = tuple[int, int, int]  # rows, columns, bytes of an item; row-major, little-endian

CODECS: dict[str, int] = {"raw": 0, "lzma": 1, "rans": 2, "zstd": 3, "brotli": 4}  # the numbers in a file

# LZMA takes as long as all other codecs together. Above PROBE_FROM bytes it is probed at PROBE_PRESET first;
# the full preset runs only if the probe is within PROBE_MARGIN of the best other codec.
PROBE_FROM, PROBE_PRESET, PROBE_MARGIN = 65_536, 0, 1.03
_ZSTD_STEP = 256  # bytes of input at a time, which expand to at most 11 MiB: bounds a bomb's memory


def encode(codec: str, data: bytes, shapes: Sequence[Shape], preset: int = 9) -> bytes:
    """Compress `data`, which holds arrays of `shapes` one after another; `preset`, 0 to 9, is LZMA's.

    Raises PgolfError for a codec that is unknown or not installed; ValueError for a preset out of range, or
    shapes that do not add up to the data.
    """
    _check_shapes(shapes, len(data))
    return _CODERS[_known(codec)][0](data, shapes, preset)


def decode(codec: str, stored: bytes, raw_bytes: int, shapes: Sequence[Shape]) -> bytes:
    """Decompress `stored` to exactly `raw_bytes` bytes, the arrays of `shapes`.

    Raises ValueError when the stored bytes are damaged or hold another number; PgolfError as `encode`.
    """
    _check_shapes(shapes, raw_bytes)
    data = _CODERS[_known(codec)][1](stored, raw_bytes, shapes)
    if len(data) != raw_bytes:
        raise ValueError(f"the {codec} bytes hold {len(data)} bytes, but {raw_bytes} were stated")
    return data


def smallest(
    data: bytes, shapes: Sequence[Shape], candidates: Sequence[str] = ("rans", "lzma"), preset: int = 9
) -> tuple[str, bytes]:
    """Return the candidate that makes `data` smallest, and its bytes; ("raw", data) if none makes it smaller.

    Candidates run in parallel threads; the first wins a tie. LZMA, at `preset`, is dropped where a quick
    probe falls far behind. Without the C++ extension, LZMA replaces rANS.
    """
    replaced = {"rans": "lzma"} if native.extension() is None else {}
    names = dict.fromkeys(replaced.get(name, name) for name in map(_known, candidates))
    quick = [name for name in names if name != "lzma"]
    with ThreadPoolExecutor(max(1, len(quick))) as pool:
        done = dict(zip(quick, pool.map(lambda name: encode(name, data, shapes), quick), strict=True))
    if "lzma" in names:
        must_try = not done or len(data) <= PROBE_FROM
        probe = 0 if must_try else len(compress_bytes(data, preset=PROBE_PRESET))
        if probe <= PROBE_MARGIN * min(map(len, done.values()), default=0):
            done["lzma"] = encode("lzma", data, shapes, preset)
    best = min(((n, done[n]) for n in names if n in done), key=lambda p: len(p[1]), default=("raw", data))
    return best if len(best[1]) < len(data) else ("raw", data)


def _known(codec: str) -> str:
    need(codec in CODECS, f"codec is {codec!r}, but must be one of {', '.join(CODECS)}")
    return codec


def _check_shapes(shapes: Sequence[Shape], size: int) -> None:
    total = 0
    for rows, columns, itemsize in shapes:
        if rows < 0 or columns < 0 or itemsize not in (1, 2, 4, 8):
            raise ValueError(f"shape {(rows, columns, itemsize)} is not (rows, columns, 1, 2, 4 or 8)")
        total += rows * columns * itemsize
    if total != size:
        raise ValueError(f"the shapes hold {total} bytes, but there are {size}")


def _encode_rans(data: bytes, shapes: Sequence[Shape], preset: int) -> bytes:
    extension = native.extension()
    if extension is None:
        hint = "run `pip install -e .` with a C++ compiler installed"
        raise PgolfError(f"rANS encoding needs the C++ extension: {hint}")
    return bytes(extension.rans_encode(data, list(shapes), cores.threads()))


def _decode_rans(stored: bytes, raw_bytes: int, shapes: Sequence[Shape]) -> bytes:
    extension = native.extension()
    if extension is not None:
        return bytes(extension.rans_decode(stored, list(shapes), raw_bytes, cores.threads()))
    try:
        return bytes(rans_decoder.decode(stored, shapes))
    except (IndexError, OverflowError, TypeError) as error:
        raise ValueError(f"the rANS payload is corrupt: {error}") from error


def _extra(codec: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        hint = "pip install 'pgolf-fast[codecs]'"
        raise PgolfError(f"the codec {codec} needs the package {package}: {hint}") from error


def _encode_zstd(data: bytes, shapes: Sequence[Shape], preset: int) -> bytes:
    zstandard = _extra("zstd", "zstandard")
    sizes = {"source_size": len(data), "window_log": _window_log(len(data))}
    parameters = zstandard.ZstdCompressionParameters.from_level(22, **sizes, enable_ldm=True)
    return bytes(zstandard.ZstdCompressor(compression_params=parameters).compress(data))


def _window_log(size: int) -> int:
    """Return the log2 of a window that holds `size` bytes; decoders accept 10..27 by default."""
    return min(max(10, (size - 1).bit_length()), 27)


def _decode_zstd(stored: bytes, raw_bytes: int, shapes: Sequence[Shape]) -> bytes:
    zstandard = _extra("zstd", "zstandard")
    stream = zstandard.ZstdDecompressor(max_window_size=1 << _window_log(raw_bytes)).decompressobj()
    out = bytearray()
    try:
        for start in range(0, len(stored), _ZSTD_STEP):
            if stream.eof:
                raise ValueError("bytes follow the end of the zstd frame")
            out += stream.decompress(stored[start : start + _ZSTD_STEP])
            if len(out) > raw_bytes:
                raise ValueError(f"the zstd frame holds more than the stated {raw_bytes} bytes")
    except zstandard.ZstdError as error:
        raise ValueError(f"the zstd frame is corrupt: {error}") from error
    if not stream.eof or stream.unused_data:
        where = "bytes follow the end of the zstd frame" if stream.eof else "the zstd frame is truncated"
        raise ValueError(where)
    return bytes(out)


def _encode_brotli(data: bytes, shapes: Sequence[Shape], preset: int) -> bytes:
    return bytes(_extra("brotli", "brotli").compress(data, quality=11, lgwin=24))


def _decode_brotli(stored: bytes, raw_bytes: int, shapes: Sequence[Shape]) -> bytes:
    brotli = _extra("brotli", "brotli")
    stream, out, left = brotli.Decompressor(), bytearray(), stored
    try:
        while not stream.is_finished() and len(out) <= raw_bytes:
            more = stream.process(left, output_buffer_limit=raw_bytes + 1 - len(out))
            if not more and not left:
                raise ValueError("the brotli stream is truncated")
            out += more
            left = b""
    except brotli.error as error:
        raise ValueError(f"the brotli stream is corrupt: {error}") from error
    return bytes(out)


_Encoder = Callable[[bytes, Sequence[Shape], int], bytes]  # data, shapes, LZMA's preset
_Decoder = Callable[[bytes, int, Sequence[Shape]], bytes]  # stored bytes, their number when decoded, shapes
_CODERS: dict[str, tuple[_Encoder, _Decoder]] = {
    "raw": (lambda data, shapes, preset: data, lambda stored, raw_bytes, shapes: stored),
    "lzma": (
        lambda data, shapes, preset: compress_bytes(data, preset),
        lambda stored, raw_bytes, shapes: decompress_bytes(stored, raw_bytes),
    ),
    "rans": (_encode_rans, _decode_rans),
    "zstd": (_encode_zstd, _decode_zstd),
    "brotli": (_encode_brotli, _decode_brotli),
}
