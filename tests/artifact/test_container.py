"""The artifact container: round trips, with and without the C++ extension, and the documented bytes."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf_fast.artifact import container
from pgolf_fast.artifact.codecs import CODECS
from pgolf_fast.artifact.container import (
    KINDS,
    SECTIONS,
    TensorRecord,
    read_container,
    sizes,
    write_container,
)
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import native

GOLDEN = Path(__file__).parents[1] / "golden_artifacts"
DOCUMENT = Path(__file__).parents[2] / "docs" / "artifact.md"
CONFIG = {"dim": 64, "name": "tiny, ünïcode", "rates": [0.1, 1e-30], "nested": {"on": True, "off": None}}


def example_tensors():
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 8, (2, 48, 64)).round(), -32, 31).astype(np.int8)
    return [
        TensorRecord("mlp_up_bank", "codes", codes),
        TensorRecord("mlp_up_bank.scale", "scales", rng.random((2, 48)).astype(np.float16)),
        TensorRecord("tok_emb.weight", "float16", rng.random((50, 8)).astype(np.float16), "embeddings"),
        TensorRecord("bigram", "codes", codes[0, :5].copy()),
        TensorRecord("flag", "integer", np.ones((), np.uint8)),
        TensorRecord("gain", "float32", rng.random(100).astype(np.float32)),
        TensorRecord("step", "integer", np.array(7, dtype=np.int64)),
        TensorRecord("empty", "float32", np.zeros((0, 3), dtype=np.float32)),
    ]


def assert_same(got, want):
    assert [(r.name, r.kind, r.array.dtype, r.array.shape, r.section) for r in got] == [
        (r.name, r.kind, r.array.dtype, r.array.shape, r.section) for r in want
    ]
    for a, b in zip(got, want, strict=True):
        assert a.array.dtype == b.array.dtype
        assert a.array.tobytes() == b.array.tobytes()


@pytest.fixture(params=["C++", "Python"])
def decoders(request, monkeypatch):
    """Decode sections with the extension, and without it."""
    if request.param == "Python":
        monkeypatch.setattr(native, "extension", lambda: None)
    elif native.extension() is None:
        pytest.skip("the C++ extension is not built")


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.pgolf"
    return path, write_container(path, CONFIG, example_tensors())


@pytest.mark.usefixtures("decoders")
def test_round_trip(written):
    path, summary = written
    config, records = read_container(path)
    assert config == CONFIG
    assert_same(records, example_tensors())
    assert all(record.array.flags.writeable and record.array.flags.aligned for record in records)
    assert_same(read_container(path.read_bytes())[1], records)
    assert sizes(path) == sizes(path.read_bytes()) == summary
    assert summary.total_bytes == path.stat().st_size
    assert summary.sha256 == path.read_bytes()[-32:].hex()
    assert [section.name for section in summary.sections] == list(SECTIONS)


def test_codec_of_each_section_is_the_smallest(written, tmp_path):
    summary = written[1]
    assert {section.codec for section in summary.sections} <= {"raw", "rans", "lzma"}
    assert summary.sections[0].codec != "raw"
    raw = write_container(tmp_path / "raw", CONFIG, example_tensors(), codecs=())
    assert all(s.codec == "raw" and s.stored_bytes == s.raw_bytes for s in raw.sections)
    for section, plain in zip(summary.sections, raw.sections, strict=True):
        assert section.raw_bytes == plain.raw_bytes
        assert section.stored_bytes < section.raw_bytes or section.codec == "raw"


def test_same_input_same_bytes(written, tmp_path):
    path, _ = written
    write_container(tmp_path / "again", dict(reversed(CONFIG.items())), example_tensors())
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("decoders")
def test_strided_and_big_endian_arrays(tmp_path):
    codes = np.arange(24, dtype=np.int8).reshape(4, 6).T
    scales = np.arange(5).astype(">f2")
    records = [TensorRecord("a", "codes", codes), TensorRecord("b", "scales", scales)]
    write_container(tmp_path / "x", {}, records)
    _, (a, b) = read_container(tmp_path / "x")
    assert np.array_equal(a.array, codes)
    assert np.array_equal(b.array, scales)


@pytest.mark.usefixtures("decoders")
def test_no_tensors(tmp_path):
    assert write_container(tmp_path / "x", {}, []).sections == ()
    assert read_container(tmp_path / "x") == ({}, [])


def test_codes_are_stored_small(tmp_path):
    """One byte per 6-bit weight must compress to near its entropy: 5 bits for this normal distribution."""
    codes = np.clip(np.random.default_rng(0).normal(0, 8, (512, 512)).round(), -32, 31).astype(np.int8)
    summary = write_container(tmp_path / "x", {}, [TensorRecord("w", "codes", codes)])
    assert summary.total_bytes * 8 / codes.size < 5.3


def test_writer_reproduces_the_documented_example(tmp_path):
    """docs/artifact.md lists every byte of one file: `position  hex bytes  what`."""
    rows = re.findall(
        r"^ *(\d+)  ((?:[0-9a-f]{2} )*[0-9a-f]{2})(?:  |$)",
        DOCUMENT.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    documented = b""
    for position, text in rows:
        assert int(position) == len(documented)
        documented += bytes.fromhex(text)
    codes = np.array([[1, -1, 0], [2, 0, -2]], np.int8)
    records = [
        TensorRecord("w", "codes", codes),
        TensorRecord("w.scale", "scales", np.array([0.5, 2.0], np.float16)),
    ]
    write_container(tmp_path / "x", {"dim": 3}, records)
    assert (tmp_path / "x").read_bytes().hex(" ") == documented.hex(" ")


@pytest.mark.usefixtures("decoders")
@pytest.mark.parametrize(
    ("name", "module"), [("v1", None), ("v1_zstd", "zstandard"), ("v1_brotli", "brotli")]
)
def test_a_committed_artifact_loads(name, module):
    if module:
        pytest.importorskip(module)
    golden = json.loads((GOLDEN / "v1.json").read_text(encoding="utf-8"))
    path, described = GOLDEN / f"{name}.pgolf", golden["files"][name]
    config, records = read_container(path)
    assert config == golden["config"]
    assert [record.name for record in records] == list(golden["tensors"])
    for record in records:
        content = record.array.astype(record.array.dtype.newbyteorder("<")).tobytes()
        actual = [
            record.kind,
            record.array.dtype.name,
            list(record.array.shape),
            record.section,
            hashlib.sha256(content).hexdigest(),
        ]
        assert actual == golden["tensors"][record.name], record.name
    summary = sizes(path)
    assert (summary.sha256, summary.total_bytes) == (described["sha256"], described["bytes"])
    assert {section.name: section.codec for section in summary.sections} == described["codecs"]


def test_committed_artifacts_cover_every_codec_kind_and_dtype():
    golden = json.loads((GOLDEN / "v1.json").read_text(encoding="utf-8"))
    assert {path.stem for path in GOLDEN.glob("*.pgolf")} == set(golden["files"])
    used = {codec for described in golden["files"].values() for codec in described["codecs"].values()}
    assert used == set(CODECS)
    present = {(kind, dtype) for kind, dtype, *_ in golden["tensors"].values()}
    assert present == {(kind, dtype) for kind, dtypes in KINDS.items() for dtype in dtypes}


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
    kind = draw(st.sampled_from(sorted(KINDS)))
    dtype = draw(st.sampled_from(KINDS[kind]))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
    section = draw(st.sampled_from([None, *SECTIONS]))
    return TensorRecord(
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
    assert sizes(path) == summary
    assert summary.total_bytes == path.stat().st_size


# Rejected input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w", "codes", np.zeros(2, np.int16)), "codes are stored as int8, not as int16"),
        (("w", "weights", np.zeros(2, np.int8)), "kind is 'weights'"),
        (("w", "codes", np.zeros(2, np.int8), "extra"), "section is 'extra'"),
        (("", "codes", np.zeros(2, np.int8)), "1 to 65535 bytes"),
        (("w" * 65536, "codes", np.zeros(2, np.int8)), "1 to 65535 bytes"),
        (("\ud800", "codes", np.zeros(2, np.int8)), "1 to 65535 bytes"),
        (("w", "codes", np.zeros((1,) * 9, np.int8)), "9 dimensions"),
        (("w", "codes", np.zeros((0, 1 << 31), np.int8)), "exceeds the limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_record_is_rejected(arguments, message):
    with pytest.raises(PgolfError, match=message):
        TensorRecord(*arguments)


def test_writer_rejects_bad_input_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    record = TensorRecord("w", "codes", np.zeros(4, np.int8))
    with pytest.raises(PgolfError, match="two tensors are called 'w'"):
        write_container(path, {}, [record, record])
    with pytest.raises(PgolfError, match="configuration cannot be written as JSON"):
        write_container(path, {"x": float("nan")}, [record])
    with pytest.raises(PgolfError, match="configuration cannot be written as JSON"):
        write_container(path, {"x": object()}, [record])
    with pytest.raises(PgolfError, match="preset is 11"):
        write_container(path, {}, [record], preset=11)
    with pytest.raises(PgolfError, match="bytes of header do not fit"):
        write_container(path, {"x": "y" * (16 << 20)}, [record])
    monkeypatch.setattr(container, "MAX_RAW_BYTES", 3)
    with pytest.raises(PgolfError, match="the limit is 3 bytes"):
        write_container(path, {}, [record])
    monkeypatch.setattr(container, "MAX_TENSORS", 0)
    with pytest.raises(PgolfError, match="1 tensors do not fit"):
        write_container(path, {}, [record])
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
