"""Measurements of `bench_artifact.py`: contenders on one artifact, and the steps of the export pipeline.

`python artifact_worker.py NAME FOLDER` makes one measurement in a separate process and prints a JSON line.
A contender that is not installed is skipped with the reason. Every result is decoded and compared. Each
step of the pipeline works on the files that the step before it left in FOLDER, at first config.json.
"""

import bz2
import contextlib
import dataclasses
import importlib
import json
import lzma
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from synthetic_artifact import (
    CODES,
    REFERENCE,
    read_artifact,
    read_config,
    synthetic_fishers,
    synthetic_hessians,
    synthetic_weights,
    write_artifact,
)

from pgolf_fast.artifact import codecs, rans_decoder
from pgolf_fast.artifact.container import read_container, sizes, write_container
from pgolf_fast.artifact.fit import fit_to_target
from pgolf_fast.artifact.load import load
from pgolf_fast.artifact.pack import artifact_bytes, build_records, pack, section_codecs
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.schema import PackConfig, RunConfig
from pgolf_fast.ops import native
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import quantize_state

Bytes2Bytes = Callable[[bytes], bytes]
Record = dict[str, Any]
Result = TypeVar("Result")
ZSTD_WINDOW_LOG = 27


class UnavailableError(Exception):
    """A contender is not installed; the message is the reason."""


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"Python package {name} is not installed") from error


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


def _zpaq() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    there = ("add", "packed.zpaq", "plain", "-method", "5", "-noattributes")
    return _program("zpaq", there, ("extract", "packed.zpaq", "-force"), "packed.zpaq")


def _lrzip() -> tuple[Bytes2Bytes, Bytes2Bytes]:
    # Without -T, lrzip finds that LZ4 cannot compress the codes and stores them.
    there = ("-z", "-T", "-L", "9", "-Q", "-f", "-o", "packed.lrz", "plain")
    return _program("lrzip", there, ("-d", "-Q", "-f", "-o", "plain", "packed.lrz"), "packed.lrz")


def _program(
    name: str, there: Sequence[str], back: Sequence[str], packed: str
) -> tuple[Bytes2Bytes, Bytes2Bytes]:
    """Return both directions of a program that works on files; file access is part of the time."""
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


_LC0 = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
_lzma = partial(lzma.compress, preset=9)
# General compressors: the setting, and a function that returns both directions or raises UnavailableError
PEERS: dict[str, tuple[str, Callable[[], tuple[Bytes2Bytes, Bytes2Bytes]]]] = {
    "lzma 9": ("Python's lzma, preset 9: what PR 1501 uses", lambda: (_lzma, lzma.decompress)),
    "lzma 9 lc0": (
        "the same with lc=lp=pb=0",
        lambda: (partial(lzma.compress, filters=_LC0), lzma.decompress),
    ),
    "brotli 11": ("quality 11, window 2^24", _brotli),
    "zstd 22 long": ("level 22, long-distance matching, window 2^27", _zstd_long),
    "zstd 3": ("level 3", _zstd),
    "zlib 9": ("level 9", lambda: (partial(zlib.compress, level=9), zlib.decompress)),
    "bz2 9": ("level 9", lambda: (bz2.compress, bz2.decompress)),
    "zpaq 5": ("zpaq -method 5, its threads", _zpaq),
    "lrzip zpaq": ("lrzip -z -T -L 9, its threads", _lrzip),
}
BASELINE = "lzma 9"
QUICK_SECONDS = 10.0  # a contender this quick on a whole artifact also compresses the codes alone
SLOW_SECONDS, RUNS = 20.0, 3  # best of RUNS, fewer once SLOW_SECONDS are spent
ARTIFACT, PRUNED = "model.pgolf", 0.02  # `prune` removes this share of the bank codes' bytes
TARGET_BITS = 4.3  # bits per bank code that step `land` must meet


def versions() -> dict[str, str]:
    """Return the versions of installed packages and programs; of a program, the first line it prints."""
    found = {}
    for package in ("brotli", "zstandard"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    for program in filter(shutil.which, ("zpaq", "lrzip")):
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
        found[program] = next(iter((done.stdout + done.stderr).splitlines()), "")
    return found


def measure_peer(name: str, folder: Path) -> Record:
    """Measure a general compressor on the layout of PR 1501.

    The baseline, and any contender that is quick enough, also compresses the codes alone, untimed.
    """
    setting, make = PEERS[name]
    encode, decode = make()
    size, times = both_directions(name, encode, decode, (folder / REFERENCE).read_bytes())
    quick = name == BASELINE or times["encode_s"] < QUICK_SECONDS
    alone = {"codes_bytes": len(encode((folder / CODES).read_bytes()))} if quick else {}
    return {"setting": setting, "bytes": size, **alone, **times}


def both_directions(name: str, encode: Bytes2Bytes, decode: Bytes2Bytes, plain: bytes) -> tuple[int, Record]:
    """Return the packed size, and times and memory. Raises RuntimeError if decoding gives other bytes."""
    before = peak_mib()
    packed, encode_s, runs = best_of(lambda: encode(plain))
    again, decode_s, _ = best_of(lambda: decode(packed))
    if again != plain:
        raise RuntimeError(f"{name} gave back other bytes")
    times = {"encode_s": encode_s, "decode_s": decode_s, "runs": runs}
    return len(packed), {**times, "memory_mib": peak_mib() - before}


def measure_container(
    folder: Path, reading: contextlib.AbstractContextManager[object] | None = None
) -> Record:
    """Measure our file as `pgolf pack` writes it, with configuration and checksums."""
    quantized, run = read_artifact(folder)
    records = build_records(quantized)
    codecs = section_codecs(records, PackConfig())
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.pgolf"
        before = peak_mib()
        written, encode_s, runs = best_of(lambda: write_container(path, {"run": run}, records, codecs=codecs))
        with reading or contextlib.nullcontext():
            (_, again), decode_s, _ = best_of(lambda: read_container(path))
        memory, total = peak_mib() - before, path.stat().st_size
    if [(r.name, r.array.tobytes()) for r in again] != [(r.name, r.array.tobytes()) for r in records]:
        raise RuntimeError("the container gave back other tensors")
    return {
        "bytes": total,
        "codes_bytes": next(s.stored_bytes for s in written.sections if s.name == "codes"),
        "encode_s": encode_s,
        "decode_s": decode_s,
        "runs": runs,
        "memory_mib": memory,
        "sections": {s.name: [s.codec, s.stored_bytes] for s in written.sections},
    }


def measure_one_core(folder: Path) -> Record:
    """Measure the container with all threads on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    return measure_container(folder)


def measure_plain_reader(folder: Path) -> Record:
    """Measure the container read without the extension, by NumPy and Python's own modules."""
    none = mock.patch.object(native, "extension", return_value=None)
    return measure_container(folder, reading=none)


def measure_rans(folder: Path, *, numpy: bool = False) -> Record:
    """Measure the entropy coder alone on the bank codes; `numpy` decodes by the reference decoder."""
    shapes = [(*matrix.codes.shape, 1) for matrix in read_artifact(folder)[0].matrices().values()]
    plain = (folder / CODES).read_bytes()

    def decode(packed: bytes) -> bytes:
        if numpy:
            return rans_decoder.decode(packed, shapes)
        return codecs.decode("rans", packed, len(plain), shapes)

    size, times = both_directions("rans", lambda b: codecs.encode("rans", b, shapes), decode, plain)
    return {"codes_bytes": size, **times}


OURS: dict[str, Callable[[Path], Record]] = {
    "container": measure_container,
    "container, 1 core": measure_one_core,
    "container, read in Python": measure_plain_reader,
    "rans, codes only": measure_rans,
    "rans, codes only, numpy": partial(measure_rans, numpy=True),
}


# The export pipeline


def step_gptq(folder: Path, config: RunConfig) -> Record:
    state = synthetic_weights(config)
    hessians = synthetic_hessians(state)
    quantized, seconds = timed(lambda: quantize_state(state, config.quant, hessians))
    write_artifact(folder, quantized, config)
    return {"seconds": seconds, "matrices": len(quantized.matrices())}


def step_pack(folder: Path, config: RunConfig) -> Record:
    quantized, _ = read_artifact(folder)
    free = dataclasses.replace(config.pack, code_bytes=0)
    done, seconds = timed(lambda: pack(quantized, config, folder / ARTIFACT, free))
    return {"seconds": seconds, "bytes": done.total_bytes}


def step_load(folder: Path, config: RunConfig) -> Record:
    loaded, seconds = timed(lambda: load(folder / ARTIFACT, "artifact"))
    return {"seconds": seconds, "parameters": sum(p.numel() for p in loaded.model.parameters())}


def step_prune(folder: Path, config: RunConfig) -> Record:
    """Pack again with a limit that only pruning can meet."""
    quantized, _ = read_artifact(folder)
    now = sizes(folder / ARTIFACT)
    target = now.total_bytes - int(PRUNED * now.sections[0].stored_bytes)
    limit = PackConfig(limit_bytes=target, code_bytes=0)
    done, seconds = timed(lambda: pack(quantized, config, folder / "pruned.pgolf", limit))
    return {
        "seconds": seconds,
        "target_bytes": target,
        "bytes_below": target - done.total_bytes,
        "pruned": done.pruned,
        "candidates": done.candidates,
    }


def step_land(folder: Path, config: RunConfig) -> Record:
    """Fit grid `rd` to a byte target; calibration is not part of it."""
    state = synthetic_weights(config)
    fishers = synthetic_fishers(state)
    grids, factors_s = timed(lambda: RateDistortion(state, fishers, config.quant))
    _, once_s = timed(lambda: grids.quantize(1e-9))
    codes = sum(matrix.codes.numel() for matrix in read_artifact(folder)[0].matrices().values())
    target = int(TARGET_BITS / 8 * codes)
    landed, seconds = timed(
        lambda: fit_to_target(grids, lambda s: artifact_bytes(s, config, PackConfig()), target)
    )
    return {
        "seconds": seconds,
        "bytes": landed.artifact_bytes,
        "target_bytes": target,
        "factors_s": factors_s,
        "one_price_s": once_s,
    }


STEPS: dict[str, Callable[[Path, RunConfig], Record]] = {
    "gptq": step_gptq,
    "pack": step_pack,
    "load": step_load,
    "prune": step_prune,
    "land": step_land,
}


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of a call and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def best_of(call: Callable[[], Result], runs: int = RUNS) -> tuple[Result, float, int]:
    """Return the result, the least seconds and the number of runs, which is smaller for slow calls."""
    times: list[float] = []
    while len(times) < runs and sum(times) < SLOW_SECONDS:
        result, seconds = timed(call)
        times.append(seconds)
    return result, min(times), len(times)


def peak_mib() -> float:
    """Return the peak MiB of this process, or of a program that it started; 0 if unknown."""
    # Not getrusage: its figure for a process starts with the memory of the parent that forked it.
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.is_file() else None
    own = int(peak[1]) / 1024 if peak else 0.0
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def measure(name: str, folder: Path) -> Record:
    """Measure a contender or a step. `peak_mib` of a step includes Python and torch.

    Returns {"skipped": reason} for a missing contender. Raises RuntimeError if data are lost or a program
    fails.
    """
    if name in STEPS:
        found = STEPS[name](folder, run_config_from_dict(read_config(folder)))
        return {**found, "peak_mib": peak_mib()}
    try:
        return OURS[name](folder) if name in OURS else measure_peer(name, folder)
    except UnavailableError as error:
        return {"skipped": str(error)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
