"""Section codecs: round trips, damage is rejected, and missing packages are named."""

import contextlib
import sys
import tracemalloc
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.artifact import codecs
from pgolf_fast.artifact.codecs import CODECS, PROBE_FROM, PROBE_PRESET, decode, encode, smallest
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import native

EXTRAS = {"zstd": "zstandard", "brotli": "brotli"}
BUILT = native.extension() is not None
needs_extension = pytest.mark.skipif(not BUILT, reason="pgolf_fast._C is not built")


@pytest.fixture(params=CODECS)
def codec(request):
    if request.param == "rans" and not BUILT:
        pytest.skip("rANS encoding needs pgolf_fast._C")
    if request.param in EXTRAS:
        pytest.importorskip(EXTRAS[request.param])
    return request.param


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: None)


def codes(rows=64, columns=48, sigma=5.0, seed=0):
    values = np.random.default_rng(seed).normal(0, sigma, (rows, columns)).round().clip(-31, 31)
    return values.astype(np.int8).tobytes(), [(rows, columns, 1)]


SECTIONS = {
    "empty": (b"", []),
    "no elements": (b"", [(0, 5, 1), (3, 0, 8)]),
    "one byte": (b"\x80", [(1, 1, 1)]),
    "all equal": (b"\x07" * 5000, [(50, 100, 1)]),
    "codes": codes(),
    "noise": (np.random.default_rng(1).bytes(4096), [(64, 64, 1)]),
    "halves": (np.arange(999, dtype="<f2").tobytes(), [(999, 1, 2)]),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_round_trip(codec, section):
    data, shapes = SECTIONS[section]
    stored = encode(codec, data, shapes)
    assert decode(codec, stored, len(data), shapes) == data
    assert len(stored) <= len(data) + {"raw": 0, "rans": 1}.get(codec, 200)


@given(st.binary(max_size=300))
@settings(max_examples=40, deadline=None)
def test_any_bytes(data):
    shapes = [(1, len(data), 1)]
    missing = {name for name, package in EXTRAS.items() if find_spec(package) is None}
    for name in CODECS:
        if name not in missing and (name != "rans" or BUILT):
            assert decode(name, encode(name, data, shapes), len(data), shapes) == data


@pytest.mark.parametrize("stated", [0, 1, 3071, 3073, 100_000])
def test_another_size_is_rejected(codec, stated):
    data, shapes = codes()
    with pytest.raises(ValueError, match=r"."):
        decode(codec, encode(codec, data, shapes), stated, [(1, stated, 1)])


@pytest.mark.parametrize(
    "damage", [lambda s: s[:-1], lambda s: s[: len(s) // 2], lambda s: b"", lambda s: s + b"x"]
)
def test_cut_and_grown_bytes_are_rejected(codec, damage):
    data, shapes = codes()
    with pytest.raises(ValueError, match=r"."):
        decode(codec, damage(encode(codec, data, shapes)), len(data), shapes)


def test_flipped_bits_raise_only_value_errors(codec):
    data, shapes = codes(8, 16)
    stored = encode(codec, data, shapes)
    for at, bit in product(range(len(stored)), range(8)):
        damaged = stored[:at] + bytes([stored[at] ^ 1 << bit]) + stored[at + 1 :]
        with contextlib.suppress(ValueError):
            assert len(decode(codec, damaged, len(data), shapes)) == len(data)


def test_a_bomb_is_not_decompressed(codec):
    """32 MiB of zeros in a few bytes, stated as 100: rejected before much of it is decompressed."""
    if codec == "raw":
        pytest.skip("raw bytes cannot expand")
    size = 32 << 20
    if codec == "zstd":  # at its usual level this would take seconds
        stored = pytest.importorskip("zstandard").compress(bytes(size), 3)
    elif codec == "brotli":
        stored = pytest.importorskip("brotli").compress(bytes(size), quality=2, lgwin=24)
    else:
        stored = encode(codec, bytes(size), [(1, size, 1)], 1)
    assert len(stored) < 50_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"."):
        decode(codec, stored, 100, [(1, 100, 1)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize("name", ["encode", "decode"])
def test_unknown_codec_and_wrong_shapes(name):
    run = {
        "encode": lambda codec, shapes: encode(codec, b"abcd", shapes),
        "decode": lambda codec, shapes: decode(codec, b"abcd", 4, shapes),
    }[name]
    with pytest.raises(PgolfError, match="codec is 'zip', but must be one of raw, lzma"):
        run("zip", [(2, 2, 1)])
    for shapes in ([(2, 3, 1)], [], [(2, 1, 3)], [(-2, -2, 1)]):
        with pytest.raises(ValueError, match="shape"):
            run("raw", shapes)


@pytest.mark.parametrize("name", EXTRAS)
def test_missing_extra_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, EXTRAS[name], None)
    for run in (lambda: encode(name, b"abc", [(1, 3, 1)]), lambda: decode(name, b"abc", 3, [(1, 3, 1)])):
        with pytest.raises(PgolfError, match=rf"{EXTRAS[name]}: pip install 'pgolf-fast\[codecs\]'"):
            run()


@needs_extension
def test_smallest_takes_the_smallest():
    data, shapes = codes(256, 256)
    sizes = {name: len(encode(name, data, shapes)) for name in ("lzma", "rans")}
    assert sizes["rans"] < sizes["lzma"] < len(data)
    assert smallest(data, shapes) == ("rans", encode("rans", data, shapes))
    assert smallest(data, shapes, ("lzma", "raw"))[0] == "lzma"
    text = b"the same words again and again, " * 100  # LZMA finds repetitions, rANS does not
    assert smallest(text, [(1, len(text), 1)])[0] == "lzma"


def test_full_lzma_runs_only_if_the_probe_is_close(monkeypatch):
    random = np.random.default_rng(2)
    noise = random.normal(0, 8, 2 * PROBE_FROM).round().clip(-127, 127).astype(np.int8).tobytes()
    text = b"the same words again and again, " * (PROBE_FROM // 8)
    presets = []
    original = codecs.compress_bytes

    def watched(data, preset=9):
        presets.append(preset)
        return original(data, preset=preset)

    monkeypatch.setattr(codecs, "compress_bytes", watched)
    assert smallest(noise, [(256, len(noise) // 256, 1)])[0] == "rans"
    assert presets == [PROBE_PRESET]
    assert smallest(text, [(1, len(text), 1)])[0] == "lzma"
    assert presets == [PROBE_PRESET, PROBE_PRESET, 9]
    assert smallest(noise[:PROBE_FROM], [(1, PROBE_FROM, 1)])[0] == "rans"
    assert presets[3:] == [9]


def test_smallest_stores_incompressible_data_raw():
    data, shapes = SECTIONS["noise"]
    assert smallest(data, shapes) == ("raw", data)
    assert smallest(b"", []) == ("raw", b"")


def test_smallest_passes_settings_on():
    data, shapes = codes()
    name, stored = smallest(data, shapes, ("lzma",), preset=0)
    assert (name, stored) == ("lzma", encode("lzma", data, shapes, preset=0))
    assert len(stored) > len(encode("lzma", data, shapes, preset=9))


@needs_extension
def test_without_extension(no_extension, monkeypatch):
    data, shapes = codes()
    with pytest.raises(PgolfError, match="needs the C\\+\\+ extension"):
        encode("rans", data, shapes)
    assert smallest(data, shapes)[0] == "lzma"
    assert smallest(data, shapes, ("rans",))[0] == "lzma"
    monkeypatch.undo()
    stored = encode("rans", data, shapes)
    monkeypatch.setattr(native, "extension", lambda: None)
    assert decode("rans", stored, len(data), shapes) == data
    for damaged in (stored[:-1], stored[:20], stored[:1], b"\0" + stored):
        with pytest.raises(ValueError, match=r"."):
            decode("rans", damaged, len(data), shapes)
