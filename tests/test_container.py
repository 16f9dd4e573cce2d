"""The artifact container: what goes in comes out, and no damaged or forged file gets through."""

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf_fast.artifact import container
from pgolf_fast.artifact.container import (
    DTYPES,
    SECTIONS,
    TensorRecord,
    read_container,
    sizes,
    write_container,
)
from pgolf_fast.errors import PgolfError

CONFIG = {"dim": 64, "name": "tiny, ünïcode", "rates": [0.1, 1e-30], "nested": {"on": True, "off": None}}
PREFIX = 28


def example_tensors():
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 8, (2, 48, 64)).round(), -32, 31).astype(np.int8)
    return [
        TensorRecord.of("mlp_up_bank", "codes", codes),
        TensorRecord.of("mlp_up_bank.scale", "scales", rng.random((2, 48)).astype(np.float16)),
        TensorRecord.of("tok_emb.weight", "float16", rng.random((50, 8)).astype(np.float16), "embeddings"),
        TensorRecord.of("bigram", "codes", codes[0, :5].copy()),
        TensorRecord.of("gain", "float32", rng.random(100).astype(np.float32)),
        TensorRecord.of("step", "integer", np.array(7, dtype=np.int64)),
        TensorRecord.of("empty", "float32", np.zeros((0, 3), dtype=np.float32)),
    ]


def assert_same(got, want):
    assert [(r.name, r.kind, r.dtype, r.shape, r.section) for r in got] == [
        (r.name, r.kind, r.dtype, r.shape, r.section) for r in want
    ]
    for a, b in zip(got, want, strict=True):
        assert a.array.dtype == b.array.dtype
        assert a.array.tobytes() == b.array.tobytes()


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.pgolf"
    return path, write_container(path, CONFIG, example_tensors())


def section_ranges(summary):
    """(name, first byte, byte after the last) of everything in the file."""
    yield "header", PREFIX, summary.header_bytes
    offset = summary.header_bytes
    for section in summary.sections:
        yield section.name, offset, offset + section.stored_bytes
        offset += section.stored_bytes


def forge(change, config=CONFIG):
    """A container in memory whose header says what `change` makes of it, with right checksums."""
    tree = {
        "config": config,
        "sections": [{"name": "codes", "codec": "raw", "raw_bytes": 6, "stored_bytes": 6, "crc32": 0}],
        "tensors": [
            {
                "name": "w",
                "kind": "codes",
                "dtype": "int8",
                "shape": [2, 3],
                "section": "codes",
                "offset": 0,
                "nbytes": 6,
            }
        ],
    }
    body = bytes(range(6))
    tree["sections"][0]["crc32"] = zlib.crc32(body)
    change(tree)
    return wrap(json.dumps(tree).encode()) + body


def wrap(header, *, version=1, codec=0, stored=None, raw=None):
    stored = len(header) if stored is None else stored
    prefix = struct.pack("<8sIIII", b"PGOLFART", version, codec, stored, len(header) if raw is None else raw)
    return prefix + struct.pack("<I", zlib.crc32(prefix + header)) + header


def test_round_trip(written):
    path, summary = written
    config, records = read_container(path)
    assert config == CONFIG
    assert_same(records, example_tensors())
    assert all(record.array.flags.writeable for record in records)
    assert_same(read_container(path.read_bytes())[1], records)
    assert sizes(path) == summary
    assert summary.total_bytes == path.stat().st_size
    assert [section.name for section in summary.sections] == list(SECTIONS)


def test_same_input_same_bytes(written, tmp_path):
    path, _ = written
    write_container(tmp_path / "again", dict(reversed(CONFIG.items())), example_tensors())
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_strided_and_big_endian_arrays(tmp_path):
    codes = np.arange(24, dtype=np.int8).reshape(4, 6).T
    scales = np.arange(5).astype(">f2")
    records = [TensorRecord.of("a", "codes", codes), TensorRecord.of("b", "scales", scales)]
    write_container(tmp_path / "x", {}, records)
    _, (a, b) = read_container(tmp_path / "x")
    assert np.array_equal(a.array, codes)
    assert np.array_equal(b.array, scales)


def test_no_tensors(tmp_path):
    assert write_container(tmp_path / "x", {}, []).sections == ()
    assert read_container(tmp_path / "x") == ({}, [])


def test_codes_are_stored_small(tmp_path):
    """One byte per 6-bit weight must come out near its entropy: 5 bits for this normal distribution."""
    codes = np.clip(np.random.default_rng(0).normal(0, 8, (512, 512)).round(), -32, 31).astype(np.int8)
    summary = write_container(tmp_path / "x", {}, [TensorRecord.of("w", "codes", codes)])
    assert summary.total_bytes * 8 / codes.size < 5.3


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def tensor_records(draw):
    kind = draw(st.sampled_from(sorted(DTYPES)))
    dtype = draw(st.sampled_from(DTYPES[kind]))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
    section = draw(st.sampled_from([None, *SECTIONS]))
    return TensorRecord.of(
        draw(st.text(st.characters(exclude_categories=["Cs"]), min_size=1)), kind, array, section
    )


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), json_values, max_size=4),
    st.lists(tensor_records(), max_size=5, unique_by=lambda record: record.name),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_of_anything(tmp_path_factory, config, records):
    path = tmp_path_factory.mktemp("any") / "x"
    summary = write_container(path, config, records, preset=1)
    got_config, got = read_container(path)
    assert got_config == config
    assert_same(got, records)
    assert summary.total_bytes == path.stat().st_size


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_noise_is_refused(noise, with_magic):
    with pytest.raises(PgolfError):
        read_container((container.MAGIC + struct.pack("<I", 1) if with_magic else b"") + noise)


def test_every_flipped_byte_is_refused(written):
    path, summary = written
    good = path.read_bytes()
    for name, first, end in section_ranges(summary):
        for position in {first, first + 1, (first + end) // 2, end - 1}:
            bad = good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :]
            with pytest.raises(
                PgolfError, match=f"damaged in section '{name}' at byte {first}: its checksum"
            ):
                read_container(bad)
    for position in range(PREFIX):
        bad = good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :]
        message = (
            "is none" if position < 8 else "has version" if position < 12 else "section 'header' at byte"
        )
        with pytest.raises(PgolfError, match=message):
            read_container(bad)


def test_every_truncation_is_refused(written):
    path, summary = written
    good = path.read_bytes()
    ends = [end for _, _, end in section_ranges(summary)][:-1]
    for length in [*range(PREFIX + 2), *ends, *(end - 1 for end in ends), len(good) - 1]:
        with pytest.raises(PgolfError):
            read_container(good[:length])
        with pytest.raises(PgolfError):
            sizes(good[:length])


def test_trailing_bytes_are_refused(written):
    with pytest.raises(PgolfError, match=r"sections claim .* bytes, but .* follow the header"):
        read_container(written[0].read_bytes() + b"\0")


def test_other_version_is_named(written):
    good = written[0].read_bytes()
    with pytest.raises(PgolfError, match="has version 2, but this program reads version 1"):
        read_container(good[:8] + struct.pack("<I", 2) + good[12:])


def test_files_that_are_none(tmp_path):
    with pytest.raises(PgolfError, match=r"nothing\.pgolf cannot be read: No such file"):
        read_container(tmp_path / "nothing.pgolf")
    with pytest.raises(PgolfError, match="cannot be read"):
        read_container(tmp_path)
    (tmp_path / "zip").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(PgolfError, match="zip is none: it does not start with PGOLFART"):
        sizes(tmp_path / "zip")


def put(place, value):
    """A change that sets one field: put("tensors.0.shape", [6])."""

    def change(tree):
        *way, last = [int(step) if step.isdigit() else step for step in place.split(".")]
        for step in way:
            tree = tree[step]
        tree[last] = value

    return change


FORGED = [
    (put("sections.0.stored_bytes", 7), "claim 7 bytes, but 6 follow"),
    (put("sections.0.raw_bytes", 1 << 50), "are the limit"),
    (put("sections.0.raw_bytes", 7), "do not fill its 7 bytes"),
    (put("sections.0.raw_bytes", -6), "exactly the fields"),
    (put("sections.0.raw_bytes", 6.0), "exactly the fields"),
    (put("sections.0.raw_bytes", True), "exactly the fields"),
    (put("sections.0.name", "other"), "unknown name 'other'"),
    (put("sections.0.codec", "pickle"), "unknown codec 'pickle'"),
    (put("sections.0.codec", "lzma"), "at byte .*LZMA"),
    (put("sections.0.crc32", 1), "at byte .*checksum"),
    (lambda tree: tree["sections"].append(tree["sections"][0]), "one name"),
    (lambda tree: tree["tensors"].append(tree["tensors"][0]), "occurs twice"),
    (lambda tree: tree["tensors"].clear(), "do not fill"),
    (put("tensors.0.name", ""), "is empty or occurs twice"),
    (put("tensors.0.kind", "float32"), "kind 'float32' and dtype 'int8'"),
    (put("tensors.0.kind", "object"), "kind 'object'"),
    (put("tensors.0.dtype", "object"), "dtype 'object'"),
    (put("tensors.0.shape", [2, 4]), "does not take 6 bytes"),
    (put("tensors.0.shape", [-2, -3]), "no list of at most 8 sizes"),
    (put("tensors.0.shape", [1 << 70]), "no list of at most 8 sizes"),
    (put("tensors.0.shape", [1] * 70), "no list of at most 8 sizes"),
    (put("tensors.0.shape", [2.0, 3]), "no list of at most 8 sizes"),
    (put("tensors.0.shape", "23"), "exactly the fields"),
    (put("tensors.0.section", "small"), "does not follow"),
    (put("tensors.0.offset", 1), "does not follow"),
    (put("tensors.0.offset", -1), "exactly the fields"),
    (put("tensors.0.nbytes", 5), "does not take 5 bytes"),
    (put("tensors.0.extra", 5), "exactly the fields"),
    (put("config", []), "exactly the fields"),
    (put("more", 1), "exactly the fields"),
]


@pytest.mark.parametrize("number", range(len(FORGED)))
def test_forged_header_is_refused(number):
    change, message = FORGED[number]
    with pytest.raises(PgolfError, match=f"damaged in section .*{message}"):
        read_container(forge(change))


def test_unforged_header_is_read():
    _, (record,) = read_container(forge(lambda tree: None))
    assert record.array.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (wrap(b"{}", stored=1 << 31), "claims 2147483648 bytes"),
        (wrap(b"{}", raw=1 << 31), "section 'header'"),
        (wrap(b"{}", raw=3), "holds 2 bytes, but 3 were stated"),
        (wrap(b"{}", codec=2), "codec is 2"),
        (wrap(b"not a stream", codec=1), "not an LZMA"),
        (wrap(b"\xff\xfe"), "no JSON text"),
        (wrap(b"[" * 100_000), "no JSON text"),
        (wrap(b"[]"), "exactly the fields"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_absurd_header_is_refused(artifact, message):
    with pytest.raises(PgolfError, match=message):
        read_container(artifact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w", "codes", "int8", (2,), np.zeros(2, np.int16)), "says int8"),
        (("w", "codes", "int8", (3,), np.zeros(2, np.int8)), "its array is int8"),
        (("w", "codes", "int16", (2,), np.zeros(2, np.int16)), "codes are stored as int8, not as int16"),
        (("w", "weights", "int8", (2,), np.zeros(2, np.int8)), "kind is 'weights'"),
        (("w", "codes", "int8", (2,), np.zeros(2, np.int8), "extra"), "section is 'extra'"),
        (("", "codes", "int8", (2,), np.zeros(2, np.int8)), "non-empty"),
        (("w", "codes", "int8", (1,) * 9, np.zeros((1,) * 9, np.int8)), "9 dimensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_record_is_refused(arguments, message):
    with pytest.raises(PgolfError, match=message):
        TensorRecord(*arguments)


def test_writer_refuses_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    record = TensorRecord.of("w", "codes", np.zeros(4, np.int8))
    with pytest.raises(PgolfError, match="two tensors are called 'w'"):
        write_container(path, {}, [record, record])
    with pytest.raises(PgolfError, match="configuration cannot be written as JSON"):
        write_container(path, {"x": float("nan")}, [record])
    with pytest.raises(PgolfError, match="configuration cannot be written as JSON"):
        write_container(path, {"x": object()}, [record])
    with pytest.raises(PgolfError, match="preset is 11"):
        write_container(path, {}, [record], preset=11)
    monkeypatch.setattr(container, "MAX_RAW_BYTES", 3)
    with pytest.raises(PgolfError, match="the limit is 3 bytes"):
        write_container(path, {}, [record])
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
