"""pgolf::int6_matmul against float64, and that it reads what `int6_pack` writes."""

import pytest
import torch
from helpers import assert_as_accurate

from pgolf_fast.ops import native
from pgolf_fast.ops.bits import pack_bits, unpack_bits
from pgolf_fast.ops.int6 import int6_matmul, int6_pack, int6_unpack

HAS_KERNELS = True


def random_codes(*shape):
    return torch.randint(-32, 32, shape, dtype=torch.int8)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "chunked": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(5, -1),
}


def test_int6_is_six_bits():
    codes = random_codes(5, 21)
    packed = int6_pack(codes)
    assert torch.equal(packed, pack_bits(codes, 6))
    assert torch.equal(int6_unpack(packed, 21), unpack_bits(packed, 21, 6))


# x and then N. Up to 64 rows of x are the skinny kernel's; interpreted tiles are 32 wide.
MATMULS = [
    *[(3, 64, 5), (2, 3, 27, 9), (7, 1), (45, 300, 70), (64, 8, 32), (0, 8, 3), (4, 0), (4, 0, 3)],
    *[(96, 64, 32), (2, 35, 45, 70), (65, 7, 1)],
]


@pytest.mark.pairwise
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


def as_array(t):
    return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy()


@pytest.mark.skipif(native.extension() is None, reason="no C++ codecs")
@pytest.mark.parametrize("simd", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 512, 700), (1, 45, 3), (5, 64, 9), (64, 100, 65), (3, 7, 1)], ids=str)
def test_every_form_in_cpp_and_number_of_threads(shape, dtype, simd):
    rows, k, n = shape
    x, codes, scale = torch.randn(rows, k).to(dtype), random_codes(n, k), torch.rand(n)
    packed, results = int6_pack(codes).numpy(), []
    for threads in (1, 2):
        y = torch.full((rows, n), float("nan"), dtype=dtype)
        native.extension().int6_matmul(as_array(x), packed, scale.numpy(), as_array(y), threads, simd)
        results.append(y)
    assert torch.equal(*results)
    exact = x.double() @ (codes.double() * scale.double()[:, None]).t()
    low = (x.float() @ codes.float().t() * scale).to(dtype)
    atol = 1e-6 + torch.finfo(dtype).eps * float(exact.abs().max())
    assert_as_accurate(results[0], low, exact, atol=atol)


@pytest.mark.skipif(native.extension() is None, reason="no C++ codecs")
def test_cpp_refuses_sizes_that_do_not_fit():
    x, packed, scale, y = torch.ones(2, 16), int6_pack(random_codes(4, 16)), torch.ones(4), torch.ones(2, 4)
    product = native.extension().int6_matmul
    product(*(t.numpy() for t in (x, packed, scale, y)))
    for bad in ((x[:, :8], packed, scale, y), (x, packed, scale[:3], y), (x, packed, scale, y[:1])):
        with pytest.raises(ValueError, match=r"packed has rows|scale must have|y must have"):
            product(*(t.contiguous().numpy() for t in bad))
    with pytest.raises(TypeError):
        product(x.double().numpy(), packed.numpy(), scale.numpy(), y.numpy())


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
    with pytest.raises(ValueError, match=r"pgolf::int6_matmul: packed\.shape"):
        int6_matmul(torch.ones(2, 24), packed, torch.ones(4))
    with pytest.raises(ValueError, match=r"scale\.shape is \(3,\), but \(4,\) is needed"):
        int6_matmul(torch.ones(2, 16), packed, torch.ones(3))
    with pytest.raises(ValueError, match=r"x\.dtype is torch\.int64"):
        int6_matmul(torch.ones(2, 16, dtype=torch.int64), packed, torch.ones(4))
