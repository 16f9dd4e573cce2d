"""Damaged and forged artifacts: both readers refuse them, for one reason, before memory is taken for them."""

import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
from forge import Artifact, Section, Tensor, file_of, put_right, with_plain_header

from pgolf_fast.artifact import reader
from pgolf_fast.artifact.container import TensorRecord, read_container, sizes, write_container
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import native

LIMIT = reader.MAX_RAW_BYTES


def verdict(read, data):
    """What a reader makes of a file: its content, or why not."""
    try:
        return read(data)
    except ValueError as error:
        return str(error)


def both(data):
    """The verdict of both readers, which must be one."""
    python = verdict(reader.read_container, data)
    if extension := native.lzma_extension():
        assert verdict(extension.read_container, data) == python
    return python


def refusal(data):
    """Why both readers refuse a file, which they must."""
    why = both(data)
    assert isinstance(why, str), "it was read"
    return why


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Every kind and two codecs in less than a kilobyte."""
    rng = np.random.default_rng(0)
    codes = np.clip(rng.normal(0, 2, (6, 50)).round(), -31, 31).astype(np.int8)
    records = [
        TensorRecord.of("w.q", "codes", codes),
        TensorRecord.of("w.scale", "scales", rng.random(6).astype(np.float16)),
        TensorRecord.of("emb", "float16", rng.random((3, 4)).astype(np.float16), "embeddings"),
        TensorRecord.of("gain", "float32", rng.random(3).astype(np.float32)),
        TensorRecord.of("step", "integer", np.array(7, dtype=np.int64)),
    ]
    path = tmp_path_factory.mktemp("small") / "model.pgolf"
    summary = write_container(path, {"dim": 50, "name": "small"}, records)
    assert {section.codec for section in summary.sections} > {"raw"}
    assert summary.total_bytes < 1000
    return path.read_bytes()


# Damage


def test_every_flipped_bit_is_detected(small):
    for place in range(len(small)):
        for bit in range(8):
            damaged = bytearray(small)
            damaged[place] ^= 1 << bit
            refusal(bytes(damaged))


def test_damage_is_located(small):
    entries = {reader.SECTIONS[entry.name]: entry for entry in reader.read_header(small, len(small)).sections}
    ranges = [(name, e.offset, e.offset + e.stored_bytes) for name, e in entries.items()]
    ranges += [("header", reader.START, ranges[0][1]), ("digest", len(small) - 32, len(small))]
    for name, first, end in ranges:
        start = 0 if name == "header" else first
        for place in (first, (first + end) // 2, end - 1):
            damaged = bytearray(small)
            damaged[place] ^= 0x10
            assert refusal(bytes(damaged)).startswith(f"is damaged in section '{name}' at byte {start}: ")


def test_every_truncation_is_detected(small):
    for length in range(len(small)):
        refusal(small[:length])
        with pytest.raises(PgolfError):
            sizes(small[:length])


def test_more_bytes_are_detected(small):
    for more in (b"\0", b"\0" * 32, small):
        assert f"the file has {len(small + more)} bytes, but {len(small)} were written" in refusal(
            small + more
        )
        assert "belong to no section" in refusal(put_right(small + more))


# Files that are something else


def test_files_that_are_none(tmp_path):
    with pytest.raises(PgolfError, match=r"nothing\.pgolf cannot be read: No such file"):
        read_container(tmp_path / "nothing.pgolf")
    with pytest.raises(PgolfError, match="cannot be read"):
        read_container(tmp_path)
    (tmp_path / "zip").write_bytes(b"PK\3\4" + bytes(100))
    for read in (read_container, sizes):
        with pytest.raises(PgolfError, match="zip is none: it does not start with the bytes 89 'PGOLF'"):
            read(tmp_path / "zip")


def test_old_files_are_named():
    for old in (b"PGOLFART", b"PGOLFART" + struct.pack("<IIIII", 1, 0, 2, 2, 0) + b"{}"):
        assert refusal(old) == "was written before the format was fixed: pack it again (`pgolf pack RUN`)"


def test_other_version_is_named(small):
    assert "has version 2, but this program reads version 1" in refusal(
        small[:8] + struct.pack("<I", 2) + small[12:]
    )


# Forgeries: every checksum is right

FORGED = {
    "no sections for tensors": (Artifact(sections=[]), "tensor 0 lies in section 0, which is not there"),
    "no tensors for sections": (Artifact(tensors=[]), "tensors do not fill the 6 bytes of section 'codes'"),
    "a section nobody uses": (
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
        "section 'codes' is there twice or out of order",
    ),
    "sections out of order": (
        Artifact(sections=[Section(name=3), Section(name=0)]),
        "section 'codes' is there twice or out of order",
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
    "no LZMA": (
        Artifact(sections=[Section(codec=1, body=bytes(20), raw_bytes=24)], tensors=[Tensor(shape=(24,))]),
        "in section 'codes' at byte 81: the bytes are not an LZMA",
    ),
    "tensor of an unknown section": (Artifact(tensors=[Tensor(section=9)]), "lies in section 9"),
    "unknown kind": (Artifact(tensors=[Tensor(kind=5)]), "kind 5 and dtype 0, which do not go together"),
    "unknown dtype": (Artifact(tensors=[Tensor(kind=4, dtype=9)]), "kind 4 and dtype 9"),
    "unused dtype": (Artifact(tensors=[Tensor(kind=4, dtype=5)]), "kind 4 and dtype 5"),
    "dtype 255": (Artifact(tensors=[Tensor(kind=4, dtype=255)]), "kind 4 and dtype 255"),
    "wrong dtype for the kind": (Artifact(tensors=[Tensor(kind=3)]), "kind 3 and dtype 0"),
    "too many dimensions": (Artifact(tensors=[Tensor(shape=[1] * 9)]), "9 dimensions, but 8 are the limit"),
    "more dimensions than there are": (Artifact(tensors=[Tensor(dimensions=8)]), "it ends within tensor 0"),
    "a tensor too large": (Artifact(tensors=[Tensor(shape=(2, 4))]), "goes beyond the 6 bytes"),
    "a tensor too small": (Artifact(tensors=[Tensor(shape=(5,))]), "do not fill the 6 bytes"),
    "product beyond the limit": (Artifact(tensors=[Tensor(shape=(LIMIT, 2))]), "product is beyond the limit"),
    "product beyond 64 bits": (Artifact(tensors=[Tensor(shape=[1 << 16] * 4 + [6])]), "beyond the limit"),
    "product that wraps to 6": (
        Artifact(tensors=[Tensor(shape=(3, 0xAAAAAAAB, 2, 0xFFFFFFFF, 0xFFFFFFFF))]),
        "beyond the limit",
    ),
    "nothing, of absurd sizes": (
        Artifact(tensors=[Tensor(shape=[0xFFFFFFFF] * 7 + [0])]),
        "beyond the limit",
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
def test_forgery_is_refused(case):
    artifact, message = FORGED[case]
    why = refusal(artifact.file())
    assert why.startswith("is damaged in section ")
    assert message in why


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ({"stored": 1 << 31}, "at byte 16: it claims 2147483648 bytes, but 55 are left"),
        ({"raw": 1 << 31, "codec": 1}, "at byte 20: it claims 2147483648 bytes unpacked"),
        ({"raw": 50}, "at byte 36: the raw bytes hold 49 bytes, but 50 were stated"),
        ({"codec": 2}, "at byte 12: its codec is 2"),
        ({"codec": 1}, "at byte 36: the bytes are not an LZMA"),
        ({"file_bytes": (1 << 64) - 1}, "at byte 24: the file has 123 bytes, but 18446744073709551615 were"),
    ],
)
def test_forged_prefix_is_refused(prefix, message):
    assert message in refusal(Artifact().file(**prefix))


def test_what_is_not_forged_is_read():
    config, sections, tensors, unpacked = both(Artifact().file())
    assert (config, unpacked) == (b"{}", [bytes(range(6))])
    assert [tuple(entry) for entry in sections] == [(0, 0, 6, 6, sections[0][4], 85)]
    assert [tuple(entry) for entry in tensors] == [("w", 0, 0, 0, (2, 3), 0)]


def test_names_are_utf8():
    for name in BAD_UTF8:
        assert "the name of tensor 0 is no UTF-8" in refusal(Artifact(tensors=[Tensor(name=name)]).file())
    for name in GOOD_UTF8:
        _, _, tensors, _ = both(Artifact(tensors=[Tensor(name=name.encode())]).file())
        assert tensors[0][0] == name


def test_tensors_of_no_bytes_are_read():
    tensors = [Tensor(shape=s, name=str(s).encode()) for s in [(0,), (2, 3), (0, 5), (0, 1 << 30), (1, 0, 7)]]
    _, _, found, _ = both(Artifact(tensors=tensors).file())
    assert [(entry[4], entry[5]) for entry in found] == [
        (tuple(t.shape), 0 if i < 2 else 6) for i, t in enumerate(tensors)
    ]
    _, (record, *_) = read_container(Artifact(tensors=tensors).file())
    assert record.array.shape == (0,)


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
def test_configuration_that_is_no_json_object(config):
    with pytest.raises(
        PgolfError, match=r"damaged in section 'header' at byte 36: its configuration is no JSON"
    ):
        read_container(Artifact(config=config).file())


def test_sections_of_codecs_left_to_python():
    """zstd and brotli need Python; whatever they say of nonsense, it is refused."""
    for codec in (3, 4):
        artifact = Artifact(sections=[Section(codec=codec, raw_bytes=8)], tensors=[Tensor(shape=(8,))])
        with pytest.raises(PgolfError):
            read_container(artifact.file())


# Memory

GREEDY = {
    "raw bytes": Artifact(sections=[Section(codec=1, raw_bytes=LIMIT + 1)]),
    "tensors": Artifact(tensor_count=reader.MAX_TENSORS),
    "configuration": Artifact(config_bytes=(1 << 32) - 1),
    "name": Artifact(tensors=[Tensor(name_bytes=65535)]),
    "sizes": Artifact(tensors=[Tensor(shape=(LIMIT, 0))]),
}


@pytest.mark.parametrize("case", GREEDY)
def test_absurd_sizes_take_no_memory(case):
    data = GREEDY[case].file()
    tracemalloc.start()
    refusal(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_header_that_unpacks_to_more_than_it_says():
    import lzma

    bomb = lzma.compress(bytes(reader.MAX_HEADER_BYTES + 1), check=lzma.CHECK_CRC32)
    assert len(bomb) < 5_000
    assert "more than the stated" in refusal(file_of(bomb, b"", codec=1, raw=1000))
    assert "are the limit" in refusal(file_of(bomb, b"", codec=1, raw=reader.MAX_HEADER_BYTES + 1))


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(Artifact().file())
    os.truncate(path, 1 << 40)  # takes no space
    for read in (read_container, sizes):
        with pytest.raises(PgolfError, match="has 1099511627776 bytes, but no artifact has more than 10905"):
            read(path)


# Both readers, on anything


def mutated(data, dice, first=8):
    """One to three changes of the kind that programs get wrong, from byte `first` to the digest."""
    data = bytearray(data)
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(first, len(data) - 32)
        change = dice.randrange(5)
        if change == 0:
            data[place] ^= 1 << dice.randrange(8)
        elif change == 1:
            data[place] = dice.choice([0, 1, 2, 3, 4, 5, 7, 8, 9, 127, 128, 255])
        elif change == 2:
            number = dice.choice([0, 1, 1 << 16, LIMIT, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
            data[place : place + 4] = number.to_bytes(4, "little")
        elif change == 3:
            del data[place : place + dice.randint(1, 4)]
        else:
            data[place:place] = data[place : place + dice.randint(1, 8)]
    return bytes(data)


def test_readers_agree_on_mutated_files(small):
    """Checksums are made right after every change, so that the checks behind them decide."""
    dice = random.Random(0)
    seeds = [with_plain_header(small), small, *(artifact.file() for artifact, _ in FORGED.values())]
    reasons = set()
    for _ in range(4000):
        found = both(put_right(mutated(dice.choice(seeds[:2] + seeds), dice)))
        reasons.add("read" if not isinstance(found, str) else found.split(": ")[1][:20])
    assert len(reasons) > 40
    assert "read" in reasons


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_plain_decoders_survive_mutated_sections(small, monkeypatch):
    """Without the extension other decoders work: where C++ reads a file, they find the same bytes.

    Where it does not, they may find other bytes, as many as stated (the short rANS decoder checks less), or
    raise a ValueError, and nothing else.
    """
    extension = native.lzma_extension()
    if extension is None:
        pytest.skip("the C++ extension is not built")
    dice = random.Random(2)
    plain = with_plain_header(small)
    first = reader.read_header(plain, len(plain)).sections[0].offset
    files = [plain, *(put_right(mutated(plain, dice, first)) for _ in range(1000))]
    native_verdicts = [verdict(extension.read_container, data) for data in files]
    monkeypatch.setattr(native, "extension", lambda: None)
    monkeypatch.setattr(native, "lzma_extension", lambda: None)
    for data, native_verdict in zip(files, native_verdicts, strict=True):
        found = verdict(reader.read_container, data)
        assert found == native_verdict or isinstance(native_verdict, str)
        if not isinstance(found, str):
            assert [entry.raw_bytes for entry in found[1]] == [len(part) for part in found[3]]


def test_readers_agree_on_noise():
    dice = random.Random(1)
    for _ in range(1000):
        refusal(put_right(reader.MAGIC + struct.pack("<I", 1) + dice.randbytes(dice.randrange(200))))
