"""pgolf::*_bits: the C++ paths and the torch reference agree bitwise, in every width."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast.ops import native, reference_bytes
from pgolf_fast.ops.bits import WIDTHS, dequantize_bits, pack_bits, row_bytes, unpack_bits

SHAPES = [(4, 64), (3, 1), (5, 7), (2, 9), (3, 1027), (1, 8), (2, 31), (2, 33), (0, 8), (4, 0)]
DTYPES = [torch.float32, torch.bfloat16]
each_width = pytest.mark.parametrize("bits", WIDTHS)


def extension_without_simd():
    found = native.extension()
    functions = ("pack_bits", "unpack_bits", "dequantize_bits")
    return found and SimpleNamespace(
        **{name: partial(getattr(found, name), simd=False) for name in functions}
    )


@pytest.fixture(params=["SIMD", "SWAR", "torch"])
def implementation(request, monkeypatch):
    found = {"SIMD": native.extension, "SWAR": extension_without_simd, "torch": lambda: None}[request.param]()
    if request.param != "torch" and found is None:
        pytest.skip("pgolf_fast._C was not built")
    if request.param == "SIMD" and found.bits_simd() == "none":
        pytest.skip("this processor has no SIMD path")
    monkeypatch.setattr(native, "extension", lambda: found)


def random_codes(bits, *shape):
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, shape, dtype=torch.int8)


def pack_one_by_one(codes, bits):
    """The layout of ops/bits.py, one code at a time."""
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    rows = []
    for row in codes.tolist():
        u = [code + (1 << bits - 1) for code in row + [0] * (-len(row) % 8)]
        packed = [(u[2 * j] & 15) | (u[2 * j + 1] & 15) << 4 for j in range(len(u) // 2)]
        packed += [sum((u[4 * j + i] >> 4 & 3) << 2 * i for i in range(4)) for j in range(len(u) // 4)]
        rows.append(packed)
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(codes), row_bytes(codes.shape[1], bits))


@each_width
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition_and_returns(shape, bits, implementation):
    codes = random_codes(bits, *shape)
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, pack_one_by_one(codes, bits))
    assert torch.equal(unpack_bits(packed, shape[1], bits), codes)


@each_width
def test_every_code_in_every_place(bits, implementation):
    codes = (torch.arange(1 << bits)[:, None] + torch.arange(75) * 5) % (1 << bits) - (1 << bits - 1)
    codes = codes.to(torch.int8)
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, reference_bytes.pack_bits(codes, bits))
    assert torch.equal(unpack_bits(packed, 75, bits), codes)


@each_width
def test_unpack_accepts_any_bytes(bits, implementation):
    packed = torch.randint(0, 256, (50, row_bytes(77, bits)), dtype=torch.uint8)
    codes = unpack_bits(packed, 77, bits)
    assert torch.equal(codes, reference_bytes.unpack_bits(packed, 77, bits))
    assert codes.min() == -(1 << bits - 1)
    assert codes.max() == (1 << bits - 1) - 1


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_round_trip(data):
    """Any matrix round-trips, and agrees with the reference."""
    bits = data.draw(st.sampled_from(WIDTHS))
    rows, columns = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 140))
    codes = st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
    flat = data.draw(st.lists(codes, min_size=rows * columns, max_size=rows * columns))
    matrix = torch.tensor(flat, dtype=torch.int8).reshape(rows, columns)
    packed = pack_bits(matrix, bits)
    assert torch.equal(packed, reference_bytes.pack_bits(matrix, bits))
    assert torch.equal(unpack_bits(packed, columns, bits), matrix)


@each_width
@pytest.mark.parametrize("threads", [1, 3])
def test_large_inputs_in_threads(bits, threads):
    """Enough rows for several threads; the first bad code is named whichever thread finds one first."""
    native_code = native.extension()
    if native_code is None:
        pytest.skip("pgolf_fast._C was not built")
    codes = random_codes(bits, 1100, 1031).numpy()
    packed = native_code.pack_bits(codes, bits, threads)
    assert np.array_equal(packed, native_code.pack_bits(codes, bits, 1, simd=False))
    assert np.array_equal(native_code.unpack_bits(packed, 1031, bits, threads), codes)
    if bits < 8:
        codes[[7, 500, 1099], [1030, 3, 0]] = 100
        with pytest.raises(ValueError, match=r"codes\[7, 1030\] is 100"):
            native_code.pack_bits(codes, bits, threads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_width
def test_dequantize_is_the_formula_to_the_bit(shape, bits, implementation):
    codes = random_codes(bits, *shape)
    packed = pack_bits(codes, bits)
    for scale in (torch.randn(shape[0]), torch.randn(shape[0]).half()):
        for dtype in DTYPES:
            values = dequantize_bits(packed, scale, shape[1], bits, dtype)
            assert values.dtype == dtype
            assert torch.equal(values, (codes.float() * scale.float()[:, None]).to(dtype))


def test_bfloat16_rounds_to_nearest_even(implementation):
    """All 8-bit codes times scales at, near and between ties, at the ends of the range, and NaN."""
    mantissas = torch.arange(0x3F800000, 0x3F820000, 0x0FFF, dtype=torch.int32).view(torch.float32)
    special = [0.0, -0.0, 2.0**-149, 2.0**-133, 3e38, -3.3e38, float("inf"), -float("inf"), float("nan")]
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    scale = torch.cat([mantissas, torch.tensor(special), nans])
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).expand(len(scale), -1)
    for dtype in DTYPES:
        values = dequantize_bits(pack_bits(codes, 8), scale, 256, 8, dtype)
        want = (codes.float() * scale[:, None]).to(dtype)
        assert torch.equal(values.isnan(), want.isnan())
        assert torch.equal(values.signbit()[~want.isnan()], want.signbit()[~want.isnan()])
        assert torch.equal(values.nan_to_num(), want.nan_to_num())


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "chunked": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(5, -1),
}


@each_width
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, bits, implementation):
    codes = LAYOUTS[layout](random_codes(bits, 6, 21))
    packed = pack_bits(codes, bits)
    assert torch.equal(packed, pack_one_by_one(codes, bits))
    strided = LAYOUTS[layout](packed)
    assert torch.equal(unpack_bits(strided, 21, bits), unpack_bits(strided.contiguous(), 21, bits))
    scale = torch.randn(len(strided), 2)[:, 0]
    values = dequantize_bits(strided, scale, 21, bits, torch.float32)
    assert torch.equal(values, unpack_bits(strided, 21, bits) * scale[:, None])


@pytest.mark.parametrize("end", ["below", "above", "smallest", "largest"])
@pytest.mark.parametrize("bits", WIDTHS[:-1])
@pytest.mark.parametrize("place", [(0, 0), (1, 7), (2, 34), (3, 42)])
def test_names_the_code_out_of_range(place, bits, end, implementation):
    half = 1 << bits - 1
    codes = random_codes(bits, 4, 43)
    value = {"below": -half - 1, "above": half, "smallest": -128, "largest": 127}[end]
    codes[place] = value
    message = (
        rf"pgolf::pack_bits: codes\[{place[0]}, {place[1]}\] is {value}, "
        rf"but {bits}-bit codes are in {-half}\.\.{half - 1}"
    )
    with pytest.raises(ValueError, match=message):
        pack_bits(codes, bits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_width
def test_gpu_agrees_with_cpu(bits):
    codes, scale = random_codes(bits, 70, 133), torch.rand(70).half()
    packed = pack_bits(codes, bits)
    assert torch.equal(pack_bits(codes.cuda(), bits).cpu(), packed)
    assert torch.equal(unpack_bits(packed.cuda(), 133, bits).cpu(), codes)
    for dtype in DTYPES:
        values = dequantize_bits(packed.cuda(), scale.cuda(), 133, bits, dtype)
        assert torch.equal(values.cpu(), dequantize_bits(packed, scale, 133, bits, dtype))


@each_width
def test_opcheck(bits):
    codes = random_codes(bits, 5, 20)
    packed, scale = pack_bits(codes, bits), torch.rand(5)
    torch.library.opcheck(pack_bits, (codes, bits))
    torch.library.opcheck(pack_bits, (random_codes(bits, 20, 5).t(), bits))
    torch.library.opcheck(unpack_bits, (packed, 20, bits))
    torch.library.opcheck(unpack_bits, (packed.t().contiguous().t(), 20, bits))
    torch.library.opcheck(dequantize_bits, (packed, scale, 20, bits, torch.bfloat16))


@each_width
def test_compiles_without_graph_break(bits):
    codes, scale = random_codes(bits, 5, 20), torch.rand(5).half()

    def there_and_back(codes, scale):
        packed = pack_bits(codes, bits)
        return unpack_bits(packed, 20, bits), dequantize_bits(packed, scale, 20, bits, torch.float32) * 2

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(codes, scale), there_and_back(codes, scale))


def test_rejects_bad_input():
    packed, scale = pack_bits(random_codes(6, 4, 16), 6), torch.ones(4)
    with pytest.raises(ValueError, match=r"pgolf::pack_bits: codes\.dtype is torch\.int32"):
        pack_bits(torch.zeros(2, 2, dtype=torch.int32), 6)
    with pytest.raises(ValueError, match=r"codes\.shape is \(3,\), but \(any, any\) is needed"):
        pack_bits(random_codes(6, 3), 6)
    with pytest.raises(ValueError, match="pgolf::pack_bits: bits is 3, but codes have 6 or 8 bits"):
        pack_bits(random_codes(6, 3, 3), 3)
    with pytest.raises(ValueError, match=r"packed\.shape is \(4, 12\), but \(any, 18\) is needed"):
        unpack_bits(packed, 17, 6)
    with pytest.raises(ValueError, match="columns is -1"):
        unpack_bits(packed, -1, 6)
    with pytest.raises(ValueError, match=r"scale\.shape is \(3,\), but \(4,\) is needed"):
        dequantize_bits(packed, torch.ones(3), 16, 6, torch.float32)
    with pytest.raises(ValueError, match=r"scale\.dtype is torch\.float64"):
        dequantize_bits(packed, scale.double(), 16, 6, torch.float32)
    with pytest.raises(ValueError, match=r"dtype is torch\.float16, but torch\.float32 or torch\.bfloat16"):
        dequantize_bits(packed, scale, 16, 6, torch.float16)


def test_the_extension_checks_for_itself():
    native_code = native.extension()
    if native_code is None:
        pytest.skip("pgolf_fast._C was not built")
    packed, scale = np.zeros((4, 12), np.uint8), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="rows of 12 bytes, which do not hold 17 codes of 6 bits"):
        native_code.unpack_bits(packed, 17, 6)
    with pytest.raises(ValueError, match="bits is 9"):
        native_code.unpack_bits(packed, 12, 9)
    with pytest.raises(ValueError, match="bits is 3"):
        native_code.pack_bits(np.zeros((2, 2), np.int8), 3)
    with pytest.raises(ValueError, match="differ in rows"):
        native_code.dequantize_bits(packed, scale[:3], 6, np.empty((4, 16), np.float32))
