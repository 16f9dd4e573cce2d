"""General compressors and our container on one artifact: bytes, seconds there and back, memory.

`python artifact_codecs.py CONTENDER FOLDER` measures one in a process of its own and prints a line of JSON.
What this machine lacks is skipped with the reason. Every result is decoded and compared.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

from artifact_files import CODES, REFERENCE, best_of, peak_mib, read_artifact

Bytes2Bytes = Callable[[bytes], bytes]
Found = dict[str, Any]
ZSTD_WINDOW_LOG = 27


class UnavailableError(Exception):
    """A contender that this machine lacks: the reason in one line."""


@dataclass(frozen=True)
class Peer:
    """A general compressor. `make` imports or finds it and gives its two directions, or UnavailableError."""

    setting: str
    make: Callable[[], tuple[Bytes2Bytes, Bytes2Bytes]]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"Python package {name} is not installed") from error


def _lzma() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    lzma = _module("lzma")
    return (lambda b: lzma.compress(b, preset=9)), lzma.decompress


def _lzma_lc0() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    lzma = _module("lzma")
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
    return (lambda b: lzma.compress(b, filters=filters)), lzma.decompress


def _brotli() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    brotli = _module("brotli")
    return (lambda b: brotli.compress(b, quality=11, lgwin=24)), brotli.decompress


def _zstd_long() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    zstd = _module("zstandard")
    settings = zstd.ZstdCompressionParameters.from_level(22, window_log=ZSTD_WINDOW_LOG, enable_ldm=True)
    back = zstd.ZstdDecompressor(max_window_size=1 << ZSTD_WINDOW_LOG)
    return zstd.ZstdCompressor(compression_params=settings).compress, back.decompress


def _zstd() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    zstd = _module("zstandard")
    return zstd.ZstdCompressor(level=3).compress, zstd.ZstdDecompressor().decompress


def _zlib() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    zlib = _module("zlib")
    return (lambda b: zlib.compress(b, 9)), zlib.decompress


def _bz2() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    bz2 = _module("bz2")
    return (lambda b: bz2.compress(b, 9)), bz2.decompress


def _zpaq() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    there = ("add", "packed.zpaq", "plain", "-method", "5", "-noattributes")
    return _program("zpaq", there, ("extract", "packed.zpaq", "-force"), "packed.zpaq")


def _lrzip() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    # -T: without it, lrzip finds codes incompressible by LZ4 and stores them as they are
    there = ("-z", "-T", "-L", "9", "-Q", "-f", "-o", "packed.lrz", "plain")
    return _program("lrzip", there, ("-d", "-Q", "-f", "-o", "plain", "packed.lrz"), "packed.lrz")


def _program(
    name: str, there: Sequence[str], back: Sequence[str], packed: str
) -> tuple[Bytes2Bytes, Bytes2Bytes]:
    """A program that makes the file `packed` of the file `plain`, and back; file access is timed too."""
    path = shutil.which(name)
    if path is None:
        raise UnavailableError(f"program {name} is not installed")

    def run(words: Sequence[str], source: str, made: str, content: bytes) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / source).write_bytes(content)
            done = subprocess.run([path, *words], cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name} failed: {(done.stderr or done.stdout).strip()[-300:]}")
            return (Path(folder) / made).read_bytes()

    return (lambda b: run(there, "plain", packed, b)), (lambda b: run(back, packed, "plain", b))


PEERS: dict[str, Peer] = {
    "lzma 9": Peer("Python's lzma, preset 9: what PR 1501 uses", _lzma),
    "lzma 9 lc0": Peer("the same with lc=lp=pb=0", _lzma_lc0),
    "brotli 11": Peer("quality 11, window 2^24", _brotli),
    "zstd 22 long": Peer("level 22, long-distance matching, window 2^27", _zstd_long),
    "zstd 3": Peer("level 3", _zstd),
    "zlib 9": Peer("level 9", _zlib),
    "bz2 9": Peer("level 9", _bz2),
    "zpaq 5": Peer("zpaq -method 5, its threads", _zpaq),
    "lrzip zpaq": Peer("lrzip -z -T -L 9, its threads", _lrzip),
}
BASELINE = "lzma 9"
QUICK_SECONDS = 10.0  # of a whole artifact


def versions() -> dict[str, str]:
    """Of packages and programs that are here and no part of Python; the first line that a program says."""
    found = {}
    for package in ("brotli", "zstandard"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    for program in filter(shutil.which, ("zpaq", "lrzip")):
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        found[program] = next(iter((done.stdout + done.stderr).splitlines()), "")
    return found


def measure_peer(name: str, folder: Path) -> Found:
    """A general compressor on the reference's layout.

    Codes alone are compressed once more, untimed: by the baseline, and by whoever is quick enough for that.
    """
    encode, decode = PEERS[name].make()
    plain = (folder / REFERENCE).read_bytes()
    before = peak_mib()
    packed, encode_s, runs = best_of(lambda: encode(plain))
    again, decode_s, _ = best_of(lambda: decode(packed))
    if again != plain:
        raise RuntimeError(f"{name} gave back other bytes")
    memory = peak_mib() - before
    codes = (folder / CODES).read_bytes()
    alone = {"codes_bytes": len(encode(codes))} if name == BASELINE or encode_s < QUICK_SECONDS else {}
    return {
        "setting": PEERS[name].setting,
        "bytes": len(packed),
        **alone,
        "encode_s": encode_s,
        "decode_s": decode_s,
        "runs": runs,
        "memory_mib": memory,
    }


def measure_container(
    folder: Path, reading: contextlib.AbstractContextManager[object] | None = None
) -> Found:
    """Our file, configuration and checksums too, as `pgolf pack` writes it."""
    from pgolf_fast.artifact.container import read_container
    from pgolf_fast.artifact.pack import build_records, section_codecs
    from pgolf_fast.artifact.writer import write_container
    from pgolf_fast.config.schema import PackConfig

    quantized, run = read_artifact(folder)
    records = build_records(quantized)
    codecs = section_codecs(records, PackConfig())
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.pgolf"
        before = peak_mib()
        sizes, encode_s, runs = best_of(lambda: write_container(path, {"run": run}, records, codecs=codecs))
        with reading or contextlib.nullcontext():
            (_, again), decode_s, _ = best_of(lambda: read_container(path))
        memory, total = peak_mib() - before, path.stat().st_size
    if [(r.name, r.array.tobytes()) for r in again] != [(r.name, r.array.tobytes()) for r in records]:
        raise RuntimeError("the container gave back other tensors")
    return {
        "bytes": total,
        "codes_bytes": next(s.stored_bytes for s in sizes.sections if s.name == "codes"),
        "encode_s": encode_s,
        "decode_s": decode_s,
        "runs": runs,
        "memory_mib": memory,
        "sections": {s.name: [s.codec, s.stored_bytes] for s in sizes.sections},
    }


def measure_one_core(folder: Path) -> Found:
    """The container again, with one core for all threads."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return measure_container(folder)


def measure_plain_reader(folder: Path) -> Found:
    """The container again, read without the extension: NumPy and Python's own modules."""
    from pgolf_fast.ops import native

    none = mock.patch.object(native, "extension", return_value=None)
    return measure_container(folder, reading=none)


def measure_rans(folder: Path) -> Found:
    """The entropy coder alone on the bank codes alone."""
    from pgolf_fast.artifact import codecs

    shapes = [(*matrix.codes.shape, 1) for matrix in read_artifact(folder)[0].matrices().values()]
    plain = (folder / CODES).read_bytes()
    before = peak_mib()
    packed, encode_s, runs = best_of(lambda: codecs.encode("rans", plain, shapes))
    again, decode_s, _ = best_of(lambda: codecs.decode("rans", packed, len(plain), shapes))
    if again != plain:
        raise RuntimeError("rans gave back other codes")
    return {
        "codes_bytes": len(packed),
        "encode_s": encode_s,
        "decode_s": decode_s,
        "runs": runs,
        "memory_mib": peak_mib() - before,
    }


OURS: dict[str, Callable[[Path], Found]] = {
    "container": measure_container,
    "container, 1 core": measure_one_core,
    "container, read in Python": measure_plain_reader,
    "rans, codes only": measure_rans,
}
CONTENDERS = (*PEERS, *OURS)


def measure(name: str, folder: Path) -> Found:
    """What was found, or {"skipped": reason}. Raises RuntimeError where data are lost or a program fails."""
    try:
        return OURS[name](folder) if name in OURS else measure_peer(name, folder)
    except UnavailableError as error:
        return {"skipped": str(error)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
