import logging
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import assert_matches_float64
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_fast.bench import doctor
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import attention_backend, gqa_attention, reference, tiles
from pgolf_fast.ops.attention_backend import NAMES, Shape

HAS_KERNELS = True
CPU = torch.device("cpu")
HEADS = Shape(CPU, torch.bfloat16, 64)


@pytest.fixture(autouse=True)
def back_to_auto(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_backend, "_faults", {})
    monkeypatch.setenv("PGOLF_FAST_CACHE", str(tmp_path / "cache"))
    attention_backend._fa3_ops.cache_clear()
    yield
    attention_backend.choose("auto")
    attention_backend._fa3_ops.cache_clear()


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
        assert attention_backend.backend(Shape(CPU, torch.bfloat16, 64, windowed=True)) == "triton"


def test_without_kernels():
    assert attention_backend.without_kernels(Shape(CPU, torch.float64, 10)) == "flash"
    assert attention_backend.without_kernels(Shape(CPU, torch.float64, 10, windowed=True)) == "plain"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "wants"),
    [
        ((9, 0), torch.bfloat16, 64, "cudnn"),
        ((9, 0), torch.bfloat16, 256, "flash"),
        ((8, 0), torch.float16, 128, "flash"),
        ((10, 0), torch.bfloat16, 64, "flash"),
        ((9, 0), torch.bfloat16, 20, "triton"),
        ((9, 0), torch.float32, 64, "triton"),
    ],
)
def test_table(capability, dtype, head_dim, wants, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(attention_backend, "_check", lambda name, shape: None)
    assert attention_backend.backend(Shape(torch.device("cuda"), dtype, head_dim)) == wants


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU whose every library is installed; the check of each runs on the CPU, in "plain"."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention_backend, "why_not", lambda name, shape: None)
    calls = []

    def counted(*tensors):
        calls.append(1)
        return attention_backend._plain(*tensors)

    runs = dict.fromkeys(NAMES, (counted, attention_backend._plain_backward))
    runs["plain"] = (attention_backend._plain, attention_backend._plain_backward)
    monkeypatch.setattr(attention_backend, "_RUN", runs)
    return runs, calls


def test_hopper_prefers_libraries_made_for_it(hopper):
    calls = hopper[1]
    order = []
    for _ in NAMES:
        order.append(attention_backend.backend(HEADS))
        attention_backend._faults[(order[-1], *HEADS[:3])] = "broken"
    assert order == ["fa3", "fa4", "cudnn", "triton", "flash", "plain"]
    assert len(calls) == 4  # each once; not "plain", which is the definition, nor ours


def broken(kind):
    def forward(q, k, v):
        if kind == "raises":
            raise RuntimeError("no kernel image is available\nCUDA_LAUNCH_BLOCKING")
        y, lse = attention_backend._plain(q, k, v)
        return (y * 1.05, lse) if kind == "result" else (y, lse / 0.69) if kind == "logsumexp" else (y, lse)

    def backward(*tensors):
        dq, dk, dv = attention_backend._plain_backward(*tensors)
        if kind in ("dq", "dk", "dv"):
            {"dq": dq, "dk": dk, "dv": dv}[kind][0, 200, 1] = torch.nan if kind == "dq" else 9.0
        return (dq, dv, dk[:, :5]) if kind == "shape" else (dq, dk, dv)

    return forward, backward


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raises", "RuntimeError: no kernel image is available"),
        ("result", "y is off by 5."),
        ("logsumexp", "logsumexp is off by "),
        ("dq", "dq is off by nan%"),
        ("dk", "dk is off by "),
        ("dv", "dv is off by "),
        ("shape", "RuntimeError: The size of tensor"),
    ],
)
def test_a_broken_library_is_named_once_and_the_next_is_used(kind, reason, hopper, caplog):
    runs = hopper[0]
    runs["fa3"] = broken(kind)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger="pgolf_fast"):
        for _ in range(3):
            assert attention_backend.backend(HEADS) == "fa4"
    assert torch.equal(torch.get_rng_state(), state)
    assert len(caplog.messages) == 1
    start = "falling back from attention fa3 for torch.bfloat16 heads of 64 on cpu: "
    assert caplog.messages[0].startswith(start)
    assert reason in caplog.messages[0]
    assert attention_backend.backend(HEADS._replace(head_dim=32)) == "fa4"  # checked again
    assert len(caplog.messages) == 2


def test_nothing_is_checked_while_tracing_or_capturing(hopper, monkeypatch):
    runs = hopper[0]
    runs["fa3"] = broken("raises")
    with FakeTensorMode():
        assert attention_backend.backend(HEADS) == "fa3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert attention_backend.backend(HEADS) == "fa3"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention_backend.backend(HEADS) == "fa4"
    with FakeTensorMode():
        assert attention_backend.backend(HEADS) == "fa4"  # known by now


@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_pytorch_accepts_our_arguments_on_a_gpu(name):
    """With tensors without data: grouped heads go in as they are and come out with the shapes of k and v."""
    with FakeTensorMode():
        q = torch.empty(2, 128, 8, 64, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.empty(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        y, lse = attention_backend.forward(name, q, k, v)
        assert (y.shape, y.dtype) == (q.shape, q.dtype)
        assert (lse.shape, lse.dtype) == ((2, 8, 128), torch.float32)
        grads = attention_backend.backward(name, torch.empty_like(q), q, k, v, y, lse)
        assert [(g.shape, g.dtype, g.device) for g in grads] == [
            (t.shape, t.dtype, t.device) for t in (q, k, v)
        ]


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
    assert why("fa3", Shape(gpu, torch.bfloat16, 64)) == "compute capability 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention_backend, "installed", lambda package: False)
    assert why("fa3", Shape(gpu, torch.bfloat16, 64)).endswith("pgolf doctor --fetch-fa3")


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
    monkeypatch.setattr(attention_backend, "installed", lambda package: False)
    with pytest.raises(ValueError, match=r"'fa4': package flash_attn\.cute is not installed"):
        attention_backend.choose("fa4")
    with pytest.raises(ValueError, match=r"is not installed; prebuilt: pip install 'pgolf-fast\[fa3\]'"):
        attention_backend.choose("fa3")


# As the builds of `kernels` are laid out: a package whose parts import each other, with its ops as `ops`
PREBUILT = "from ._ops import ops"
PREBUILT_OPS = """
from pgolf_fast.ops import attention_backend
class ops:
    @staticmethod
    def fwd(q, k, v, *, softmax_scale, is_causal):
        assert is_causal and softmax_scale == q.shape[-1] ** -0.5
        return (*attention_backend._plain(q, k, v), None, None)
    @staticmethod
    def bwd(dy, q, k, v, y, lse, *, dq, dk, dv, softmax_scale, is_causal):
        assert is_causal and softmax_scale == q.shape[-1] ** -0.5
        for out, grad in zip((dq, dk, dv), attention_backend._plain_backward(dy, q, k, v, y, lse)):
            out.copy_(grad)
"""


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """A stand-in for the package `kernels`, and what it was asked for."""
    variant = tmp_path / "snapshots" / "0123abc" / "build" / "torch-cuda"
    variant.mkdir(parents=True)
    (variant / "__init__.py").write_text(PREBUILT)
    (variant / "_ops.py").write_text(PREBUILT_OPS)
    asked = []

    def get_kernel(repo_id, *, version):
        asked.append((repo_id, version))
        return types.SimpleNamespace(__file__=str(variant / "__init__.py"))

    module = types.ModuleType("kernels")
    module.__spec__ = types.SimpleNamespace(origin="kernels/__init__.py")
    module.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    return variant, asked


@pytest.mark.skipif(attention_backend.installed("flash_attn_interface"), reason="the package comes first")
def test_prebuilt_flash_attention_is_fetched_once_and_loaded_from_disk(prebuilt, monkeypatch):
    variant, asked = prebuilt
    assert "pgolf doctor --fetch-fa3" in attention_backend._missing("fa3")
    with pytest.raises(ImportError, match="fetch-fa3"):
        attention_backend._fa3_ops()
    assert asked == []
    assert doctor.fetch_fa3() == variant / "__init__.py"
    assert asked == [("kernels-community/flash-attn3", 1)]
    monkeypatch.setitem(sys.modules, "kernels", None)  # not needed any more
    assert attention_backend._missing("fa3") is None
    attention_backend.choose("fa3")
    assert attention_backend._check("fa3", HEADS) is None
    monkeypatch.setattr(torch, "__version__", "0.1")  # built for another PyTorch
    assert "fetch-fa3" in attention_backend._missing("fa3")


def test_fetching_says_what_is_missing(prebuilt, monkeypatch):
    def offline(repo_id, *, version):
        raise OSError("cannot reach the hub")

    sys.modules["kernels"].get_kernel = offline
    with pytest.raises(PgolfError, match="was not fetched: cannot reach the hub"):
        doctor.fetch_fa3()
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(PgolfError, match=r"kernels is not installed: pip install 'pgolf-fast\[fa3\]'"):
        doctor.fetch_fa3()


@pytest.mark.parametrize("installed", [False, True])
def test_our_folder_does_not_hide_the_package(installed, tmp_path):
    """From a checkout, `import kernels` finds our folder, but an installed package comes first."""
    root = Path(__file__).parents[2]
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    if installed:
        (package / "__init__.py").write_text(
            "def get_kernel(repo_id, *, version): raise OSError('stand-in')\n"
        )
    code = (
        "from pgolf_fast.bench import doctor; print(doctor.attention_backend.installed('kernels'))\n"
        "try: doctor.fetch_fa3()\nexcept Exception as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(tmp_path / "site")))}
    command = [sys.executable, "-c", code]  # the current folder comes first on its path
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[0] == str(installed)
    assert ("stand-in" if installed else "is not installed") in said[1]
