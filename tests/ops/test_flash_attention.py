"""The attention kernels alone, with tiles of every proportion; the whole op is in test_gqa_attention."""

import pytest
import torch
from helpers import assert_as_accurate

from pgolf_fast.ops import launch, reference
from pgolf_fast.ops.launch import Launch


@pytest.fixture
def place():
    """A GPU, or the CPU with kernels interpreted."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        yield "cuda"
        return
    import interpreter

    interpreter.install()
    with launch.kernels_on_cpu("interpreter"):
        yield "cpu"


# batch, queries, positions, heads, KV heads, head dim
SHAPES = {
    "square": (1, 64, 64, 2, 1, 16),
    "odd": (2, 43, 43, 3, 3, 24),
    "group 4": (1, 37, 37, 4, 1, 16),
    "window": (2, 19, 71, 2, 1, 16),
    "one query": (2, 1, 50, 4, 2, 32),
    "one token": (3, 1, 1, 2, 2, 16),
}
# (queries, keys) of a tile: each shape in two proportions
TILES = {name: [(64, 16), (16, 32)] if n % 2 else [(32, 32), (16, 64)] for n, name in enumerate(SHAPES)}
CASES = [(shape, tiles, torch.float32) for shape in SHAPES for tiles in TILES[shape]]
CASES += [(shape, (32, 16), dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float16)]
GAINS = torch.tensor([1.5, -0.7, 0.0, 2.0])


def make(shape, dtype, device):
    """q as saved (with its gain's sign), k, v, gain, and the gradient of the context."""
    batch, queries, length, heads, kv_heads, head_dim = SHAPES[shape]
    gain = GAINS[:heads].to(device)
    q = torch.randn(batch, queries, heads, head_dim, device=device) * torch.where(gain < 0, -1, 1)[:, None]
    k, v = (torch.randn(batch, length, kv_heads, head_dim, device=device) for _ in range(2))
    g = torch.randn(batch, queries, heads, head_dim, device=device)
    return *(t.to(dtype) for t in (q, k, v)), gain, g.to(dtype)


def formula(q, k, v, gain, xsa, round_to=None):
    """Context, y . u and logsumexp in the dtype of the arguments; `round_to` rounds as eager does."""

    def rounded(t):
        return t if round_to is None else t.to(round_to).to(t.dtype)

    repeat, queries, length = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
    keys, values = (t.repeat_interleave(repeat, dim=2).transpose(1, 2) for t in (k, v))
    heads = rounded(q * gain.abs()[:, None]).transpose(1, 2)
    scores = heads @ keys.mT * q.shape[-1] ** -0.5
    future = torch.ones(queries, length, dtype=torch.bool, device=q.device).triu(1 + length - queries)
    scores = scores.masked_fill(future, -torch.inf)
    y = rounded(rounded(scores.softmax(-1)) @ values).transpose(1, 2)
    own = v[:, length - queries :]
    unit = torch.nn.functional.normalize(own, dim=-1).repeat_interleave(repeat, dim=2)
    along = (y * unit).sum(-1).transpose(1, 2)
    return rounded(reference.exclusive(y, own) if xsa else y), along, scores.logsumexp(-1)


def run_forward(q, k, v, gain, xsa, tiles):
    from pgolf_fast.kernels.flash_attention import launch_flash_attention_fwd

    context, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    along = torch.empty_like(lse)
    launch_flash_attention_fwd(q, k, v, gain, context, along, lse, xsa=xsa, tile=tiles)
    return context, along, lse


def run_backward(g, q, k, v, gain, xsa, tiles):
    """Gradients of q (times gain), k and v, by way of all four kernels."""
    from pgolf_fast.kernels import flash_attention_backward as kernels

    context, along, lse = run_forward(q, k, v, gain, xsa, tiles)
    delta, dy = torch.empty_like(lse), torch.empty_like(g) if xsa else g
    own = v.new_empty(*q.shape[:2], *v.shape[2:], dtype=torch.float32) if xsa else None
    kernels.launch_flash_attention_bwd_delta(g, context, along, v, dy, delta, own, xsa=xsa, tile=tiles)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    rows, width = k.shape[0] * k.shape[1], k.shape[2] * k.shape[3]
    beside = v.new_full((rows, width + 7), -1.0)  # rows of dv lie apart
    dv = beside[:, 3 : 3 + width]
    kernels.launch_flash_attention_bwd_dkdv(q, k, v, gain, dy, lse, delta, own, dk, dv, tile=tiles)
    kernels.launch_flash_attention_bwd_dq(q, k, v, gain, dy, lse, delta, dq, tile=tiles)
    assert (beside[:, :3] == -1).all()
    assert (beside[:, 3 + width :] == -1).all()
    return dq, dk, dv.reshape(v.shape)


@pytest.mark.parametrize(("shape", "tiles", "dtype"), CASES, ids=str)
def test_forward(shape, tiles, dtype, place):
    q, k, v, gain, _ = make(shape, dtype, place)
    xsa = shape != "odd"
    context, along, lse = run_forward(q, k, v, gain, xsa, Launch(*tiles, 32, 4, 1))
    exact = formula(*(t.double() for t in (q, k, v, gain)), xsa)
    low = formula(*(t.float() for t in (q, k, v, gain)), xsa, round_to=dtype)
    rounding = torch.finfo(dtype).eps * exact[0].abs().max().item()
    assert_as_accurate(context, low[0], exact[0], atol=1e-6 + rounding)
    torch.testing.assert_close(lse.double(), exact[2], rtol=1e-5, atol=1e-5)
    if xsa:
        assert_as_accurate(along, low[1], exact[1], atol=1e-6 + rounding)


@pytest.mark.parametrize(("shape", "tiles", "dtype"), CASES, ids=str)
def test_backward(shape, tiles, dtype, place):
    q, k, v, gain, g = make(shape, dtype, place)
    xsa = shape != "odd"

    def gradients(wide, **options):
        leaves = [t.to(wide).requires_grad_() for t in (q, k, v)]
        gained = gain.abs().to(wide)
        # the kernel's dq is that of gain * q: attention of gained q at gain 1
        heads = (leaves[0] * gained[:, None]).detach().requires_grad_()
        context, _, _ = formula(heads, *leaves[1:], torch.ones_like(gained), xsa, **options)
        return torch.autograd.grad(context, [heads, *leaves[1:]], g.to(wide))

    exact, low = gradients(torch.double), gradients(torch.float, round_to=dtype)
    got = run_backward(g, q, k, v, gain, xsa, Launch(*tiles, 32, 4, 1))
    for mine, theirs, right in zip(got, low, exact, strict=True):
        # the yardstick rounds forward only: one rounding of p and ds, of dy, and of the result come on top,
        # also where terms of about 1 cancel
        rounding = 4 * torch.finfo(dtype).eps * max(1.0, right.abs().max().item())
        assert_as_accurate(mine, theirs.to(dtype), right, atol=1e-6 + rounding)


def test_backward_is_deterministic(place):
    """The same call twice is the same to the bit: nothing is added in an order that varies."""
    q, k, v, gain, g = make("group 4", torch.float32, place)
    first, second = (run_backward(g, q, k, v, gain, True, Launch(32, 16, 32, 4, 1)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_window_is_bitwise_the_end(place):
    """With blocks of queries at the same places, the last rows of a full run are the window's, bit by bit."""
    q, k, v, gain, _ = make("square", torch.float32, place)
    tiles = Launch(32, 16, 32, 4, 1)
    full, window = (
        run_forward(q, k, v, gain, True, tiles),
        run_forward(q[:, 32:].contiguous(), k, v, gain, True, tiles),
    )
    torch.testing.assert_close(window[0], full[0][:, 32:], rtol=0, atol=0)
    torch.testing.assert_close(window[2], full[2][:, :, 32:], rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("length", [2048, 1999])
def test_real_tiles_on_a_gpu(length, head_dim):
    """The tiles of the launch table, against PyTorch's flash attention."""
    from pgolf_fast.ops import gqa_attention_kernels as ops

    heads, kv_heads = 8, 4
    q = torch.randn(2, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, length, kv_heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gain = torch.ones(heads, device="cuda")
    got = run_forward(q, k, v, gain, False, ops._tiles("flash_attention_forward", q))[0]
    low = formula(q.float(), k.float(), v.float(), gain, False, round_to=torch.bfloat16)[0]
    exact = formula(q.double(), k.double(), v.double(), gain.double(), False)[0]
    assert_as_accurate(got, low, exact, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_more_than_2_to_the_31_elements():
    """q of 2^32 elements: the last sequence is as right as alone."""
    heads, head_dim, length = 8, 64, 2048
    batch = 2**32 // (heads * head_dim * length) + 1
    q = torch.empty(batch, length, heads, head_dim, device="cuda", dtype=torch.bfloat16).normal_()
    k = torch.randn(batch, length, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    gain, tiles = torch.ones(heads, device="cuda"), Launch(128, 64, 64, 4, 3)
    many = run_forward(q, k, k, gain, True, tiles)[0][-1]
    alone = run_forward(q[-1:].contiguous(), k[-1:].contiguous(), k[-1:].contiguous(), gain, True, tiles)[0][
        0
    ]
    torch.testing.assert_close(many, alone, rtol=0, atol=0)
