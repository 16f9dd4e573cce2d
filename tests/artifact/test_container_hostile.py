"""Damaged and forged artifacts are rejected for one stated reason, before memory is allocated for them."""

import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
from forge import Artifact, Section, Tensor, file_of, fix_checksums, with_plain_header

from pgolf_fast.artifact import container
from pgolf_fast.artifact.container import TensorRecord, read_container, sizes, write_container
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import native

LIMIT = container.MAX_RAW_BYTES


def outcome(data):
    """Return the container's content, or the reason why it was rejected."""
    try:
        return read_container(data)
    except PgolfError as error:
        return str(error).removeprefix("artifact (in memory) ")


def rejection(data):
    """Return the reason why a container was rejected, which it must be."""
    reason = outcome(data)
    assert isinstance(reason, str), "it was read"
    return reason


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every kind and two codecs in less than a kilobyte."""
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 2, (6, 50)).round(), -31, 31).astype(np.int8)
    records = [
        TensorRecord("w.q", "codes", codes),
        TensorRecord("w.scale", "scales", rng.random(6).astype(np.float16)),
        TensorRecord("emb", "float16", rng.random((3, 4)).astype(np.float16), "embeddings"),
        TensorRecord("gain", "float32", rng.random(3).astype(np.float32)),
        TensorRecord("step", "integer", np.array(7, dtype=np.int64)),
    ]
    path = tmp_path_factory.mktemp("small") / "model.pgolf"
    summary = write_container(path, {"dim": 50, "name": "small"}, records)
    assert {section.codec for section in summary.sections} > {"raw"}
    assert summary.total_bytes < 1000
    return path.read_bytes()


def sections_of(data):
    """Return the sections as the header lists them, with offsets."""
    return container._read_header(data, len(data))[1]


# Damage


def test_every_flipped_bit_is_detected(small):
    for place in range(len(small)):
        for bit in range(8):
            damaged = bytearray(small)
            damaged[place] ^= 1 << bit
            rejection(bytes(damaged))


def test_damage_is_located(small):
    ranges = [(s.name, s.offset, s.offset + s.stored_bytes) for s in sections_of(small)]
    ranges += [("header", container.START, ranges[0][1]), ("digest", len(small) - 32, len(small))]
    for name, first, end in ranges:
        start = 0 if name == "header" else first
        for place in (first, (first + end) // 2, end - 1):
            damaged = bytearray(small)
            damaged[place] ^= 0x10
            assert rejection(bytes(damaged)).startswith(f"is damaged in section '{name}' at byte {start}: ")


def test_every_truncation_is_detected(small):
    for length in range(len(small)):
        rejection(small[:length])
        with pytest.raises(PgolfError):
            sizes(small[:length])


def test_more_bytes_are_detected(small):
    for more in (b"\0", b"\0" * 32, small):
        assert f"the file has {len(small + more)} bytes, but {len(small)} were written" in rejection(
            small + more
        )
        assert "belong to no section" in rejection(fix_checksums(small + more))


# Other files


def test_files_that_are_not_artifacts(tmp_path):
    with pytest.raises(PgolfError, match=r"nothing\.pgolf cannot be read: No such file"):
        read_container(tmp_path / "nothing.pgolf")
    with pytest.raises(PgolfError, match="cannot be read"):
        read_container(tmp_path)
    (tmp_path / "zip").write_bytes(b"PK\3\4" + bytes(100))
    for read in (read_container, sizes):
        with pytest.raises(
            PgolfError, match="zip is not an artifact: it does not start with the bytes 89 'PGOLF'"
        ):
            read(tmp_path / "zip")


def test_other_version_is_named(small):
    assert "has version 2, but this program reads version 1" in rejection(
        small[:8] + struct.pack("<I", 2) + small[12:]
    )


# Forgeries: every checksum is correct

FORGED = {
    "no sections for tensors": (Artifact(sections=[]), "tensor 0 is in section 0, which does not exist"),
    "no tensors for sections": (Artifact(tensors=[]), "tensors do not fill the 6 bytes of section 'codes'"),
    "an unused section": (
        Artifact(sections=[Section(), Section(name=3, body=b"")]),
        "tensors do not fill the 0 bytes of section 'small'",
    ),
    "config too long": (Artifact(config_bytes=1 << 31), "it ends within the configuration"),
    "too few sections": (Artifact(section_count=0), "6 bytes of the file belong to no section"),
    "too many sections": (Artifact(section_count=65535), "it ends within section 1"),
    "too few tensors": (Artifact(tensor_count=0), "tensors do not fill"),
    "too many tensors": (Artifact(tensor_count=2), "it ends within tensor 1"),
    "absurdly many tensors": (Artifact(tensor_count=(1 << 32) - 1), "it claims 4294967295 tensors"),
    "more header": (Artifact(after_header=b"\0"), "1 bytes follow its last tensor"),
    "more body": (Artifact(after_sections=b"\0\0"), "2 bytes of the file belong to no section"),
    "unknown section": (Artifact(sections=[Section(name=4)]), "section 0 has the unknown name 4"),
    "section twice": (
        Artifact(sections=[Section(), Section()]),
        "section 'codes' is repeated or out of order",
    ),
    "sections out of order": (
        Artifact(sections=[Section(name=3), Section(name=0)]),
        "section 'codes' is repeated or out of order",
    ),
    "unknown codec": (Artifact(sections=[Section(codec=5)]), "section 'codes' has the unknown codec 5"),
    "overlapping sections": (
        Artifact(sections=[Section(stored_bytes=7, raw_bytes=7)]),
        "section 'codes' claims 7 bytes, but 6 are left",
    ),
    "plain section of another size": (
        Artifact(sections=[Section(raw_bytes=7)]),
        "stores 7 bytes in 6, which its codec cannot",
    ),
    "coded section that saves nothing": (
        Artifact(sections=[Section(codec=1)]),
        "stores 6 bytes in 6, which its codec cannot",
    ),
    "absurd stored size": (
        Artifact(sections=[Section(stored_bytes=(1 << 64) - 1, raw_bytes=6)]),
        "section 'codes' claims 18446744073709551615 bytes, but 6 are left",
    ),
    "absurd raw size": (
        Artifact(sections=[Section(codec=1, raw_bytes=LIMIT + 1)]),
        "claim more than the limit",
    ),
    "absurd raw size in all": (
        Artifact(sections=[Section(codec=1, raw_bytes=LIMIT), Section(name=1, codec=1, raw_bytes=7)]),
        "claim more than the limit",
    ),
    "not LZMA": (
        Artifact(sections=[Section(codec=1, body=bytes(20), raw_bytes=24)], tensors=[Tensor(shape=(24,))]),
        "in section 'codes' at byte 81: the bytes are not an LZMA",
    ),
    "tensor of an unknown section": (Artifact(tensors=[Tensor(section=9)]), "is in section 9"),
    "unknown kind": (Artifact(tensors=[Tensor(kind=5)]), "kind 5 and dtype 0, which do not match"),
    "unknown dtype": (Artifact(tensors=[Tensor(kind=4, dtype=9)]), "kind 4 and dtype 9"),
    "unused dtype": (Artifact(tensors=[Tensor(kind=4, dtype=5)]), "kind 4 and dtype 5"),
    "dtype 255": (Artifact(tensors=[Tensor(kind=4, dtype=255)]), "kind 4 and dtype 255"),
    "wrong dtype for the kind": (Artifact(tensors=[Tensor(kind=3)]), "kind 3 and dtype 0"),
    "too many dimensions": (Artifact(tensors=[Tensor(shape=[1] * 9)]), "9 dimensions, but the limit is 8"),
    "more dimensions than there are": (Artifact(tensors=[Tensor(dimensions=8)]), "it ends within tensor 0"),
    "a tensor too large": (Artifact(tensors=[Tensor(shape=(2, 4))]), "exceeds the 6 bytes"),
    "a tensor too small": (Artifact(tensors=[Tensor(shape=(5,))]), "do not fill the 6 bytes"),
    "product beyond the limit": (Artifact(tensors=[Tensor(shape=(LIMIT, 2))]), "product exceeds the limit"),
    "product beyond 64 bits": (Artifact(tensors=[Tensor(shape=[1 << 16] * 4 + [6])]), "exceeds the limit"),
    "product that wraps to 6": (
        Artifact(tensors=[Tensor(shape=(3, 0xAAAAAAAB, 2, 0xFFFFFFFF, 0xFFFFFFFF))]),
        "exceeds the limit",
    ),
    "nothing, of absurd sizes": (
        Artifact(tensors=[Tensor(shape=[0xFFFFFFFF] * 7 + [0])]),
        "exceeds the limit",
    ),
    "no name": (Artifact(tensors=[Tensor(name=b"")]), "tensor 0 has no name"),
    "name too long": (Artifact(tensors=[Tensor(name_bytes=65535)]), "it ends within tensor 0"),
    "name twice": (Artifact(tensors=[Tensor(shape=(3,))] * 2), "tensor 1 has the name of tensor 0"),
}
BAD_UTF8 = [b"\x80", b"\xc1\x81", b"\xc3", b"a\xc3(", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf0\x8f\xbf\xbf"]
BAD_UTF8 += [b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xf0\x9f\x98", b"\xe2\x82\xac\xe2\x82"]
GOOD_UTF8 = [
    "\0",
    "\x7f",
    "\x80",
    "\u07ff",
    "\u0800",
    "\ud7ff",
    "\ue000",
    "\uffff",
    "\U00010000",
    "\U0010ffff",
]


@pytest.mark.parametrize("case", FORGED)
def test_forgery_is_rejected(case):
    artifact, message = FORGED[case]
    why = rejection(artifact.file())
    assert why.startswith("is damaged in section ")
    assert message in why


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ({"stored": 1 << 31}, "at byte 16: it claims 2147483648 bytes, but 55 are left"),
        ({"raw": 1 << 31, "codec": 1}, "at byte 20: it claims 2147483648 bytes uncompressed"),
        ({"raw": 50}, "at byte 36: the raw bytes hold 49 bytes, but 50 were stated"),
        ({"codec": 2}, "at byte 12: its codec is 2"),
        ({"codec": 1}, "at byte 36: the bytes are not an LZMA"),
        ({"file_bytes": (1 << 64) - 1}, "at byte 24: the file has 123 bytes, but 18446744073709551615 were"),
    ],
)
def test_forged_prefix_is_rejected(prefix, message):
    assert message in rejection(Artifact().file(**prefix))


def test_valid_hand_made_artifact_is_read():
    data = Artifact().file()
    config, (record,) = read_container(data)
    assert config == {}
    assert (record.name, record.kind, record.section) == ("w", "codes", "codes")
    assert record.array.dtype == np.int8
    assert record.array.tolist() == [[0, 1, 2], [3, 4, 5]]
    (section,) = sections_of(data)
    assert (section.name, section.codec, section.raw_bytes, section.offset) == ("codes", "raw", 6, 85)


def test_names_are_utf8():
    for name in BAD_UTF8:
        assert "the name of tensor 0 is not UTF-8" in rejection(Artifact(tensors=[Tensor(name=name)]).file())
    for name in GOOD_UTF8:
        _, (record,) = read_container(Artifact(tensors=[Tensor(name=name.encode())]).file())
        assert record.name == name


def test_empty_tensors_are_read():
    shapes = [(0,), (2, 3), (0, 5), (0, 1 << 30), (1, 0, 7)]
    tensors = [Tensor(shape=shape, name=str(shape).encode()) for shape in shapes]
    _, records = read_container(Artifact(tensors=tensors).file())
    assert [record.array.shape for record in records] == shapes
    assert records[1].array.tobytes() == bytes(range(6))


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b"\xff\xfe",
        b"{}x",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"[" * 100_000,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda config: repr(config[:12]),
)
def test_configuration_that_is_not_a_json_object(config):
    with pytest.raises(
        PgolfError, match=r"damaged in section 'header' at byte 36: its configuration is not "
    ):
        read_container(Artifact(config=config).file())


def test_garbage_in_optional_codecs_is_rejected():
    for codec in (3, 4):
        artifact = Artifact(sections=[Section(codec=codec, raw_bytes=8)], tensors=[Tensor(shape=(8,))])
        with pytest.raises(PgolfError):
            read_container(artifact.file())


# Memory

GREEDY = {
    "raw bytes": Artifact(sections=[Section(codec=1, raw_bytes=LIMIT + 1)]),
    "tensors": Artifact(tensor_count=container.MAX_TENSORS),
    "configuration": Artifact(config_bytes=(1 << 32) - 1),
    "name": Artifact(tensors=[Tensor(name_bytes=65535)]),
    "sizes": Artifact(tensors=[Tensor(shape=(LIMIT, 0))]),
}


@pytest.mark.parametrize("case", GREEDY)
def test_absurd_sizes_take_no_memory(case):
    data = GREEDY[case].file()
    tracemalloc.start()
    rejection(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_header_that_unpacks_to_more_than_it_says():
    import lzma

    bomb = lzma.compress(bytes(container.MAX_HEADER_BYTES + 1), check=lzma.CHECK_CRC32)
    assert len(bomb) < 5_000
    assert "more than the stated" in rejection(file_of(bomb, b"", codec=1, raw=1000))
    assert "but the limit is" in rejection(file_of(bomb, b"", codec=1, raw=container.MAX_HEADER_BYTES + 1))


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(Artifact().file())
    os.truncate(path, 1 << 40)  # takes no space
    for read in (read_container, sizes):
        with pytest.raises(PgolfError, match="has 1099511627776 bytes, but no artifact has more than 10905"):
            read(path)


# Random mutations


def mutated(data, rng, first=8):
    """Apply one to three changes that parsers tend to get wrong, from byte `first` to the digest."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(first, len(data) - 32)
        change = rng.randrange(5)
        if change == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[place] = rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 255])
        elif change == 2:
            number = rng.choice([0, 1, 1 << 16, LIMIT, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
            data[place : place + 4] = number.to_bytes(4, "little")
        elif change == 3:
            del data[place : place + rng.randint(1, 4)]
        else:
            data[place:place] = data[place : place + rng.randint(1, 8)]
    return bytes(data)


def check_content(data):
    """Check what callers rely on once a file was read: every byte of every section belongs to one tensor."""
    _, records = read_container(data)
    for section in sections_of(data):
        arrays = [record.array for record in records if record.section == section.name]
        assert sum(array.nbytes for array in arrays) == section.raw_bytes
    assert len({record.name for record in records}) == len(records)


def fuzz(seeds, executions, seed):
    """Return why mutated files were rejected, plus "read" if any was not.

    Checksums are corrected after three of four mutations, so that the checks behind them decide.
    """
    rng = random.Random(seed)
    reasons = set()
    for _ in range(executions):
        data = mutated(rng.choice(seeds), rng)
        data = fix_checksums(data) if rng.randrange(4) else data
        content = outcome(data)
        if isinstance(content, str):
            reasons.add(content.split(": ")[1][:20])
        else:
            check_content(data)
            reasons.add("read")
    return reasons


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("executions", "seed"), [(4_000, 0), pytest.param(100_000, 1, marks=pytest.mark.slow)]
)
def test_reader_survives_mutated_files(small, executions, seed):
    valid = [with_plain_header(small), small]
    reasons = fuzz(5 * valid + [artifact.file() for artifact, _ in FORGED.values()], executions, seed)
    assert len(reasons) > 40
    assert "read" in reasons


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_python_decoders_survive_mutated_sections(small, monkeypatch):
    """Without the extension, files that C++ can read give the same tensors.

    Files that C++ rejects may be rejected or read as other values of the same sizes (the short rANS decoder
    checks less), but nothing else may happen.
    """
    if native.extension() is None:
        pytest.skip("the C++ extension is not built")
    rng = random.Random(2)
    plain = with_plain_header(small)
    first = sections_of(plain)[0].offset
    files = [plain, *(fix_checksums(mutated(plain, rng, first)) for _ in range(1000))]
    expected = [outcome(data) for data in files]
    monkeypatch.setattr(native, "extension", lambda: None)
    for data, reference in zip(files, expected, strict=True):
        content = outcome(data)
        if isinstance(content, str):
            assert isinstance(reference, str)
            continue
        check_content(data)
        if not isinstance(reference, str):
            assert [r.array.tobytes() for r in content[1]] == [r.array.tobytes() for r in reference[1]]


def test_noise_is_rejected():
    rng = random.Random(1)
    for _ in range(1000):
        rejection(fix_checksums(container.MAGIC + struct.pack("<I", 1) + rng.randbytes(rng.randrange(200))))
