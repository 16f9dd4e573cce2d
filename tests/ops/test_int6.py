"""pgolf::int6_*: the C++ codec and the torch reference agree to the bit and undo themselves."""

import pytest
import torch
from helpers import assert_as_accurate

from pgolf_fast.ops import native, reference_bytes
from pgolf_fast.ops.int6 import int6_matmul, int6_pack, int6_unpack, row_bytes

HAS_KERNELS = True
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


# x and then N. Up to 64 rows of x are the skinny kernel's; interpreted tiles are 32 wide.
MATMULS = [
    *[(3, 64, 5), (2, 3, 27, 9), (7, 1), (45, 300, 70), (64, 8, 32), (0, 8, 3), (4, 0), (4, 0, 3)],
    *[(96, 64, 32), (2, 35, 45, 70), (65, 7, 1)],
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", MATMULS, ids=str)
def test_matmul_against_float64(dtype, shape, device):
    *lead, k, n = shape
    x = torch.randn(*lead, k).to(device, dtype)
    codes, scale = random_codes(n, k).to(device), torch.rand(n).half().to(device)
    y = int6_matmul(x, int6_pack(codes), scale)
    exact = x.double() @ (codes.double() * scale.double()[:, None]).t()
    wide = torch.promote_types(dtype, torch.float32)
    low = (x.to(wide) @ codes.to(wide).t() * scale.to(wide)).to(dtype)
    assert y.is_contiguous()
    assert y.dtype == dtype
    assert_as_accurate(
        y, low, exact, atol=1e-6 + torch.finfo(dtype).eps * float(exact.abs().max() if y.numel() else 0)
    )


@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_matmul_scale_of_any_dtype(scale_dtype, rows, device):
    """Codes and scales that a narrow product could not hold: only a scaled float32 sum comes out right."""
    codes = torch.full((2, 512), 31, dtype=torch.int8, device=device)
    scale = torch.tensor([2.0**-3, -(2.0**-20)], dtype=scale_dtype, device=device)
    x = torch.full((rows, 512), 8.0, dtype=torch.float16, device=device)
    y = int6_matmul(x, int6_pack(codes), scale)  # the sum is 126,976, float16 ends at 65,504
    assert y[:, 0].eq(126_976 / 8).all()
    assert y[:, 1].eq(-126_976 / 2**20).all()


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matmul_vector_and_strided(dtype, rows, device):
    codes, scale = random_codes(5, 20).to(device), 2.0 ** torch.arange(-5, 5, device=device)[::2]
    packed = int6_pack(codes)
    x = torch.randint(-4, 5, (20, rows), device=device).to(dtype).t()
    want = (x.double() @ (codes * scale[:, None]).double().t()).to(dtype)

    def agrees(x, packed, scale, want):
        assert torch.equal(int6_matmul(x, packed, scale), want)  # sums of small integers are exact

    agrees(x, packed, scale, want)
    agrees(x[0], packed, scale, want[0])
    agrees(x[:1].expand(rows, -1), packed, scale, want[:1].expand(rows, -1))
    sliced = torch.full((rows, 27), float("nan"), dtype=dtype, device=device)
    sliced[:, 3:23] = x
    agrees(sliced[:, 3:23], packed, scale, want)
    for layout in ("transposed", "chunked"):
        agrees(x, LAYOUTS[layout](packed), scale, want)
    unaligned = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)
    assert unaligned.data_ptr() % 2
    agrees(x, unaligned, scale, want)
    one = packed.new_zeros(1, packed.shape[1] + 3)[:, : packed.shape[1]].copy_(packed[:1])  # odd row stride
    agrees(x, one, scale[:1], want[:, :1])


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
    packed = int6_pack(codes)
    torch.library.opcheck(int6_pack, (codes,))
    torch.library.opcheck(int6_pack, (random_codes(20, 5).t(),))
    torch.library.opcheck(int6_unpack, (packed, 20))
    torch.library.opcheck(int6_unpack, (packed.t().contiguous().t(), 20))


@pytest.mark.parametrize("rows", [3, 70])
def test_opcheck_matmul(rows, device):
    packed, scale = int6_pack(random_codes(5, 20)).to(device), torch.rand(5).half().to(device)
    x = torch.randn(2, rows, 20, device=device, dtype=torch.float16)
    torch.library.opcheck(int6_matmul, (x, packed, scale))
    torch.library.opcheck(int6_matmul, (x[0].t().contiguous().t(), packed, scale))


@pytest.mark.parametrize("rows", [3, 70])
def test_compiles_without_graph_break(rows, device):
    x, codes, scale = (
        torch.randn(rows, 20).to(device),
        random_codes(5, 20).to(device),
        torch.rand(5).to(device),
    )

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
