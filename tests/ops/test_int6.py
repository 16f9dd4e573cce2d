"""pgolf::int6_*: the C++ codec and the torch reference agree to the bit and undo themselves."""

import pytest
import torch

from pgolf_fast.ops import native, reference_bytes
from pgolf_fast.ops.int6 import int6_matmul, int6_pack, int6_unpack, row_bytes

SHAPES = [(4, 64), (3, 1), (5, 7), (2, 9), (3, 1027), (1, 8), (0, 8), (4, 0)]


@pytest.fixture(params=["C++", "torch"])
def implementation(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "extension", lambda: None)
    elif native.extension() is None:
        pytest.skip("pgolf_fast._C was not built")


def random_codes(*shape):
    return torch.randint(-32, 32, shape, dtype=torch.int8)


def pack_one_by_one(codes):
    """The layout of ops/int6.py, read aloud."""
    rows = []
    for row in codes.tolist():
        u = [code + 32 for code in row] + [32] * (-len(row) % 8)
        low = [(u[2 * j] & 15) | (u[2 * j + 1] & 15) << 4 for j in range(len(u) // 2)]
        high = [sum((u[4 * j + i] >> 4) << 2 * i for i in range(4)) for j in range(len(u) // 4)]
        rows.append(low + high)
    return torch.tensor(rows, dtype=torch.uint8).reshape(len(codes), row_bytes(codes.shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition_and_returns(shape, implementation):
    codes = random_codes(*shape)
    packed = int6_pack(codes)
    assert torch.equal(packed, pack_one_by_one(codes))
    assert torch.equal(int6_unpack(packed, shape[1]), codes)


def test_every_code_in_every_place(implementation):
    codes = (torch.arange(64)[:, None] + torch.arange(24) * 5) % 64
    codes = (codes - 32).to(torch.int8)
    assert torch.equal(int6_unpack(int6_pack(codes), 24), codes)
    assert torch.equal(int6_pack(codes), reference_bytes.int6_pack(codes))


def test_unpack_accepts_any_bytes(implementation):
    packed = torch.randint(0, 256, (50, row_bytes(37)), dtype=torch.uint8)
    codes = int6_unpack(packed, 37)
    assert torch.equal(codes, reference_bytes.int6_unpack(packed, 37))
    assert codes.min() >= -32
    assert codes.max() <= 31


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "chunked": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(5, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, implementation):
    codes = LAYOUTS[layout](random_codes(6, 21))
    packed = int6_pack(codes)
    assert torch.equal(packed, pack_one_by_one(codes))
    strided = LAYOUTS[layout](packed)
    assert torch.equal(int6_unpack(strided, 21), int6_unpack(strided.contiguous(), 21))


@pytest.mark.parametrize("value", [-128, -33, 32, 127])
@pytest.mark.parametrize("place", [(0, 0), (1, 7), (2, 8), (3, 18)])
def test_names_the_code_out_of_range(value, place, implementation):
    codes = random_codes(4, 19)
    codes[place] = value
    message = (
        rf"pgolf::int6_pack: codes\[{place[0]}, {place[1]}\] is {value}, but int6 codes lie in -32\.\.31"
    )
    with pytest.raises(ValueError, match=message):
        int6_pack(codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64, 5), (2, 3, 27, 9), (7, 1), (0, 8, 3), (4, 0)], ids=str)
def test_matmul_against_float64(dtype, shape, implementation):
    *lead, k, n = shape
    x, codes, scale = torch.randn(*lead, k).to(dtype), random_codes(n, k), torch.rand(n).half()
    y = int6_matmul(x, int6_pack(codes), scale)
    exact = x.double() @ (codes.double() * scale.double()[:, None]).t()
    low = (x.to(torch.promote_types(dtype, torch.float32)) @ codes.to(x.dtype).to(y.dtype).t().to(
        torch.promote_types(dtype, torch.float32)) * scale).to(dtype)  # fmt: skip
    assert y.dtype == dtype
    assert y.shape == exact.shape
    if y.numel():
        error, usual = (y.double() - exact).abs().max(), (low.double() - exact).abs().max()
        assert error <= 2 * usual + 1e-6


def test_matmul_vector_and_strided():
    codes, scale = random_codes(5, 20), torch.rand(10)[::2]
    packed = int6_pack(codes)
    x = torch.randn(20, 3).t()
    torch.testing.assert_close(int6_matmul(x, packed, scale), x @ (codes * scale[:, None]).t())
    torch.testing.assert_close(int6_matmul(x[0], packed, scale), int6_matmul(x, packed, scale)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu():
    codes, x, scale = random_codes(70, 133), torch.randn(4, 133), torch.rand(70).half()
    packed = int6_pack(codes)
    assert torch.equal(int6_pack(codes.cuda()).cpu(), packed)
    assert torch.equal(int6_unpack(packed.cuda(), 133).cpu(), codes)
    y = int6_matmul(x.cuda(), packed.cuda(), scale.cuda())
    torch.testing.assert_close(y.cpu(), int6_matmul(x, packed, scale))
    with pytest.raises(ValueError, match=r"packed\.device is cpu, but x\.device is cuda"):
        int6_matmul(x.cuda(), packed, scale.cuda())


def test_opcheck():
    codes = random_codes(5, 20)
    packed, scale = int6_pack(codes), torch.rand(5).half()
    torch.library.opcheck(int6_pack, (codes,))
    torch.library.opcheck(int6_pack, (random_codes(20, 5).t(),))
    torch.library.opcheck(int6_unpack, (packed, 20))
    torch.library.opcheck(int6_unpack, (packed.t().contiguous().t(), 20))
    torch.library.opcheck(int6_matmul, (torch.randn(2, 3, 20), packed, scale))
    torch.library.opcheck(int6_matmul, (torch.randn(20, 3).t(), packed, scale))


def test_compiles_without_graph_break():
    x, codes, scale = torch.randn(3, 20), random_codes(5, 20), torch.rand(5)

    def pack_and_multiply(x, codes, scale):
        packed = int6_pack(codes)
        return int6_matmul(x, packed, scale) + int6_unpack(packed, 20).sum()

    compiled = torch.compile(pack_and_multiply, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, codes, scale), pack_and_multiply(x, codes, scale))


def test_rejects_bad_input():
    packed = int6_pack(random_codes(4, 16))
    with pytest.raises(ValueError, match=r"pgolf::int6_pack: codes\.dtype is torch\.int32"):
        int6_pack(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"codes\.shape is \(3,\), but \(any, any\) is needed"):
        int6_pack(random_codes(3))
    with pytest.raises(ValueError, match=r"packed\.shape is \(4, 12\), but \(any, 18\) is needed"):
        int6_unpack(packed, 17)
    with pytest.raises(ValueError, match="columns is -1"):
        int6_unpack(packed, -1)
    with pytest.raises(ValueError, match=r"pgolf::int6_matmul: packed\.shape"):
        int6_matmul(torch.ones(2, 24), packed, torch.ones(4))
    with pytest.raises(ValueError, match=r"scale\.shape is \(3,\), but \(4,\) is needed"):
        int6_matmul(torch.ones(2, 16), packed, torch.ones(3))
    with pytest.raises(ValueError, match=r"x\.dtype is torch\.int64"):
        int6_matmul(torch.ones(2, 16, dtype=torch.int64), packed, torch.ones(4))
