import pytest
import torch
from helpers import LAYOUTS, assert_as_accurate, lay_out

from pgolf_fast.ops import newton_schulz, reference, tiles

HAS_KERNELS = True
# interpreted tiles are 32 x 32: the last two have several, and partial ones, in every dimension
SHAPES = [(3, 32, 32), (2, 48, 16), (2, 16, 48), (4, 27, 13), (2, 1, 9), (2, 9, 1), (1, 1, 1)]
SHAPES += [(2, 40, 70), (1, 67, 45)]
EMPTY = [(0, 4, 4), (2, 0, 4), (2, 4, 0)]


@pytest.mark.pairwise
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_matches_reference(shape, dtype, steps, device):
    g = torch.randn(shape, device=device).to(dtype)
    got = newton_schulz(g, steps)
    exact = reference.newton_schulz(g.double(), steps)
    assert got.dtype == dtype
    assert got.is_contiguous()
    rounding = torch.finfo(dtype).eps / 2 * (exact.abs().max().item() if exact.numel() else 0)
    assert_as_accurate(got, reference.newton_schulz(g, steps), exact, atol=1e-6 + rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 12, 7), (3, 7, 12)], ids=str)
def test_strided_inputs(shape, layout, device):
    (g,) = lay_out(layout, [torch.randn(shape, device=device)])
    assert not g.is_contiguous()
    before = g.clone()
    got = newton_schulz(g)
    torch.testing.assert_close(got, newton_schulz(g.contiguous()))
    assert got.is_contiguous()
    assert torch.equal(g, before), "the input was changed"


@pytest.mark.parametrize("shape", [(2, 6, 4), (2, 4, 6), (0, 4, 4)], ids=str)
def test_opcheck(shape, device):
    g = torch.randn(shape, device=device)
    torch.library.opcheck(torch.ops.pgolf.newton_schulz, (g, 5))
    torch.library.opcheck(torch.ops.pgolf.newton_schulz, (g.mT, 2))
    torch.library.opcheck(torch.ops.pgolf.newton_schulz, (g, 1, [3.0, -4.0, 2.0]))


def test_compiles_without_graph_break(device):
    g = torch.randn(2, 6, 4, device=device)
    compiled = torch.compile(lambda t: newton_schulz(t) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(g), newton_schulz(g) + 1)


def test_rejects_bad_input():
    with pytest.raises(ValueError, match=r"newton_schulz: g\.shape is \(4, 4\), but \(any, any, any\)"):
        newton_schulz(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"steps is -1; it must not be negative"):
        newton_schulz(torch.ones(1, 4, 4), -1)
    with pytest.raises(ValueError, match=r"coefficients has 15 numbers, but 2 steps need 6"):
        newton_schulz(torch.ones(1, 4, 4), 2, reference.POLAR_EXPRESS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 24, 24), (4, 40, 16), (4, 16, 40)], ids=str)
def test_orthogonalizes(shape, dtype, device):
    """U S V^T becomes U S' V^T with S' between 0.68 and 1.14, however unequal S was."""
    rank = min(shape[1:])
    u, _, vh = torch.linalg.svd(torch.randn(shape, device=device), full_matrices=False)
    sizes = torch.logspace(-1, 0, rank, device=device)
    g = (u * sizes) @ vh
    got = newton_schulz(g.to(dtype)).float()
    values = torch.linalg.svdvals(got)
    assert 0.6 < values.min() < values.max() < 1.25
    in_basis = u.mT @ got @ vh.mT
    off = in_basis - torch.diag_embed(in_basis.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.05)
    assert in_basis.diagonal(dim1=1, dim2=2).min() > 0.6, "a singular vector changed its sign"


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", [(3, 9, 9), (2, 11, 6), (2, 6, 11)], ids=str)
def test_is_a_polynomial_of_the_singular_values(shape, steps, device):
    """Each step takes s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, from s / |g|, and leaves U and V alone."""
    g = torch.randn(shape, device=device, dtype=torch.double)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(newton_schulz(g, steps), (u * s.unsqueeze(1)) @ vh)


@pytest.mark.parametrize("shape", [(3, 9, 9), (2, 70, 24), (2, 24, 70)], ids=str)
def test_coefficients_of_each_step(shape, device):
    """Each step of Polar Express is its own polynomial of the singular values."""
    g = torch.randn(shape, device=device, dtype=torch.double)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / (s.square().sum(-1, keepdim=True).sqrt() + 1e-7)
    for a, b, c in torch.tensor(reference.POLAR_EXPRESS).double().view(5, 3):
        s = a * s + b * s**3 + c * s**5
    got = newton_schulz(g, 5, reference.POLAR_EXPRESS)
    torch.testing.assert_close(got, (u * s.unsqueeze(1)) @ vh, rtol=1e-5, atol=1e-5)
    low = newton_schulz(g.float(), 5, reference.POLAR_EXPRESS)
    assert_as_accurate(low, reference.newton_schulz(g.float(), 5, reference.POLAR_EXPRESS), got, atol=1e-6)


def test_slots_are_separate(device):
    """Each matrix is scaled by its own norm: neither a huge nor a zero neighbor changes it."""
    g = torch.randn(4, 10, 6, device=device)
    alone = newton_schulz(g[:1])
    g[1] *= 1e6
    g[2] = 0
    got = newton_schulz(g)
    torch.testing.assert_close(got[:1], alone)
    assert not got[2].any()
    assert torch.isfinite(got).all()


def test_a_bank_slice_of_other_strides_on_every_side(device):
    """Slot, row and column strides all differ from those of a contiguous tensor, and from each other."""
    buffer = torch.full((3, 2, 41, 2, 37), float("nan"), device=device)
    g = buffer[:, 1, :, 1]
    g.copy_(torch.randn(3, 41, 37, device=device))
    for view in (g, g.mT):
        assert not view.is_contiguous()
        torch.testing.assert_close(newton_schulz(view, 2), newton_schulz(view.contiguous(), 2))


def test_products_are_symmetric_where_tiles_meet(device):
    """Known singular vectors expose a tile stored on the wrong side of the diagonal."""
    q = torch.linalg.qr(torch.randn(1, 96, 96, device=device, dtype=torch.double))[0]
    sizes = torch.linspace(0.2, 1, 96, device=device, dtype=torch.double)
    g = (q * sizes) @ q.mT
    got = newton_schulz(g.float(), 1).double()
    s = sizes / sizes.square().sum().sqrt()
    want = (q * (3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5)) @ q.mT
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [(22, 512, 512), (22, 256, 512), (11, 1536, 512), (3, 509, 1027)], ids=str)
def test_real_tiles_on_a_gpu(shape):
    g = torch.randn(shape, device="cuda").bfloat16()
    exact = reference.newton_schulz(g.double(), 5)
    assert_as_accurate(newton_schulz(g), reference.newton_schulz(g, 5), exact, atol=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_two_to_the_31_elements_on_a_gpu():
    """The last slots have offsets that exceed 32 bits."""
    slots = 2**31 // (128 * 256) + 2
    g = torch.zeros(slots, 128, 256, dtype=torch.bfloat16, device="cuda")
    g[-3:] = torch.randn(3, 128, 256, device="cuda")
    assert tiles.uses_kernels("newton_schulz", g)
    got = newton_schulz(g, 2)
    torch.testing.assert_close(got[-3:], newton_schulz(g[-3:].contiguous(), 2), rtol=0, atol=0)
    assert not got[:5].any()


@pytest.fixture
def tables():
    """Names of the instruction sets of the C++ passes that this CPU can run; the best one is restored."""
    extension = pytest.importorskip("pgolf_fast._C")
    yield extension.runnable_passes()
    extension.choose_passes("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 15, 9), (3, 16, 64), (2, 33, 1), (2, 97, 130), (0, 3, 2), (2, 3, 0)]
)
def test_symmetric_product(shape, dtype, tables):
    """Both triangles are right and equal for every instruction set, with the same bits on any threads."""
    from pgolf_fast import _C

    x = torch.randn(shape, dtype=dtype)
    add = torch.randn(shape[0], shape[1], shape[1], dtype=dtype)
    add = add + add.mT
    rounding = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (1e-4, 2**-8)}[dtype]
    exact = -1.5 * x.double() @ x.double().mT
    for name in tables:
        _C.choose_passes(name)
        for other in (None, add):
            outs = [torch.full_like(add, torch.nan) for _ in range(3)]
            for threads, out in enumerate(outs, 1):
                bits = torch.uint16 if dtype == torch.bfloat16 else dtype
                operands = (None if t is None else t.view(bits).numpy() for t in (x, other, out))
                _C.symmetric_product(*operands, -1.5, 0.5, threads)
            wanted = exact if other is None else exact + 0.5 * add
            torch.testing.assert_close(outs[0].double(), wanted, atol=rounding[0], rtol=rounding[1])
            assert torch.equal(outs[0], outs[0].mT)
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])


def test_every_table_iterates_alike(tables):
    from pgolf_fast import _C

    g = torch.randn(2, 40, 70)
    exact = reference.newton_schulz(g.double(), 5)
    for name in tables:
        _C.choose_passes(name)
        assert_as_accurate(newton_schulz(g), reference.newton_schulz(g, 5), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 4), None, (2, 4, 4)), "x has 2 dimensions, but 3 are needed"),
        (((2, 4, 3), None, (2, 4, 3)), r"out must have the shape \(2, 4, 4\)"),
        (((2, 4, 3), (1, 4, 4), (2, 4, 4)), r"add must have the shape \(2, 4, 4\)"),
    ],
)
def test_symmetric_product_rejects(shapes, message, tables):
    from pgolf_fast import _C

    arrays = [None if shape is None else torch.zeros(shape).numpy() for shape in shapes]
    with pytest.raises(ValueError, match=message):
        _C.symmetric_product(*arrays, 1.0, 0.0)


def test_low_precision_iterates_in_float32_where_bfloat16_is_emulated(monkeypatch):
    """As accurate as one rounding of the float32 result; the gain is 40x on such a CPU."""
    g = torch.randn(2, 24, 56)
    monkeypatch.setattr("pgolf_fast.ops.native.multiplies", lambda dtype: False)
    low = g.bfloat16()
    assert torch.equal(newton_schulz(low), newton_schulz(low.float()).bfloat16())
