"""grad_bank[slot] += left @ right: in the bank's precision, for any strides, bitwise reproducible."""

import pytest
import torch
from helpers import LAYOUTS, assert_as_accurate
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_fast.ops import tiles
from pgolf_fast.ops.bank_grad import _depth_per_split, add_matmul, product
from pgolf_fast.ops.gqa_attention_kernels import add_factors
from pgolf_fast.ops.tiles import Tile

HAS_KERNELS = True


@pytest.fixture(autouse=True, params=["triton", "torch"])
def implementation(request):
    """Our kernels, where there are any, and the library, which is the default."""
    if request.param == "torch" and "interpreter" in request.node.callspec.params.values():
        pytest.skip("the same as on the CPU")
    tiles.choose("weight_grad", request.param)
    yield
    tiles.choose("weight_grad", "auto")


# rows of the weight, rows of data, columns of the weight; interpreted, 600 rows are summed in two parts
SHAPES = [(64, 96, 32), (40, 600, 70), (33, 31, 1), (1, 1, 1), (1, 300, 1), (0, 5, 3), (4, 0, 5), (4, 5, 0)]


def make(shape, dtype, bank_dtype=torch.float32, device="cpu"):
    """A bank that starts with large values, which exposes overwriting or adding in a narrower dtype."""
    n, rows, k = shape
    left = torch.randn(rows, n, device=device).to(dtype).T
    right = torch.randn(rows, k, device=device).to(dtype)
    return (100 * torch.randn(3, n, k, device=device)).to(bank_dtype), left, right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adds_to_its_slot(shape, dtype, device):
    bank, left, right = make(shape, dtype, device=device)
    before = bank.clone()
    add_matmul(bank, 1, left, right)
    exact = before[1].double() + left.double() @ right.double()
    # PyTorch's float32 product rounds every time it adds to the large bank; the kernels only once
    kept = tiles.uses_kernels("weight_grad", left) or device == "cuda"
    low = before[1] + (left.float() @ right.float() if kept else (left @ right).float())
    rounding = 2**-20 * exact.abs().amax().item() if exact.numel() else 0
    assert_as_accurate(bank[1], low, exact, atol=rounding)
    assert torch.equal(bank[::2], before[::2])


@pytest.mark.parametrize("bank_dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [5, 600])
def test_banks_of_any_dtype(rows, bank_dtype, device):
    bank, left, right = make((10, rows, 40), torch.bfloat16, bank_dtype, device)
    bank /= 50
    exact = bank[2].double() + left.double() @ right.double()
    low = (bank[2].float() + (left @ right).float()).to(bank_dtype)
    add_matmul(bank, 2, left, right)
    assert_as_accurate(bank[2], low, exact, atol=torch.finfo(bank_dtype).eps * float(exact.abs().max()))
    if bank_dtype == torch.float64 and tiles.uses_kernels("weight_grad", left):
        assert (bank[2] - exact).abs().max() < 1e-4


@pytest.mark.parametrize("rows", [37, 600])
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
def test_strided_inputs(layout, rows, device):
    bank, left, right = make((35, rows, 40), torch.float32, device=device)
    if layout == "contiguous":
        left, right = left.contiguous(), right.T.contiguous().T
        strided_bank = bank.mT.contiguous().mT
    else:
        left, right = LAYOUTS[layout](left, 1), LAYOUTS[layout](right, 2)
        strided_bank = LAYOUTS["transposed" if layout == "expanded" else layout](bank, 3)  # a copy
    assert strided_bank.stride() != bank.stride()
    add_matmul(strided_bank, 0, left, right)
    add_matmul(bank, 0, left.contiguous(), right.contiguous())
    torch.testing.assert_close(strided_bank, bank, rtol=1e-5, atol=1e-4)


def test_same_bits_every_time(device):
    bank, left, right = make((70, 700, 40), torch.bfloat16, device=device)
    banks = [bank.clone(), bank.clone()]
    for b in banks:
        add_matmul(b, 1, left, right)
    assert torch.equal(*banks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_q_k_v_gradients_in_one_product(dtype, device):
    """The merged factors of the kernels add what three separate ones add."""
    q, kv, context = torch.randn(70, 48), torch.randn(70, 2, 24), torch.randn(70, 48)
    merged, x, out = torch.cat((q, kv.flatten(1)), 1), torch.randn(70, 48), torch.randn(70, 48)
    merged, x, out, context = (t.to(device, dtype) for t in (merged, x, out, context))
    parts = merged.split((48, 24, 24), 1)
    wide = torch.promote_types(dtype, torch.float32)
    banks = [torch.randn(*shape, device=device, dtype=wide) for shape in ((6, 48, 48), (6, 24, 48))]
    one, three = ([bank.clone() for bank in banks] for _ in range(2))
    add_factors([(merged.T, x), (out.T, context)], *one, 1)
    add_factors([*((part.T, x) for part in parts), (out.T, context)], *three, 1)
    for got, bank, other in zip(one, banks, three, strict=True):
        assert torch.equal(got[[0, 2, 3, 5]], bank[[0, 2, 3, 5]])
        torch.testing.assert_close(got, other, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-4)
    for (left, right), place in zip([*((p, x) for p in parts), (out, context)], range(4), strict=True):
        (bank, got), slot = [(banks[0], one[0]), (banks[1], one[1])][place in (1, 2)], 1 + 3 * (place > 1)
        exact = bank[slot].double() + left.double().T @ right.double()
        assert_as_accurate(got[slot], bank[slot] + (left.T @ right).to(wide), exact, atol=1e-12)


def test_products_on_a_gpu_come_out_in_float32():
    with FakeTensorMode():
        left, right = (torch.empty(64, n, dtype=torch.bfloat16, device="cuda") for n in (32, 16))
        assert product(left.T, right).dtype == torch.float32
        assert product(left.T.double(), right.double()).dtype == torch.float64


def test_rows_are_split_to_fill_a_gpu():
    tile = Tile(128, 256, 64)

    def splits(n, k, depth):
        own = _depth_per_split(torch.empty(n, k), depth, tile)
        assert own % tile.block_k == 0
        return -(-depth // own)

    assert splits(1536, 512, 98_304) == 11  # 24 tiles for 132 multiprocessors of two blocks each
    assert splits(1536, 512, 1_024) == 2  # short sums are worth fewer parts
    assert splits(1536, 512, 100) == 1
    assert splits(8192, 2048, 98_304) == 1  # enough tiles as it is
    assert splits(1, 1, 1) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_offsets_beyond_32_bits():
    rows = 2**31 // 1024 + 1000
    left = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    right = torch.zeros(rows, 128, dtype=torch.bfloat16, device="cuda")
    left[-900:], right[-900:] = torch.randn_like(left[-900:]), torch.randn_like(right[-900:])
    bank = torch.zeros(1, 1024, 128, device="cuda")
    add_matmul(bank, 0, left.T, right)
    exact = left[-900:].double().T @ right[-900:].double()
    torch.testing.assert_close(bank[0].double(), exact, rtol=1e-4, atol=1e-3)
