"""pgolf::lzma_*: two back ends that agree, and damaged streams."""

import logging
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo import config as dynamo_config

from pgolf_fast.ops import lzma as codec
from pgolf_fast.ops import native, reference_bytes


@pytest.fixture(params=["liblzma", "python"])
def backend(request, monkeypatch):
    """Run every codec test with the linked liblzma and with Python's lzma module."""
    if request.param == "python":
        monkeypatch.setattr(native, "extension", lambda: None)
    elif not hasattr(native.extension(), "lzma_compress"):
        pytest.skip(f"liblzma is not linked here: {codec.backend()}")
    return request.param


def random_bytes(n, alphabet=63):
    return bytes(torch.randint(0, alphabet, (n,), generator=torch.Generator().manual_seed(n)).tolist())


@pytest.mark.parametrize("data", [b"", b"x", bytes(100_000), random_bytes(70_001)], ids=len)
@pytest.mark.parametrize("preset", [0, 6, 9])
def test_round_trip(backend, data, preset):
    packed = codec.compress_bytes(data, preset)
    assert codec.decompress_bytes(packed, len(data)) == data
    assert packed == codec.compress_bytes(data, preset)


def test_extreme_round_trip(backend):
    data = random_bytes(20_000)
    assert codec.decompress_bytes(codec.compress_bytes(data, 9, extreme=True), len(data)) == data


def test_agrees_with_python(backend):
    data = random_bytes(50_000)
    packed = codec.compress_bytes(data, 9)
    assert reference_bytes.lzma_decompress(packed, len(data)) == data
    assert codec.decompress_bytes(reference_bytes.lzma_compress(data, 9, False), len(data)) == data
    assert abs(len(packed) - len(reference_bytes.lzma_compress(data, 9, False))) < 200  # versions may differ


def test_backend_is_named(backend):
    expected = {"liblzma": "liblzma 5.", "python": "Python's lzma module (extension not built)"}
    assert codec.backend().startswith(expected[backend])


DAMAGE = {
    "truncated": (lambda s: s[:-1], "truncated"),
    "half": (lambda s: s[: len(s) // 2], "truncated"),
    "empty": (lambda s: b"", "truncated"),
    "corrupt": (lambda s: s[:40] + bytes([s[40] ^ 1]) + s[41:], "corrupt"),
    "footer": (lambda s: s[:-1] + b"?", "corrupt|not an LZMA"),
    "magic": (lambda s: b"PK" + s[2:], "not an LZMA"),
    "trailing": (lambda s: s + b"abc", "3 bytes follow"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(backend, damage):
    change, message = DAMAGE[damage]
    data = random_bytes(5000)
    with pytest.raises(ValueError, match=message):
        codec.decompress_bytes(change(codec.compress_bytes(data)), len(data))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (5001, "holds 5000 bytes, but 5001 were stated"),
        (4999, "more than the stated 4999"),
        (0, "more than the stated 0"),
        (-1, "must not be negative"),
    ],
)
@pytest.mark.parametrize("data", [bytes(5000), random_bytes(5000)], ids=["zeros", "random"])
def test_wrong_size_is_named(backend, size, message, data):
    with pytest.raises(ValueError, match=message):
        codec.decompress_bytes(codec.compress_bytes(data), size)


def test_memory_of_the_decoder_is_limited(backend):
    import lzma

    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    stream = lzma.compress(b"small", check=lzma.CHECK_CRC32, filters=filters)
    with pytest.raises(ValueError, match="more than 256 MiB of memory"):
        codec.decompress_bytes(stream, 5)


def test_bad_preset(backend):
    with pytest.raises(ValueError, match=r"preset is 10, but LZMA presets are 0\.\.9"):
        codec.compress_bytes(b"x", 10)


def test_settings(backend):
    halves = torch.arange(999).half().view(torch.uint8).numpy().tobytes()
    default, plain = (codec.compress_bytes(halves, **some) for some in ({}, {"lc": 0, "lp": 1, "pb": 1}))
    assert codec.decompress_bytes(plain, len(halves)) == halves
    assert len(plain) < len(default)
    assert codec.compress_bytes(halves, mode="fast") != default
    bad = ({"lc": 5}, {"lp": -2}, {"pb": 9}, {"nice_len": 1}, {"lc": 4, "lp": 1}, {"mode": "slow"})
    for some in bad:
        with pytest.raises(ValueError, match=next(iter(some))):
            codec.compress_bytes(halves, **some)


def test_threads(backend):
    blocks = [random_bytes(20_000 + i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(codec.compress_bytes, blocks)) == [codec.compress_bytes(b) for b in blocks]


def test_strided_tensor():
    data = torch.arange(200, dtype=torch.uint8)[::3]
    packed = codec.lzma_compress(data, 6)
    assert torch.equal(codec.lzma_decompress(packed, len(data)), data)
    assert packed.numpy().tobytes() == codec.compress_bytes(data.numpy().tobytes(), 6)


def test_opcheck():
    data = torch.arange(200, dtype=torch.uint8)
    packed = codec.lzma_compress(data, 6)
    torch.library.opcheck(torch.ops.pgolf.lzma_compress.default, (data, 6))
    torch.library.opcheck(torch.ops.pgolf.lzma_compress.default, (data[::2], 6), {"lc": 0, "mode": 1})
    torch.library.opcheck(torch.ops.pgolf.lzma_decompress.default, (packed, 200))


def test_compiles_without_graph_break():
    data = torch.arange(200, dtype=torch.uint8)

    def round_trip(t):
        return codec.lzma_decompress(codec.lzma_compress(t, 6), 200) + 1

    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(data), data + 1)


def test_ops_reject_bad_input():
    with pytest.raises(ValueError, match=r"pgolf::lzma_compress: data\.dtype is torch\.int8"):
        codec.lzma_compress(torch.zeros(3, dtype=torch.int8), 6)
    with pytest.raises(ValueError, match=r"data\.shape is \(2, 2\), but \(any,\) is needed"):
        codec.lzma_compress(torch.zeros(2, 2, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="pgolf::lzma_decompress: the LZMA stream is truncated"):
        codec.lzma_decompress(torch.zeros(0, dtype=torch.uint8), 6)


@pytest.fixture
def fresh_extension():
    """Look for the extension anew, within the test and after it."""
    native.extension.cache_clear()
    yield
    native.extension.cache_clear()


@pytest.mark.parametrize(
    ("module", "warning", "reason"),
    [
        (None, "C++ codecs are not in use", "extension not built"),
        (types.ModuleType("_C"), "liblzma was missing", "extension built without liblzma"),
    ],
    ids=["no extension", "no liblzma"],
)
@pytest.mark.usefixtures("fresh_extension")
def test_fallback_is_announced_once(module, warning, reason, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pgolf_fast._C", module)
    monkeypatch.setattr("pgolf_fast._C", module, raising=False)
    if module is None:
        monkeypatch.delattr("pgolf_fast._C")
    with caplog.at_level(logging.WARNING, logger="pgolf_fast"):
        packed = [codec.compress_bytes(b"abc") for _ in range(2)]
        assert codec.backend() == f"Python's lzma module ({reason})"
    assert codec.decompress_bytes(packed[0], 3) == b"abc"
    assert [warning in record.message for record in caplog.records] == [True]


def test_reading_imports_no_compiler():
    """The ops are those of every artifact that is read, and the compiler takes 2 s to import."""
    code = """
import sys
from pgolf_fast.ops.lzma import compress_bytes, decompress_bytes
assert decompress_bytes(compress_bytes(b"abc"), 3) == b"abc"
assert "torch._dynamo" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
