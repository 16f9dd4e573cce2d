"""Compare on 2.6 M codes: bit packing and dequantizing in C++ against numpy and torch.

OMP_NUM_THREADS=1 pytest benchmarks/bench_codec.py -k bits --benchmark-json=FILE
"""

import functools

import numpy as np
import pytest
import torch

from pgolf_fast import ops
from pgolf_fast.ops import native, reference_bytes


@pytest.fixture(scope="module")
def codes():
    values = np.random.default_rng(0).normal(0, 8, (5120, 512)).round().clip(-31, 31)
    return torch.from_numpy(values.astype(np.int8))


def numpy_pack(codes):
    u = (codes + 32).astype(np.uint8)
    low, high = u & 15, u >> 4
    planes = [
        low[:, 0::2] | low[:, 1::2] << 4,
        high[:, 0::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6,
    ]
    return np.concatenate(planes, axis=1)


def numpy_unpack(packed, columns):
    low, high = packed[:, : columns // 2, None], packed[:, columns // 2 :, None]
    low = (low >> np.array([0, 4], np.uint8) & 15).reshape(len(packed), columns)
    high = (high >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(len(packed), columns)
    return (low | high << 4).astype(np.int8) - np.int8(32)


def native_call(name, **settings):
    if native.extension() is None:
        pytest.skip("pgolf_fast._C was not built")
    return functools.partial(getattr(native.extension(), name), **settings)


def timed(benchmark, group, run, codes):
    """Time `run`; add weights per second."""
    benchmark.group = group
    result = benchmark(run)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["G weights/s"] = round(codes.numel() / benchmark.stats.stats.median / 1e9, 3)
    return result


PATHS = {"SIMD": {"simd": True, "threads": 1}, "SWAR": {"simd": False, "threads": 1}, "SIMD, threads": {}}


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("peer", [*PATHS, "op", "numpy", "torch eager"])
@pytest.mark.parametrize("direction", ["pack", "unpack"])
def test_bits(benchmark, codes, direction, peer, bits):
    if peer == "numpy" and bits != 6:
        pytest.skip("written for 6 bits only")
    columns, packed = codes.shape[1], ops.pack_bits(codes, bits)
    raw, raw_packed = codes.numpy(), packed.numpy()
    if peer in PATHS:
        pack, unpack = (native_call(f"{name}_bits", **PATHS[peer]) for name in ("pack", "unpack"))
        both = (lambda: pack(raw, bits)), (lambda: unpack(raw_packed, columns, bits))
    else:
        both = {
            "op": (lambda: ops.pack_bits(codes, bits), lambda: ops.unpack_bits(packed, columns, bits)),
            "numpy": (lambda: numpy_pack(raw), lambda: numpy_unpack(raw_packed, columns)),
            "torch eager": (
                lambda: reference_bytes.pack_bits(codes, bits),
                lambda: reference_bytes.unpack_bits(packed, columns, bits),
            ),
        }[peer]
    run, want = (both[0], raw_packed) if direction == "pack" else (both[1], raw)
    result = timed(benchmark, f"{bits} bits, {direction}, 2.6 M codes", run, codes)
    assert np.array_equal(np.asarray(result), want)


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("peer", [*PATHS, "op", "numpy", "torch eager", "torch eager from codes"])
def test_dequantize_bits(benchmark, codes, dtype, peer, bits):
    """Into allocated memory, except for the ops and torch, which return new tensors."""
    if peer == "numpy" and (bits != 6 or dtype != torch.float32):
        pytest.skip("numpy has no bfloat16; unpacking is written for 6 bits only")
    columns, packed, scale = codes.shape[1], ops.pack_bits(codes, bits), torch.rand(len(codes))
    want = (codes.float() * scale[:, None]).to(dtype)
    into = torch.empty_like(want)
    target = (into if dtype == torch.float32 else into.view(torch.uint16)).numpy()
    if peer in PATHS:
        native_run = native_call("dequantize_bits", **PATHS[peer])

        def run():
            native_run(packed.numpy(), scale.numpy(), bits, target)
            return into

    elif peer == "numpy":
        raw, column = packed.numpy(), scale.numpy()[:, None]

        def run():
            np.multiply(numpy_unpack(raw, columns), column, out=target)
            return into

    else:
        run = {
            "op": lambda: ops.dequantize_bits(packed, scale, columns, bits, dtype),
            "torch eager": lambda: reference_bytes.dequantize_bits(packed, scale, columns, bits, dtype),
            "torch eager from codes": lambda: (codes.float() * scale[:, None]).to(dtype),
        }[peer]
    name = f"{bits} bits, unpack + dequantize to {str(dtype).removeprefix('torch.')}, 2.6 M codes"
    assert torch.equal(timed(benchmark, name, run, codes), want)
