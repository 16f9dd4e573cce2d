import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    LAYOUTS,
    assert_adds_to_banks,
    assert_matches_float64,
    assert_strides_do_not_matter,
    lay_out,
    results,
    slow,
)

from pgolf_fast.ops import cases, gqa_attention, native, reference, tiles
from pgolf_fast.ops.case import Sizes

op_module = importlib.import_module("pgolf_fast.ops.gqa_attention")  # the package's name is the function

HAS_KERNELS = True


def sizes(batch, length, heads, kv_heads, head_dim, rotary):
    return Sizes(batch, length, heads * head_dim, heads, kv_heads, rotary)


CASES = {
    "aligned": sizes(2, 16, 4, 2, 16, 8),
    "odd": sizes(3, 7, 3, 1, 10, 6),
    "ratio 1": sizes(2, 5, 2, 2, 32, 32),
    "ratio 4": sizes(1, 33, 4, 1, 16, 16),
    "one token": sizes(2, 1, 4, 2, 16, 8),
    "one row": sizes(1, 1, 1, 1, 16, 0),
    "head dim 64": sizes(1, 20, 2, 1, 64, 16),
    "head dim 128": sizes(1, 9, 2, 1, 128, 128),
    "long": sizes(1, 130, 2, 1, 16, 4),
    "tiles": sizes(2, 40, 4, 2, 16, 8),
    "head dim 24": sizes(1, 35, 3, 3, 24, 8),
    "head dim 48": sizes(2, 33, 2, 1, 48, 0),
    "head dim 5": sizes(2, 63, 2, 1, 5, 4),
    "no rows": sizes(0, 4, 2, 1, 16, 8),
    "no tokens": sizes(2, 0, 2, 1, 16, 8),
}
LAYERS, SLOT = cases.LAYERS, cases.LAYER


def make(case, dtype=torch.float32, device="cpu", value_embed=True):
    """x, qo bank, kv bank, q gain (float32, as in the network), value embedding; cos and sin."""
    s = CASES[case]
    x = torch.randn(s.batch, s.length, s.dim)
    qo = torch.randn(2 * LAYERS, s.dim, s.dim) * s.dim**-0.5
    kv = torch.randn(2 * LAYERS, s.kv_dim, s.dim) * s.dim**-0.5
    value = torch.randn(s.batch, s.length, s.kv_dim) if value_embed else None
    gain = (1 + torch.rand(s.heads)).to(device)
    angles = 6 * torch.rand(s.length, s.rotary // 2, device=device)
    x, qo, kv, value = (t if t is None else t.to(device, dtype) for t in (x, qo, kv, value))
    return [x, qo, kv, gain, value], (angles.cos(), angles.sin())


def attention(case, tables, xsa, slot=SLOT, window=None):
    kv_heads = CASES[case].kv_heads

    def op(x, qo, kv, gain, value, grad_qo=None, grad_kv=None):
        return gqa_attention(
            x,
            qo,
            kv,
            gain,
            value,
            *tables,
            slot,
            num_kv_heads=kv_heads,
            xsa=xsa,
            grad_qo=grad_qo,
            grad_kv=grad_kv,
            window=window,
        )

    return op


def formula(case, tables, xsa, slot=SLOT):
    return lambda *t: reference.gqa_attention(
        *t, *tables, slot=slot, num_kv_heads=CASES[case].kv_heads, xsa=xsa
    )


def eager(case, tables, xsa):
    """The formula as a PyTorch user writes it: every step rounds to x's dtype, except XSA's own sums."""
    heads, kv_heads, head_dim = CASES[case].heads, CASES[case].kv_heads, CASES[case].head_dim

    def run(x, qo, kv, gain, value):
        q, k, v = (F.linear(x, w) for w in (qo[SLOT], kv[SLOT], kv[LAYERS + SLOT]))
        v = v if value is None else v + value
        q = q.unflatten(-1, (heads, head_dim))
        k, v = (t.unflatten(-1, (kv_heads, head_dim)) for t in (k, v))
        q, k = (reference.rotate(F.rms_norm(t, (head_dim,), eps=reference.RMS_EPS), *tables) for t in (q, k))
        q = q * gain.to(q.dtype)[:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        y = reference.exclusive(y, v) if xsa else y
        return F.linear(y.flatten(2), qo[LAYERS + SLOT])

    return run


# Of 162 combinations of shape, dtype, value embedding and XSA, about 45 cover every pair (see conftest).
# XSA of "one row" is exactly zero: test_xsa_of_the_first_token_is_zero.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLAGS = [(False, False), (True, False), (False, True), (True, True)]
GRID = [(case, d, v, x) for case in CASES for d in DTYPES for v, x in FLAGS if not (x and case == "one row")]


@pytest.mark.pairwise
@pytest.mark.parametrize(("case", "dtype", "value_embed", "xsa"), GRID)
def test_matches_reference(case, dtype, value_embed, xsa, device):
    inputs, tables = make(case, dtype, device, value_embed)
    op, exact, low = (f(case, tables, xsa) for f in (attention, formula, eager))
    assert_matches_float64(op, exact, inputs, eager=low)


# (shape, window) for the fused pass: widths that fill no vector, lengths around its tiles (192 keys forward,
# 96 backward), more than one block of keys, and many sequences, which have one block each.
PASSES = {
    "two tokens": (sizes(1, 2, 2, 2, 24, 0), None),
    "head dim 40": (sizes(1, 65, 4, 2, 40, 10), None),
    "head dim 256": (sizes(1, 97, 2, 1, 256, 32), None),
    "ratio 3": (sizes(34, 13, 3, 1, 7, 2), None),
    "windowed": (sizes(1, 200, 4, 2, 16, 8), 64),
    "one query": (sizes(2, 193, 2, 1, 33, 6), 1),
    "blocks": (sizes(1, 1000, 2, 1, 8, 8), None),
}


@pytest.fixture(params=["auto", "portable"])
def table(request):
    """Run fused passes for this machine's best instruction set, and for the one that every machine has."""
    extension = pytest.importorskip("pgolf_fast._C")
    extension.choose_passes(request.param)
    yield extension
    extension.choose_passes("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PASSES)
def test_pass_matches_reference(case, dtype, table, monkeypatch):
    shape, window = PASSES[case]
    monkeypatch.setitem(CASES, case, shape)
    inputs, tables = make(case, dtype)
    queries = window or shape.length
    exact, low = (lambda *t, f=f: f(case, tables, True)(*t)[:, -queries:] for f in (formula, eager))
    # eager's own error on a gain, a sum over all tokens, is small by chance in some cases: 4 times, not 2
    op = attention(case, tables, True, window=window)
    assert_matches_float64(op, exact, inputs, eager=low, factor=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["ratio 3", "windowed", "blocks"])
def test_pass_does_not_depend_on_threads(case, dtype, table, monkeypatch):
    shape, window = PASSES[case]
    monkeypatch.setitem(CASES, case, shape)
    inputs, tables = make(case, dtype)
    x, qo, kv, gain, _ = inputs
    q, k, v = (F.linear(x, w) for w in (qo[SLOT], kv[SLOT], kv[LAYERS + SLOT]))
    heads = [
        t.unflatten(-1, (-1, shape.dim // shape.heads)) for t in (q[:, -(window or shape.length) :], k, v)
    ]
    dcontext, rest = torch.randn_like(heads[0]), (gain, *tables, True)
    threads, got = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        context, saved = op_module._attend(*(t.flatten(2).clone() for t in heads), *rest)
        got.append((context, *saved, *op_module._attend_backward(dcontext, saved, *rest)))
    torch.set_num_threads(threads)
    for other in got[1:]:
        torch.testing.assert_close(other, got[0], rtol=0, atol=0)


def test_pytorch_runs_what_the_pass_does_not_take(monkeypatch):
    pytest.importorskip("pgolf_fast._C")
    inputs, tables = make("odd")
    want = results(attention("odd", tables, True), inputs, [torch.ones_like(inputs[0])])

    monkeypatch.setattr(native, "call", None)  # cannot be called
    with pytest.raises(TypeError):
        attention("odd", tables, True)(*inputs)
    for dtype in (torch.double, torch.half):
        results(attention("odd", tables, True), [t.to(dtype) for t in inputs])
    tiles.choose("gqa_attention", "torch")
    try:
        got = results(attention("odd", tables, True), inputs, [torch.ones_like(inputs[0])])
    finally:
        tiles.choose("gqa_attention", "auto")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def ones(*shape):
    return np.ones(shape, np.float32)


def operands():
    shapes = {
        "q": (2, 3, 4, 8),
        "k": (2, 5, 2, 8),
        "v": (2, 5, 2, 8),
        "gain": (4,),
        "cos": (5, 3),
        "sin": (5, 3),
    }
    shapes |= {"y": (2, 3, 4, 8), "context": (2, 3, 4, 8), "q_rstd": (2, 3, 4, 1), "k_rstd": (2, 5, 2, 1)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()} | {"lse": ones(2, 4, 3)}


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("q", ones(2, 3, 32), "q, k and cos have 3, 4 and 2 dimensions, but 4, 4 and 2 are needed"),
        ("q", ones(2, 3, 3, 8), r"q has shape \(2, 3, 3, 8\) and k \(2, 5, 2, 8\)"),
        ("q", np.ones((2, 3, 4, 8)), "q.dtype is float64; float32, or uint16 holding bfloat16, is needed"),
        ("k", ones(1, 5, 2, 8), r"k has shape \(1, 5, 2, 8\), but \(2, 5, 2, 8\) is needed"),
        ("v", np.ones((2, 5, 2, 8), np.uint16), "v must hold float32"),
        ("v", ones(2, 5, 2, 16)[..., ::2], "v is strided; a contiguous array is needed"),
        ("sin", ones(5, 2), r"sin has shape \(5, 2\), but \(5, 3\) is needed"),
        ("lse", ones(2, 3, 4), r"lse has shape \(2, 3, 4\), but \(2, 4, 3\) is needed"),
        ("context", ones(2, 3, 4, 9), r"context has shape .*, but \(2, 3, 4, 8\) is needed"),
    ],
)
def test_pass_rejects_bad_operands(name, bad, message):
    extension, given = pytest.importorskip("pgolf_fast._C"), operands()
    back = given | {"dcontext": given["q"], "dq": ones(2, 3, 4, 8), "dgain": ones(4)}
    back |= {"dk": ones(2, 5, 2, 8), "dv": ones(2, 5, 2, 8)}
    for run, right in ((extension.attention, given), (extension.attention_backward, back)):
        run(**right, xsa=True)
        with pytest.raises(ValueError, match=message):
            run(**{**right, name: bad}, xsa=True)


def test_matches_pytorch():
    """Another definition: PyTorch's own RMS norm and grouped-query attention, at gain 1 and without RoPE."""
    (x, qo, kv, gain, _), tables = make("aligned", value_embed=False)
    tables = tuple(t[:, :0] for t in tables)
    got = attention("aligned", tables, xsa=False)(x, qo, kv, torch.ones_like(gain), None)
    q, k, v = (F.linear(x, w) for w in (qo[SLOT], kv[SLOT], kv[LAYERS + SLOT]))
    q, k, v = (t.unflatten(-1, (-1, 16)).transpose(1, 2) for t in (q, k, v))
    q, k = (F.rms_norm(t, (16,)) for t in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, F.linear(y, qo[LAYERS + SLOT]))


@pytest.mark.parametrize("size", [1e-3, 1e-5, 0.0])
def test_small_heads(size, device):
    """Heads as small as the norm's epsilon, and zero heads, whose gradients are finite."""
    inputs, tables = make("aligned", torch.double, device)
    inputs[0], inputs[3] = size * inputs[0], inputs[3].double()
    outs, grads, douts = results(attention("aligned", tables, True), inputs)
    want, wants, _ = results(formula("aligned", tables, True), inputs, douts)
    torch.testing.assert_close((outs, grads), (want, wants))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("xsa", [slow(False, id="full"), pytest.param(True, id="xsa")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_and_negative_gains(dtype, xsa, device):
    """A head of gain 0 attends uniformly, and its gain still has a gradient."""
    inputs, tables = make("tiles", dtype, device)
    inputs[3] = torch.tensor([0.0, -1.5, 1.2, -0.3], device=device)
    op, exact, low = (f("tiles", tables, xsa) for f in (attention, formula, eager))
    assert_matches_float64(op, exact, inputs, eager=low)
    assert results(op, inputs)[1][3][0].abs() > 1e-3


def test_rounded_tables(device):
    """In bfloat16 tables, cos^2 + sin^2 is not exactly 1: rotating back does not invert the rotation."""
    inputs, tables = make("head dim 128", device=device)
    tables = tuple((1.05 * t).bfloat16().float() for t in tables)
    op, exact = (f("head dim 128", tables, True) for f in (attention, formula))
    assert_matches_float64(op, exact, inputs)


def test_heads_too_wide_for_the_kernels(monkeypatch, device):
    monkeypatch.setitem(CASES, "wide", sizes(1, 9, 2, 1, 160, 32))
    inputs, tables = make("wide", device=device)
    assert_matches_float64(attention("wide", tables, True), formula("wide", tables, True), inputs)


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
@pytest.mark.parametrize("window", [1, slow(7), 33, slow(40)])  # one token ... the whole length
def test_window_is_the_end_of_the_full_result(window, xsa, device):
    """The gradients are those of the full result when only its end is used."""
    inputs, tables = make("tiles", device=device)
    full = attention("tiles", tables, xsa)
    outs, grads, douts = results(attention("tiles", tables, xsa, window=window), inputs)
    want, wants, _ = results(lambda *t: full(*t)[:, -window:], inputs, douts)
    torch.testing.assert_close((outs, grads), (want, wants), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_window_matches_reference(dtype, device):
    inputs, tables = make("odd", dtype, device)
    ends = [lambda *t, f=f: f("odd", tables, True)(*t)[:, -3:] for f in (formula, eager)]
    assert_matches_float64(attention("odd", tables, True, window=3), ends[0], inputs, eager=ends[1])


def test_window_gradient_banks(device):
    inputs, tables = make("odd", device=device)
    slots = (SLOT, LAYERS + SLOT)
    op = attention("odd", tables, True, window=4)
    assert_adds_to_banks(op, inputs, banks=(1, 2), slots=(slots, slots))


@pytest.mark.parametrize("slot", range(LAYERS))
def test_reads_its_slots(slot, device):
    inputs, tables = make("aligned", device=device)
    outs, grads, _ = results(attention("aligned", tables, True, slot), inputs)
    torch.testing.assert_close(outs[0], formula("aligned", tables, True, slot)(*inputs))
    for grad in grads[1:3]:
        assert [bool(g.any()) for g in grad] == [s % LAYERS == slot for s in range(2 * LAYERS)]


def test_strided_tables(device):
    inputs, (cos, sin) = make("odd", device=device)
    strided = LAYOUTS["sliced"](cos, 0), LAYOUTS["transposed"](sin, 2)
    want, got = (
        results(attention("odd", t, True), inputs, [torch.ones_like(inputs[0])])
        for t in ((cos, sin), strided)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("xsa", [slow(False, id="full"), pytest.param(True, id="xsa")])  # reads one more
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs(layout, xsa, device):
    inputs, tables = make("odd", device=device)
    inputs = lay_out(layout, inputs)
    assert not any(t.is_contiguous() for t in (*inputs[:3], inputs[4]))
    assert_strides_do_not_matter(attention("odd", tables, xsa), inputs)


# opcheck takes seconds: all of its tests on one case, schema and fake tensors on the others. It does not look
# at values, so six cases are enough for shapes, flags and banks.
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
OPCHECKS = [
    ("one token", None, True, True, True, ALL),
    ("one token", None, False, False, False, ALL[::2]),
    ("aligned", None, True, True, False, ALL[::2]),
    ("aligned", None, False, False, True, ALL[::2]),
    ("ratio 1", 3, True, False, True, ALL[::2]),
    ("ratio 1", 3, False, True, False, ALL[::2]),
]


@pytest.mark.parametrize(("case", "window", "value_embed", "xsa", "banked", "checks"), OPCHECKS)
def test_opcheck(case, window, value_embed, xsa, banked, checks, device):
    inputs, tables = make(case, device=device, value_embed=value_embed)
    if case == "aligned":
        inputs = lay_out("transposed", inputs)
    x, qo, kv, gain, value = (t if t is None else t.detach().requires_grad_() for t in inputs)
    banks = (torch.ones_like(qo), torch.ones_like(kv)) if banked else (None, None)
    banks = tuple(b if b is None else b.detach() for b in banks)
    args = (x, qo, kv, gain, value, *tables, SLOT, CASES[case].kv_heads, xsa, *banks, window)
    torch.library.opcheck(torch.ops.pgolf.gqa_attention, args, test_utils=checks)
    with torch.no_grad():
        out, *saved = torch.ops.pgolf.gqa_attention(*args)
    x, qo, kv, gain = (t.detach() for t in (x, qo, kv, gain))
    backward = (torch.randn_like(out), x, qo, kv, gain, *tables, saved, SLOT, xsa, *banks, value_embed)
    torch.library.opcheck(torch.ops.pgolf.gqa_attention_backward, backward, test_utils=checks)


def test_opcheck_empty(device):
    inputs, tables = make("no tokens", device=device)
    args = (*inputs, *tables, SLOT, 1, True, None, None)
    torch.library.opcheck(torch.ops.pgolf.gqa_attention, args, test_utils=ALL[::2])


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
@pytest.mark.parametrize(("value_embed", "window"), [(False, None), (True, None), (True, 2)])
def test_gradcheck(value_embed, window, xsa, monkeypatch):
    monkeypatch.setitem(CASES, "small", sizes(2, 3, 2, 1, 4, 2))
    inputs, tables = make("small", torch.double, value_embed=value_embed)
    inputs = [t if t is None else t.double().requires_grad_() for t in inputs]
    torch.autograd.gradcheck(attention("small", tables, xsa, window=window), inputs)


@pytest.mark.parametrize(("banked", "window"), [(False, None), (True, None), (True, 5)])
def test_compiles_without_graph_break(banked, window, device):
    inputs, tables = make("aligned", device=device)
    eager_banks = [torch.randn_like(t) for t in inputs[1:3]] if banked else [None, None]
    compiled_banks = [t if t is None else t.clone() for t in eager_banks]
    op = attention("aligned", tables, xsa=True, window=window)

    def run(*args):
        return op(*args).sin()

    def outcome(function, banks):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves, *banks)
        out.sum().backward()
        return out.detach(), [t.grad for t in leaves], banks

    want = outcome(run, eager_banks)
    got = outcome(torch.compile(run, fullgraph=True, backend="aot_eager"), compiled_banks)
    torch.testing.assert_close(got, want)
    if banked:
        assert want[1][1:3] == [None, None]


def rejected(**changes):
    (x, qo, kv, gain, value), (cos, sin) = make("aligned")
    call = {"x": x, "qo_bank": qo, "kv_bank": kv, "q_gain": gain, "value_embed": value}
    call |= {"cos": cos, "sin": sin, "slot": 0, "num_kv_heads": 2, "xsa": True}
    return gqa_attention(**{**call, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(16, 64)}, r"x\.shape is \(16, 64\), but \(any, any, any\) is needed"),
        ({"x": torch.ones(2, 16, 60)}, r"qo_bank\.shape is \(6, 64, 64\), but \(any, 60, 60\) is needed"),
        ({"kv_bank": torch.ones(6, 64, 64)}, r"kv_bank\.shape is \(6, 64, 64\), but \(6, 32, 64\) is needed"),
        ({"kv_bank": torch.ones(4, 32, 64)}, r"kv_bank\.shape is \(4, 32, 64\), but \(6, 32, 64\)"),
        ({"q_gain": torch.ones(5)}, r"width 64, 5 heads and 2 KV heads do not divide"),
        ({"num_kv_heads": 3}, r"width 64, 4 heads and 3 KV heads do not divide"),
        ({"num_kv_heads": 0}, r"width 64, 4 heads and 0 KV heads do not divide"),
        ({"value_embed": torch.ones(2, 16, 64)}, r"value_embed\.shape is \(2, 16, 64\), but \(2, 16, 32\)"),
        ({"value_embed": torch.ones(2, 16, 32).half()}, r"value_embed\.dtype is torch\.float16"),
        ({"cos": torch.ones(15, 4)}, r"cos\.shape is \(15, 4\), but \(16, any\)"),
        ({"sin": torch.ones(16, 3)}, r"sin\.shape is \(16, 3\), but \(16, 4\)"),
        ({"cos": torch.ones(16, 9), "sin": torch.ones(16, 9)}, r"cos turns 18 channels of 16 per head"),
        ({"slot": 3}, r"slot is 3, but the bank has layers 0 to 2"),
        ({"slot": -1}, r"slot is -1"),
        ({"window": 0}, r"window is 0, but x has 16 positions: give 1 to 16"),
        ({"window": 17}, r"window is 17, but x has 16 positions"),
        ({"q_gain": torch.ones(4, device="meta")}, r"q_gain\.device is meta, but x\.device is cpu"),
        ({"qo_bank": torch.ones(6, 64, 64).half()}, r"qo_bank\.dtype is torch\.float16, but x\.dtype is"),
    ],
    ids=lambda p: "-".join(p) if isinstance(p, dict) else "",
)
def test_rejects_bad_input(changes, message):
    with pytest.raises(ValueError, match="pgolf::gqa_attention: " + message):
        rejected(**changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
def test_gradient_banks(xsa, dtype, device):
    inputs, tables = make("odd", dtype, device)
    slots = (SLOT, LAYERS + SLOT)
    assert_adds_to_banks(attention("odd", tables, xsa), inputs, banks=(1, 2), slots=(slots, slots))


def own_values(x, kv, value, head_dim):
    w = F.linear(x, kv[LAYERS + SLOT])
    return (w if value is None else w + value).unflatten(-1, (-1, head_dim))


@pytest.mark.parametrize("value_embed", [False, True], ids=["no ve", "ve"])
def test_xsa_is_orthogonal_to_own_value(value_embed, device):
    (x, qo, kv, gain, value), tables = make("aligned", device=device, value_embed=value_embed)
    qo[LAYERS + SLOT] = torch.eye(64)  # so that the op returns the heads themselves
    v = own_values(x, kv, value, 16).repeat_interleave(2, dim=2)
    along = {}
    for xsa in (False, True):
        out = attention("aligned", tables, xsa)(x, qo, kv, gain, value).unflatten(-1, (4, 16))
        along[xsa] = (out * v).sum(-1).abs()
    assert along[True].max() < 1e-4 < 1e-2 < along[False].median()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["one row", "one token"])
def test_xsa_of_the_first_token_is_zero(case, dtype, device):
    """It attends only to itself, so XSA removes its whole output; its gradient is zero too."""
    inputs, tables = make(case, dtype, device)
    for xsa in (True, False):
        outs, grads, _ = results(attention(case, tables, xsa), inputs)
        small = [(t.abs().max() < 16 * torch.finfo(dtype).eps).item() for t in (*outs, grads[0], grads[-1])]
        assert small == [xsa] * 3


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
def test_causal(xsa, device):
    (x, qo, kv, gain, value), tables = make("ratio 4", device=device)
    op = attention("ratio 4", tables, xsa)
    want = op(x, qo, kv, gain, value)
    for t in (1, 16, 32):
        later_x, later_value = x.clone(), value.clone()
        later_x[:, t:], later_value[:, t:] = torch.randn_like(x[:, t:]), torch.randn_like(value[:, t:])
        got = op(later_x, qo, kv, gain, later_value)
        torch.testing.assert_close(got[:, :t], want[:, :t], rtol=0, atol=1e-6)
        assert (got[:, t] - want[:, t]).abs().max() > 0.1


def test_sequences_are_separate(device):
    (x, qo, kv, gain, value), tables = make("aligned", device=device)
    op = attention("aligned", tables, True)
    alone = op(x[:1], qo, kv, gain, value[:1])
    torch.testing.assert_close(op(x, qo, kv, gain, value)[:1], alone)
