"""rANS: two decoders that agree, forged payloads, and sizes against the entropy."""

import ast
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.artifact import rans_decoder
from pgolf_fast.ops import native

codec = native.extension()
pytestmark = pytest.mark.skipif(codec is None, reason="pgolf_fast._C is not built")
RAW, CODED = 0, 1  # the payload's first byte


def shape_of(array):
    return (int(np.prod(array.shape[:-1])), array.shape[-1], array.itemsize)


def encode(arrays, threads=0):
    """Return payload, data and shapes."""
    data, shapes = b"".join(a.tobytes() for a in arrays), [shape_of(a) for a in arrays]
    return codec.rans_encode(data, shapes, threads), data, shapes


def size_of(arrays):
    """Return the payload's size after a round trip through both decoders."""
    payload, data, shapes = encode(arrays)
    assert codec.rans_decode(payload, shapes, len(data)) == data
    assert rans_decoder.decode(payload, shapes) == data
    assert len(payload) <= len(data) + 1
    return len(payload)


def normal_codes(rows, columns, row_spread=0.0, column_spread=0.0, sigma=4.83, seed=0):
    """Return int8 codes -31..31 of scale sigma times log-normal row and column factors, and the bits they
    need if the factors are known: the sum of -log2 p(code | its scale)."""
    random = np.random.default_rng(seed)
    scale = (
        np.exp(random.normal(0, row_spread, (rows, 1)) + random.normal(0, column_spread, (1, columns)))
        * sigma
    )
    codes = (random.standard_normal((rows, columns)) * scale).round().clip(-31, 31)
    low, high = np.abs(codes) - 0.5, np.where(np.abs(codes) == 31, np.inf, np.abs(codes) + 0.5)
    tail = [torch.special.log_ndtr(torch.from_numpy(-edge / scale)).exp().numpy() for edge in (low, high)]
    return codes.astype(np.int8), -np.log2(tail[0] - tail[1]).sum()


def entropy(array):
    """Return the order-0 entropy in bytes."""
    counts = np.unique(array.reshape(-1), return_counts=True)[1]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


RANDOM = np.random.default_rng(7)
SECTIONS = {
    "one byte": [np.array([[-128]], np.int8)],
    "two bytes": [np.array([[5, 6]], np.uint8)],
    "all equal": [np.full((33, 7), 31, np.int8), np.full((3, 5), -2, np.int64)],
    "nearly equal": [np.eye(50, dtype=np.int8)],
    "every byte": [np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(5, 0)],
    "noise": [RANDOM.integers(0, 256, (99, 101), np.uint8)],
    "gaps": [RANDOM.choice([-128, -31, -30, 0, 7, 127], (40, 41)).astype(np.int8)],
    "some empty": [np.zeros((0, 4), np.int8), normal_codes(9, 9)[0], np.zeros((4, 0), np.float16)],
    "halves": [
        RANDOM.normal(0, 1, (5, 300)).astype(np.float16),
        RANDOM.normal(0, 1, (1, 7)).astype(np.float16),
    ],
    "few halves": [RANDOM.choice([0.5, 0.03125, 1e-3], (1, 999)).astype(np.float16)],
    "floats": [
        RANDOM.normal(0, 1, (3, 100)).astype(np.float32),
        RANDOM.choice([1.5, -2.0], (60, 9)).astype("<f4"),
    ],
    "integers": [RANDOM.integers(-(2**62), 2**62, (2, 50)), np.arange(400).reshape(20, 20)],
    "rows": [normal_codes(64, 256, 0.8)[0], normal_codes(32, 64, 0.5)[0]],
    "columns": [normal_codes(300, 40, 0, 0.8)[0]],
    "rows and columns": [normal_codes(200, 190, 0.5, 0.5)[0], normal_codes(64, 64)[0]],
    "wide scales": [
        normal_codes(120, 100, 3.0, 3.0)[0],
        np.zeros((20, 20), np.int8),
        normal_codes(100, 99, 2.5)[0],
    ],
}


@pytest.mark.parametrize("section", SECTIONS)
def test_round_trip_through_both_decoders(section):
    size_of(SECTIONS[section])


def test_sections_reach_every_model():
    """Check that SECTIONS covers classes of rows, of columns and of both."""
    seen = set()
    for name in ("rows", "columns", "rows and columns"):
        (array, *_) = SECTIONS[name]
        payload, _, _ = encode([array])
        number = rans_decoder.numbers(payload[5:]).__next__
        assert (number(), number()) == (0, 0)  # no palettes
        for _ in range(number()):
            rans_decoder.read_model(number)
            number()
        number()  # the model of the middle class
        seen.add((number() > 0, number() > 0))
    assert seen == {(True, False), (False, True), (True, True)}


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from([np.int8, np.uint8, np.int16, np.float32, np.int64]))
    rows, columns = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = draw(st.integers(0, 8 * np.dtype(dtype).itemsize))
    spread = np.exp(random.normal(0, draw(st.sampled_from([0.0, 1.0])), (rows, 1)))
    values = random.normal(0, 1, (rows, columns)) * spread * 2.0**bits
    return values.clip(-(2.0**62), 2.0**62).astype(np.int64).astype(dtype)


@given(st.lists(arrays(), max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_section(section):
    size_of(section)


def test_segments_and_threads():
    """Above 1 MB symbols are cut into segments; the bytes do not depend on the number of threads."""
    section = [normal_codes(1600, 1200)[0], RANDOM.normal(0, 1, (1, 2000)).astype(np.float16)]
    assert size_of(section) > 1_000_000
    payload, data, shapes = encode(section, threads=1)
    assert payload == encode(section, threads=3)[0]
    assert codec.rans_decode(payload, shapes, len(data), threads=3) == data


def test_close_to_the_entropy():
    codes, bits = normal_codes(400, 512)
    assert entropy(codes) < size_of([codes]) < 1.002 * entropy(codes)
    assert size_of([codes]) < 1.003 * bits / 8


@pytest.mark.parametrize(("row_spread", "column_spread"), [(0.25, 0), (0, 0.25), (0.25, 0.25)])
def test_classes_cost_less_than_they_save(row_spread, column_spread):
    """Sizes are far below order-0 entropy and close to the entropy under known scales."""
    codes, bits = normal_codes(640, 512, row_spread, column_spread)
    assert size_of([codes]) < 0.99 * entropy(codes)
    assert size_of([codes]) < 1.007 * bits / 8


def test_models_are_shared_and_absent_symbols_are_free():
    alike = [normal_codes(64, 128, seed=i)[0] for i in range(12)]
    assert size_of(alike) < sum(size_of([a]) for a in alike) - 11 * 30
    even = (normal_codes(256, 256)[0] // 2) * 2
    assert size_of([even]) < 1.004 * entropy(even) + 60


def test_planes_and_palettes():
    few = np.random.default_rng(0).choice(np.linspace(0.01, 0.03, 40), (1, 9000)).astype(np.float16)
    assert size_of([few]) < 1.01 * entropy(few) + 150
    assert size_of([np.full((1, 40_000), 1 / 31, np.float16)]) < 40
    many = np.linspace(0.01, 0.03, 9000).astype(np.float16)[None]
    assert size_of([many]) < 1.02 * entropy(many)


def test_incompressible_data_costs_one_byte():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    payload, data, _ = encode([noise])
    assert payload == bytes([RAW]) + data
    assert encode([]) == (b"", b"", [])
    assert encode([np.zeros((3, 0), np.int8)])[0] == b""


def outcome(decode, payload, *rest):
    try:
        return decode(payload, *rest)
    except (ValueError, IndexError, OverflowError, TypeError):
        return None


@pytest.mark.parametrize("section", ["rows and columns", "few halves", "halves", "gaps", "two bytes"])
def test_damage_is_rejected_or_harmless(section):
    """Change every byte and try every length: no crash, and never more bytes than stated."""
    section = [array[:40, :130] for array in SECTIONS[section]]
    payload, data, shapes = encode(section)
    random = np.random.default_rng(0)
    cut = [payload[:n] for n in range(len(payload))] + [payload + b"\0"]
    changes = product(range(len(payload)), (1, 128, int(random.integers(2, 128))))
    changed = [payload[:at] + bytes([payload[at] ^ by]) + payload[at + 1 :] for at, by in changes]
    assert all(outcome(codec.rans_decode, some, shapes, len(data)) is None for some in cut)
    for some in changed:
        decoded = outcome(codec.rans_decode, some, shapes, len(data))
        assert decoded is None or len(decoded) == len(data)
    for some in random.choice(np.array(cut + changed, object), 100):
        decoded = outcome(rans_decoder.decode, some, shapes)
        assert decoded is None or len(decoded) == len(data) or some[:1] != bytes([CODED])


def gamma(*numbers):
    """Return the numbers as the bits of a header."""
    return "".join(bin(n + 1)[2:].rjust(2 * (n + 1).bit_length() - 1, "0") for n in numbers)


MODEL = (0, 0, 0, 0)  # one symbol, byte 128
FORGED = {
    "valid": (gamma(0, 0, 1, *MODEL, 0, 0, 0, 0, 0, 0, 8, 0, 0), b"", None),
    "257 models": (gamma(0, 0, 1, *MODEL, 256, 0, 0, 0, 0, 0, 8, 0, 0), b"", "more than 256 models"),
    "one run of models too many": (
        gamma(0, 0, 257, *(*MODEL, 0) * 257, 0, 0, 0, 0, 0, 8, 0, 0),
        b"",
        "more than 256 models",
    ),
    "a level below 0": (gamma(0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 8, 0, 0), b"", "level is not 0"),
    # the model has byte 255 only, so both rows of the matrix, of model 0, are of class -1
    "a class below 0": (
        gamma(0, 0, 1, 0, 127, 0, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0),
        b"",
        "a model that does not exist",
    ),
    "bytes left over": (gamma(0, 0, 1, *MODEL, 0, 0, 0, 0, 0, 0, 8, 0, 0), b"?", "left over at its end"),
    "another kind": (gamma(0, 0, 1, *MODEL, 0, 0, 0, 0, 0, 0, 8, 0, 0), b"", "kind is 2"),
}


@pytest.mark.parametrize("name", FORGED)
def test_both_decoders_reject_forged_payloads(name):
    """Forge two rows of four bytes, in lanes that hold only their final states."""
    bits, after, message = FORGED[name]
    header = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    kind = bytes([2 if name == "another kind" else CODED])
    ends = 2 * (1 << 16).to_bytes(4, "little")  # of the classes' lane and of the symbols'
    payload = kind + len(header).to_bytes(4, "little") + header + ends + after
    if message is None:
        assert codec.rans_decode(payload, [(2, 4, 1)], 8) == bytes([128]) * 8
        assert rans_decoder.decode(payload, [(2, 4, 1)]) == bytes([128]) * 8
        return
    with pytest.raises(ValueError, match=message):
        codec.rans_decode(payload, [(2, 4, 1)], 8)
    with pytest.raises((ValueError, IndexError)):
        rans_decoder.decode(payload, [(2, 4, 1)])


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="RLIMIT_AS needs Linux")
def test_runs_when_no_more_threads_can_start():
    program = """
import resource
from pgolf_fast import _C
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_STACK, (8 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)
data, shapes = bytes(range(256)) * 100, [(16, 16, 1)] * 100
assert _C.rans_decode(_C.rans_encode(data, shapes, 100), shapes, len(data), 100) == data
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_errors_say_what_is_wrong():
    payload, data, shapes = encode([normal_codes(30, 30)[0]])
    assert payload[0] == CODED
    cases = {
        b"": "0 bytes for 900",
        payload[:3]: "within its first 5 bytes",
        payload[:12]: "header is longer",
        payload[:-2]: "longer than the payload",
        payload + b"x": "left over at its end",
        b"\2" + payload[1:]: "kind is 2",
        payload[:-4] + bytes(4): "corrupt",
        b"\0" + data + b"?": "902 bytes for 900",
    }
    for some, message in cases.items():
        with pytest.raises(ValueError, match=message):
            codec.rans_decode(some, shapes, len(data))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 3, 1)], "exceeds the 4 bytes"),
        ([(1, 3, 1)], "hold 3 bytes, but there are 4"),
        ([(1, 1, 3)], "item size other than 1, 2, 4 or 8"),
        ([(2**63, 2**63, 8)], "exceeds"),
    ],
)
def test_shapes_must_fit(shapes, message):
    for run in (lambda: codec.rans_encode(b"abcd", shapes), lambda: codec.rans_decode(b"\0abcd", shapes, 4)):
        with pytest.raises(ValueError, match=message):
            run()


def test_reference_decoder_is_small_and_alone():
    """Submissions embed it: at most 60 lines of code, numpy and the standard library only."""
    source = Path(rans_decoder.__file__).read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert imported == {"io", "math", "numpy"}
    lines = source.splitlines()[tree.body[0].end_lineno :]
    assert sum(bool(line.strip()) for line in lines) <= 60
