import pytest
import torch
from helpers import assert_matches_float64

from pgolf_fast.ops import attention_backend, gqa_attention, reference, tiles
from pgolf_fast.ops.attention_backend import NAMES, Shape

HAS_KERNELS = True
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def back_to_auto():
    yield
    attention_backend.choose("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_attention_equals_the_flash_kernel(dtype):
    """The fallback of GPUs without a flash kernel, against PyTorch's kernel on the CPU."""
    q, dy = (torch.randn(2, 37, 6, 10).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, 37, 3, 10).to(dtype) for _ in range(2))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    want, want_lse = attention_backend.forward("flash", q, k, v)
    y, lse = attention_backend.forward("plain", q, k, v)
    torch.testing.assert_close((y, lse), (want, want_lse), **tolerance)
    grads, wanted = (attention_backend.backward(n, dy, q, k, v, y, lse) for n in ("plain", "flash"))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    torch.testing.assert_close(grads, wanted, **tolerance)


@pytest.mark.parametrize("xsa", [False, True], ids=["full", "xsa"])
@pytest.mark.parametrize("name", ["triton", "flash", "plain"])
def test_each_backend_gives_the_same_op(name, xsa, device):
    """If the op runs kernels, each backend follows the same projection and precedes the same backward."""
    attention_backend.choose(name)
    x, qo, kv = torch.randn(2, 37, 64), torch.randn(4, 64, 64) / 8, torch.randn(4, 32, 64) / 8
    gain, value = torch.tensor([1.5, -0.7, 0.0, 2.0]), torch.randn(2, 37, 32)
    angle = 6 * torch.rand(37, 4)
    tables = [t.to(device) for t in (angle.cos(), angle.sin())]
    inputs = [t.to(device) for t in (x, qo, kv, gain, value)]
    assert_matches_float64(
        lambda *t: gqa_attention(*t, *tables, 1, num_kv_heads=2, xsa=xsa),
        lambda *t: reference.gqa_attention(*t, *tables, slot=1, num_kv_heads=2, xsa=xsa),
        inputs,
    )


@pytest.mark.parametrize("name", ["triton", "flash", "plain"])
def test_a_lone_token_has_no_gradient(name, device):
    """XSA removes a token's own value entirely, so the backend's gradients must cancel."""
    attention_backend.choose(name)
    x, qo, kv = torch.randn(3, 1, 32), torch.randn(2, 32, 32) / 6, torch.randn(2, 16, 32) / 6
    inputs = [t.to(device, torch.bfloat16).requires_grad_() for t in (x, qo, kv)]
    tables, gain = [torch.ones(1, 0, device=device)] * 2, torch.ones(2, device=device)
    out = gqa_attention(*inputs, gain, None, *tables, 0, num_kv_heads=1, xsa=True)
    # in PyTorch without kernels, one part is rounded and the other is not
    bound = 1e-5 if tiles.uses_kernels("gqa_attention", x) else 2e-2
    for grad in torch.autograd.grad(out, inputs, torch.randn_like(out)):
        assert grad.abs().max() < bound


def test_backward_of_one_follows_the_forward_of_another(device):
    """Saved tensors do not depend on the backend: changing it in between changes nothing."""
    inputs = [torch.randn(1, 35, 32), torch.randn(2, 32, 32) / 6, torch.randn(2, 16, 32) / 6, torch.ones(2)]
    inputs = [t.to(device).requires_grad_() for t in inputs]
    tables = [torch.ones(35, 0, device=device)] * 2
    grads = []
    for first, second in (("triton", "triton"), ("plain", "triton"), ("triton", "plain")):
        attention_backend.choose(first)
        out = gqa_attention(*inputs, None, *tables, 0, num_kv_heads=1, xsa=True)
        attention_backend.choose(second)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for other in grads[1:]:
        torch.testing.assert_close(other, grads[0], rtol=1e-4, atol=1e-4)


def test_default_is_ours_where_nothing_else_can():
    with tiles.kernels_on_cpu("sm90"):
        for dtype in (torch.bfloat16, torch.float32):
            assert attention_backend.backend(Shape(CPU, dtype, 64)) == "triton"
            assert attention_backend.backend(Shape(CPU, dtype, 64, windowed=True)) == "triton"
        attention_backend.choose("flash")
        assert attention_backend.backend(Shape(CPU, torch.bfloat16, 64)) == "flash"
        assert attention_backend.backend(Shape(CPU, torch.bfloat16, 64, windowed=True)) == "flash"


def test_without_kernels():
    assert attention_backend.without_kernels(Shape(CPU, torch.float64, 10)) == "flash"
    assert attention_backend.without_kernels(Shape(CPU, torch.float64, 10, windowed=True)) == "flash"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "wants"),
    [
        ((9, 0), torch.bfloat16, 64, "flash"),
        ((8, 0), torch.float16, 128, "flash"),
        ((10, 0), torch.bfloat16, 64, "flash"),
        ((9, 0), torch.bfloat16, 20, "triton"),
        ((9, 0), torch.float32, 64, "triton"),
    ],
)
def test_table(capability, dtype, head_dim, wants, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert attention_backend.backend(Shape(torch.device("cuda"), dtype, head_dim)) == wants


def test_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    gpu = torch.device("cuda")
    why = attention_backend.why_not
    assert why("triton", Shape(gpu, torch.bfloat16, 160)) == "heads wider than 128"
    assert why("flash", Shape(gpu, torch.float32, 64)) == "16-bit heads only"
    assert why("flash", Shape(gpu, torch.bfloat16, 10)) == "heads of 10 channels"
    assert why("cudnn", Shape(gpu, torch.bfloat16, 64)) == "compute capability 7.5"
    assert why("cudnn", Shape(CPU, torch.bfloat16, 64)) == "no CUDA GPU"
    assert why("flash", Shape(gpu, torch.bfloat16, 64, windowed=True)) == "a window of queries"


def test_available():
    rows = attention_backend.available(CPU)
    assert [row[0] for row in rows] == list(NAMES)
    assert {row[0]: row[2] for row in rows} | {"fa3": "", "fa4": ""} == {
        "triton": "kernels need a CUDA GPU",
        "flash": "chosen",
        "cudnn": "no CUDA GPU",
        "fa3": "",
        "fa4": "",
        "plain": "available",
    }


def test_choose_refuses(monkeypatch):
    with pytest.raises(ValueError, match="no attention backend 'sdpa'; there are auto, triton, flash, cudnn"):
        attention_backend.choose("sdpa")
    monkeypatch.setattr(attention_backend, "_installed", lambda package: False)
    with pytest.raises(ValueError, match=r"'fa4' needs the package flash_attn\.cute, which is not installed"):
        attention_backend.choose("fa4")
