"""Attention of projections: the fused pass, and PyTorch where none runs."""

import pytest
import torch
from helpers import LAYOUTS, assert_matches_float64, assert_strides_do_not_matter, lay_out, results

from pgolf_fast.ops import gqa_attention, native, projected_attention, reference, tiles

# batch, queries, positions, heads, KV heads, channels of a head, rotated channels
CASES = {
    "aligned": (2, 16, 16, 4, 2, 16, 8),
    "odd": (3, 7, 7, 3, 1, 10, 6),
    "window": (2, 3, 11, 4, 2, 16, 8),
    "long window": (1, 64, 200, 2, 1, 40, 10),
    "one query": (2, 1, 33, 2, 2, 33, 6),
    "one token": (2, 1, 1, 4, 2, 16, 0),
    "blocks": (1, 300, 300, 2, 1, 8, 8),
    "no sequences": (0, 4, 4, 2, 1, 16, 8),
    "no tokens": (2, 0, 0, 2, 1, 16, 8),
    "no queries": (2, 0, 4, 2, 1, 16, 8),
}


def make(case, dtype=torch.float32):
    """Return q, k, v, gain and the tables, and the number of KV heads."""
    batch, queries, length, heads, kv_heads, head_dim, rotary = CASES[case]
    sizes = [(batch, queries, heads), (batch, length, kv_heads), (batch, length, kv_heads)]
    q, k, v = (torch.randn(*size[:2], size[2] * head_dim).to(dtype) for size in sizes)
    angles = 6 * torch.rand(length, rotary // 2)
    return [q, k, v, 1 + torch.rand(heads)], (angles.cos(), angles.sin()), kv_heads


def attention(tables, kv_heads, xsa, function=projected_attention):
    return lambda q, k, v, gain: function(q, k, v, gain, *tables, kv_heads, xsa)


def formula(tables, kv_heads, xsa):
    return attention(tables, kv_heads, xsa, reference.projected_attention)


@pytest.fixture(params=["auto", "portable", "torch"])
def way(request):
    """Run the pass of this machine's best instruction set, of the one of every machine, or PyTorch."""
    if request.param == "torch":
        tiles.choose("gqa_attention", "torch")
        yield request.param
        tiles.choose("gqa_attention", "auto")
        return
    extension = pytest.importorskip("pgolf_fast._C")
    extension.choose_passes(request.param)
    yield request.param
    extension.choose_passes("auto")


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("no")])
def test_matches_reference(case, dtype, xsa, way):
    if case == "one token" and xsa:
        pytest.skip("zero up to rounding: test_xsa_of_the_first_token_is_zero of gqa_attention")
    inputs, *rest = make(case, dtype)
    # the formula's own error on a gain, a sum over all tokens, is small by chance in some cases
    assert_matches_float64(attention(*rest, xsa), formula(*rest, xsa), inputs, factor=4)


@pytest.mark.parametrize("case", ["no sequences", "no tokens", "no queries"])
@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
@pytest.mark.parametrize("function", [projected_attention, torch.ops.pgolf.projected_attention])
@pytest.mark.parametrize("dtype", [torch.float32, torch.double])
def test_empty(function, case, xsa, dtype):
    """Also of the op itself in float64, which runs in PyTorch."""
    inputs, *rest = make(case, dtype)
    op = function if function is projected_attention else lambda *t: function(*t)[0]
    (out,), grads, _ = results(attention(*rest, xsa, op), inputs)
    assert out.shape == inputs[0].shape
    assert not any(grad.any() for grad in grads)


def test_other_dtypes_run_in_pytorch(monkeypatch):
    monkeypatch.setattr(native, "call", None)  # cannot be called
    for dtype in (torch.half, torch.double):
        inputs, *rest = make("odd", dtype)
        assert_matches_float64(attention(*rest, True), formula(*rest, True), inputs)
    if native.extension():
        inputs, *rest = make("odd")
        with pytest.raises(TypeError):
            attention(*rest, True)(*inputs)


@pytest.mark.parametrize("window", [None, 3])
def test_is_the_core_of_gqa_attention(window):
    """With identities as weights, and a value embedding."""
    x, value = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    eye, gain, angles = torch.eye(32)[None], torch.rand(2), torch.rand(9, 4)
    tables = (angles.cos(), angles.sin())
    banks = (eye.expand(2, -1, -1), eye.expand(2, -1, -1))
    want = gqa_attention(x, *banks, gain, value, *tables, 0, num_kv_heads=2, xsa=True, window=window)
    got = projected_attention(x[:, -(window or 9) :], x, x + value, gain, *tables, 2, True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, xsa, way):
    inputs, (cos, sin), kv_heads = make("window")
    tables = LAYOUTS["sliced"](cos, 0), LAYOUTS["transposed"](sin, 2)
    inputs = lay_out(layout, inputs)
    op = attention(tables, kv_heads, xsa)
    if way == "torch":  # autograd's strides are those of PyTorch's ops
        want = results(op, [t.contiguous() for t in inputs], [torch.ones_like(inputs[0])])
        torch.testing.assert_close(results(op, inputs, [torch.ones_like(inputs[0])]), want)
    else:
        assert_strides_do_not_matter(op, inputs)


def test_inputs_are_left_alone():
    inputs, *rest = make("window")
    before = [t.clone() for t in inputs]
    for xsa in (True, False):
        results(attention(*rest, xsa), inputs)
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize(("case", "xsa"), [("window", True), ("aligned", False), ("no tokens", True)])
def test_opcheck(case, xsa):
    inputs, tables, kv_heads = make(case)
    leaves = [t.requires_grad_() for t in lay_out("transposed", inputs)]
    torch.library.opcheck(torch.ops.pgolf.projected_attention, (*leaves, *tables, kv_heads, xsa))
    with torch.no_grad():
        out, *saved = torch.ops.pgolf.projected_attention(*leaves, *tables, kv_heads, xsa)
    backward = (torch.randn_like(out), saved, inputs[3].detach(), *tables, xsa)
    torch.library.opcheck(torch.ops.pgolf.projected_attention_backward, backward)


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
def test_gradcheck(xsa, monkeypatch):
    """Of the op in float64, which runs in PyTorch."""
    monkeypatch.setitem(CASES, "small", (2, 2, 3, 2, 1, 4, 2))
    inputs, *rest = make("small", torch.double)
    leaves = [t.double().requires_grad_() for t in inputs]
    op = torch.ops.pgolf.projected_attention
    torch.autograd.gradcheck(attention(*rest, xsa, lambda *t: op(*t)[0]), leaves)


@pytest.mark.parametrize("case", ["aligned", "window"])
def test_compiles_without_graph_break(case):
    inputs, *rest = make(case)
    op, ones = attention(*rest, True), [torch.ones_like(inputs[0])]

    def run(*t):
        return op(*t).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = (results(function, inputs, ones) for function in (run, compiled))
    torch.testing.assert_close(got, want)


def test_no_gain_has_a_gradient_it_was_not_asked_for():
    inputs, *rest = make("window")
    q, k, v = (t.requires_grad_() for t in inputs[:3])
    attention(*rest, True)(q, k, v, inputs[3]).sum().backward()
    assert inputs[3].grad is None
    assert all(t.grad is not None for t in (q, k, v))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(16, 64)}, r"q\.shape is \(16, 64\), but \(any, any, any\) is needed"),
        ({"k": torch.ones(16)}, r"k\.shape is \(16,\), but \(any, any, any\) is needed"),
        ({"k": torch.ones(2, 16, 64)}, r"k\.shape is \(2, 16, 64\), but \(2, 16, 32\) is needed"),
        ({"v": torch.ones(2, 15, 32)}, r"v\.shape is \(2, 15, 32\), but \(2, 16, 32\) is needed"),
        ({"q": torch.ones(2, 17, 64)}, r"q has 17 positions, but k has 16: give at most those"),
        ({"q": torch.ones(3, 16, 64)}, r"k\.shape is \(2, 16, 32\), but \(3, 16, 32\) is needed"),
        ({"q_gain": torch.ones(5)}, r"width 64, 5 heads and 2 KV heads do not divide"),
        ({"num_kv_heads": 3}, r"width 64, 4 heads and 3 KV heads do not divide"),
        ({"cos": torch.ones(15, 4)}, r"cos\.shape is \(15, 4\), but \(16, any\)"),
        ({"sin": torch.ones(16, 3)}, r"sin\.shape is \(16, 3\), but \(16, 4\)"),
        ({"cos": torch.ones(16, 9), "sin": torch.ones(16, 9)}, r"cos turns 18 channels of 16 per head"),
        ({"v": torch.ones(2, 16, 32).half()}, r"v\.dtype is torch\.float16, but q\.dtype is torch\.float32"),
        ({"q_gain": torch.ones(4, device="meta")}, r"q_gain\.device is meta, but q\.device is cpu"),
    ],
    ids=lambda p: "-".join(p) if isinstance(p, dict) else "",
)
def test_rejects_bad_input(changes, message, way):
    (q, k, v, gain), (cos, sin), kv_heads = make("aligned")
    call = {"q": q, "k": k, "v": v, "q_gain": gain, "cos": cos, "sin": sin}
    call |= {"num_kv_heads": kv_heads, "xsa": True}
    with pytest.raises(ValueError, match="pgolf::projected_attention: " + message):
        projected_attention(**{**call, **changes})
