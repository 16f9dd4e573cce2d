"""Packing 2.6 M int6 codes: our C++ path beside Python's `lzma`, and 6-bit packing."""

import lzma

import numpy as np
import pytest
import torch

from pgolf_fast import ops
from pgolf_fast.ops.lzma import compress_bytes, decompress_bytes


@pytest.fixture(scope="module")
def codes():
    values = np.random.default_rng(0).normal(0, 8, (5120, 512)).round().clip(-31, 31)
    return torch.from_numpy(values.astype(np.int8))


@pytest.mark.parametrize("peer", ["pgolf", "python"])
def test_lzma_compress(benchmark, codes, peer):
    benchmark.group = "LZMA preset 9, compress"
    raw = codes.numpy().tobytes()
    settings = {"preset": 9, "format": lzma.FORMAT_XZ, "check": lzma.CHECK_CRC32}
    run = (lambda: compress_bytes(raw, 9)) if peer == "pgolf" else (lambda: lzma.compress(raw, **settings))
    benchmark.extra_info["bytes"] = len(benchmark.pedantic(run, rounds=3))


@pytest.mark.parametrize("peer", ["pgolf", "python"])
def test_lzma_decompress(benchmark, codes, peer):
    benchmark.group = "LZMA, decompress"
    raw = codes.numpy().tobytes()
    packed = compress_bytes(raw, 9)
    run = (
        (lambda: decompress_bytes(packed, len(raw))) if peer == "pgolf" else (lambda: lzma.decompress(packed))
    )
    assert benchmark.pedantic(run, rounds=5) == raw


@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_int6(benchmark, codes, direction):
    benchmark.group = "int6, 2.6 M codes"
    packed = ops.int6_pack(codes)
    if direction == "pack":
        benchmark(ops.int6_pack, codes)
    else:
        assert torch.equal(benchmark(ops.int6_unpack, packed, codes.shape[1]), codes)
