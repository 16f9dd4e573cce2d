"""pgolf::lzma_*: three backends that agree, and streams that lie."""

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo import config as dynamo_config

from pgolf_fast.ops import lzma as codec
from pgolf_fast.ops import native, reference_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def dlopen_extension(tmp_path_factory):
    """The extension as it is built where <lzma.h> is missing."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("dlopen")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "out"]
    environment = {**os.environ, "PGOLF_LZMA": "dlopen", "PGOLF_FAST_EXT": "require"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out" / "pgolf_fast").glob("_C*")
    # pybind11 returns what sys.modules holds under the module's name: load it under another one.
    spec = importlib.util.spec_from_file_location("dlopen_variant._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.lzma_how() == "dlopen"
    return module


@pytest.fixture(params=["built", "dlopen", "python"])
def backend(request, monkeypatch):
    """Every codec test runs on the extension as installed, on its dlopen variant, and on Python's module."""
    module = None
    if request.param == "dlopen":
        module = request.getfixturevalue("dlopen_extension")
    elif request.param == "built":
        module = native.lzma_extension()
        if module is None:
            pytest.skip(f"pgolf_fast._C does not serve here: {codec.backend()}")
    monkeypatch.setattr(native, "extension", lambda: module)
    monkeypatch.setattr(native, "lzma_extension", lambda: module)
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


def test_backend_says_who_serves(backend):
    said = {
        "built": " liblzma 5.",
        "dlopen": "dlopen liblzma 5.",
        "python": "Python's lzma module (extension not built)",
    }
    assert said[backend] in codec.backend()


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
    torch.library.opcheck(codec.lzma_compress, (data, 6))
    torch.library.opcheck(codec.lzma_compress, (data[::2], 6))
    torch.library.opcheck(codec.lzma_decompress, (packed, 200))


def test_compiles_without_graph_break():
    data = torch.arange(200, dtype=torch.uint8)

    def there_and_back(t):
        return codec.lzma_decompress(codec.lzma_compress(t, 6), 200) + 1

    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(data), data + 1)


def test_ops_reject_bad_input():
    with pytest.raises(ValueError, match=r"pgolf::lzma_compress: data\.dtype is torch\.int8"):
        codec.lzma_compress(torch.zeros(3, dtype=torch.int8), 6)
    with pytest.raises(ValueError, match=r"data\.shape is \(2, 2\), but \(any,\) is needed"):
        codec.lzma_compress(torch.zeros(2, 2, dtype=torch.uint8), 6)
    with pytest.raises(ValueError, match="pgolf::lzma_decompress: the LZMA stream is truncated"):
        codec.lzma_decompress(torch.zeros(0, dtype=torch.uint8), 6)


def test_missing_extension_is_announced_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pgolf_fast._C", None)
    monkeypatch.delattr("pgolf_fast._C", raising=False)
    native.extension.cache_clear()
    native.lzma_extension.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="pgolf_fast"):
            packed = [codec.compress_bytes(b"abc") for _ in range(2)]
            assert codec.backend() == "Python's lzma module (extension not built)"
        assert codec.decompress_bytes(packed[0], 3) == b"abc"
        assert [record.message.count("C++ codecs") for record in caplog.records] == [1]
    finally:
        native.extension.cache_clear()
        native.lzma_extension.cache_clear()
