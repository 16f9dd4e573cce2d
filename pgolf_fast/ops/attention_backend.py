"""Backends of softmax(q k^T) v inside `gqa_attention`: our Triton kernels, PyTorch's, or a library.

All take (B, T, heads, hd) with K and V not repeated and return the natural logsumexp (B, H, T) in float32, so
that the backward of one may follow the forward of another. `choose` forces one; otherwise a table decides,
and every backend but "triton" and "plain" is compared with float64 once before it is used.
"""

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import read_json
from pgolf_fast.ops import tiles
from pgolf_fast.ops.segments import Segments, segments_of
from pgolf_fast.ops.tuned import cache_file

Gradients = tuple[Tensor, ...]  # of q, k and v

# name -> description, for `pgolf doctor`
NAMES = {
    "triton": "own Triton kernels, XSA inside",
    "flash": "PyTorch's flash attention",
    "cudnn": "cuDNN's attention, through PyTorch",
    "fa3": "FlashAttention 3 (package flash_attn_interface, or prebuilt)",
    "fa4": "FlashAttention 4 (package flash_attn.cute)",
    "plain": "all scores in memory",
}
_PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}

# Backends for 16-bit heads, by preference, then "plain". float32 runs on our kernels, which are exact there.
_PREFERRED = {
    # Heads of 64, causal, 2,048 tokens, forward, TFLOP/s on an H100 (FlashAttention-3, 2024): FA3 420, Triton
    # 342, cuDNN 334, FA2 262. cuDNN trains 1.7 to 2.3 times as fast as FA2 (Hugging Face transformers 48163).
    "sm90": ("fa3", "fa4", "cudnn", "triton", "flash"),
    "sm80": ("flash", "triton"),  # what flash was written for; in cuDNN, training is 6 % slower (same source)
    "sm100": ("flash", "triton"),  # not measured: flash runs everywhere
}
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 128  # of our kernels

_chosen: str | None = None
_faults: dict[tuple[object, ...], str | None] = {}  # what `_fault` found

# Largest error of a result, as a share of its largest value. Rounding probabilities, their gradients and all
# results to bfloat16 costs at most 0.006 at heads of 8, 64 and 128 channels.
_TOLERANCE = 0.02
_CHECKED_TOKENS = 256  # several tiles of every library

GET_FA3 = "pip install 'pgolf-fast[fa3]' && pgolf doctor --fetch-fa3"


class Shape(NamedTuple):
    """Properties of a call that determine the choice."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    windowed: bool = False  # Queries are only the last positions: libraries disagree on what causal means
    segmented: bool = False  # Positions attend only within their document segment

    @property
    def checked(self) -> tuple[object, ...]:
        """What a check of a backend depends on."""
        return (*self[:3], "segments") if self.segmented else self[:3]


def shape_of(q: Tensor, k: Tensor, segments: Segments | None = None) -> Shape:
    return Shape(q.device, q.dtype, q.shape[-1], q.shape[1] != k.shape[1], segments is not None)


def choose(name: str) -> None:
    """Force a backend in this process for every call that it supports; "auto" restores the table.

    Raises ValueError for an unknown name or a package that is not installed.
    """
    global _chosen
    if name != "auto" and name not in NAMES:
        raise ValueError(f"no attention backend {name!r}; there are auto, {', '.join(NAMES)}")
    if reason := _missing(name):
        raise ValueError(f"attention backend {name!r}: {reason}")
    _chosen = None if name == "auto" else name


def backend(shape: Shape) -> str:
    """Return the backend of a call for which the op runs kernels."""
    if _chosen is not None and why_not(_chosen, shape) is None:
        return _chosen
    if tiles.forced() is not None or shape.dtype not in _SIXTEEN_BITS or shape.windowed:
        return "triton"
    names = (*_PREFERRED[tiles.architecture(shape.device)], "plain")
    return next(name for name in names if _fault(name, shape) is None)


def without_kernels(shape: Shape) -> str:
    """Return the backend of a call that runs in PyTorch: CPU, float64, an old GPU, or by choice."""
    return "plain" if why_not("flash", shape) else "flash"


def why_not(name: str, shape: Shape) -> str | None:
    """Return why `name` does not support a call on this machine, or None if it does."""
    if name == "triton":
        return None if shape.head_dim <= LARGEST_HEAD_DIM else f"heads wider than {LARGEST_HEAD_DIM}"
    if name == "plain":
        return None
    if shape.windowed:
        return "a window of queries"
    if shape.segmented and name not in ("flash", "fa3"):
        return "document segments"
    if name == "flash" and shape.device.type == "cpu":
        return None
    if shape.device.type != "cuda":
        return "no CUDA GPU"
    if shape.dtype not in _SIXTEEN_BITS:
        return "16-bit heads only"
    if shape.head_dim % 8 or shape.head_dim > (256 if name == "flash" else 128):
        return f"heads of {shape.head_dim} channels"
    capability = torch.cuda.get_device_capability(shape.device)
    if capability < (8, 0) or (name == "fa3" and capability[0] != 9) or (name == "fa4" and capability[0] < 9):
        return f"compute capability {capability[0]}.{capability[1]}"
    return _missing(name)


def available(device: torch.device, head_dim: int = 64) -> list[tuple[str, str, str]]:
    """Return each backend's name, description, and "chosen", "available" or why not, for 16-bit heads."""
    shape = Shape(device, torch.bfloat16, head_dim)
    served = device.type == "cuda" or tiles.forced() is not None
    chosen = backend(shape) if served else "flash"
    rows = []
    for name, what in NAMES.items():
        reason = "kernels need a CUDA GPU" if name == "triton" and not served else why_not(name, shape)
        reason = reason or _faults.get((name, *shape.checked))
        rows.append((name, what, "chosen" if name == chosen else reason or "available"))
    return rows


def _fault(name: str, shape: Shape) -> str | None:
    """Return why `name` is not used for calls like `shape`, or None; checked once per process.

    Nothing is checked while a CUDA graph is captured or a compiler traces. "triton" needs no check: where it
    fails, so does the rest of the op.
    """
    key = (name, *shape.checked)
    if key in _faults or name == "plain":
        return _faults.get(key)
    reason = why_not(name, shape)
    if reason is None and name != "triton":
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if capturing or torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
            return None
        if reason := _check(name, shape):
            what = f"{shape.dtype} heads of {shape.head_dim} on {shape.device}"
            what += " with segments" if shape.segmented else ""
            console.logger.warning("falling back from attention %s for %s: %s", name, what, reason)
    _faults[key] = reason
    return reason


def _check(name: str, shape: Shape) -> str | None:
    """Compare one forward and backward of `name` with "plain" in float64; return what is wrong."""
    generator = torch.Generator().manual_seed(0)  # training's own stays where it is
    sizes = [(1, _CHECKED_TOKENS, heads, shape.head_dim) for heads in (8, 4, 4, 8)]
    drawn = [torch.randn(size, generator=generator) for size in sizes]
    more: tuple[Segments | None, ...] = ()
    try:
        if shape.segmented:  # one of them short, and the padding that compiled callers give
            bounds = [0, _CHECKED_TOKENS // 2 + 3, _CHECKED_TOKENS // 2 + 8, _CHECKED_TOKENS, _CHECKED_TOKENS]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=shape.device)
            more = (segments_of(cu_seqlens, None, 1, _CHECKED_TOKENS),)
        q, k, v, dy = (t.to(shape.device, shape.dtype) for t in drawn)
        with torch.no_grad(), tiles.on_device_of(q):
            y, lse = (t.contiguous() for t in forward(name, q, k, v, *more))
            got = (y, lse, *backward(name, dy, q, k, v, y, lse, *more))
            dy, q, k, v = (t.double() for t in (dy, q, k, v))
            y, lse = forward("plain", q, k, v, *more)
            pairs = zip(got, (y, lse, *backward("plain", dy, q, k, v, y, lse, *more)), strict=True)
            errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]
    except Exception as error:  # noqa: BLE001 - whatever a library raises, the next one may work
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    named = zip(("y", "logsumexp", "dq", "dk", "dv"), errors, strict=True)
    wrong = [f"{result} is off by {e:.1%}" for result, e in named if not e <= _TOLERANCE]  # NaN is wrong
    return ", ".join(wrong) or None


def forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None
) -> tuple[Tensor, Tensor]:
    """Compute causal attention at scale 1 / sqrt(hd) and its logsumexp (B, H, W).

    q (B, W, H, hd), k and v (B, T, KV, hd); y is like q. W < T means the last W positions, which only "plain"
    supports. Any backend but "triton", whose kernels the op launches itself; `segments` only in those that
    `why_not` names no reason against.
    """
    return _RUN[name][0](q, k, v, *(() if segments is None else (segments,)))


def backward(name: str, dy: Tensor, q: Tensor, k, v, y, lse, segments: Segments | None = None) -> Gradients:
    """Return gradients of q, k and v, in float32 or v's dtype; `y` enters only through row sums of dy * y."""
    return _RUN[name][1](dy, q, k, v, y, lse, *(() if segments is None else (segments,)))


def _packed(segments: Segments | None, *heads: Tensor) -> tuple[Tensor, ...]:
    """Flatten (B, T, heads, hd) to the B * T positions that segments divide."""
    return heads if segments is None else tuple(t.flatten(0, 1) for t in heads)


def _unpacked(y: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed y (B * T, H, hd) like q, and its logsumexp (H, B * T) as (B, H, T)."""
    return y.view(q.shape), lse.unflatten(1, q.shape[:2]).transpose(0, 1)


def _packed_lse(lse: Tensor) -> Tensor:
    return lse.transpose(0, 1).flatten(1).contiguous()


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Swap positions and heads: (B, T, H, hd) to (B, H, T, hd), and back."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    """Repeat each head of (B, T, KV, hd) for every query head of its group."""
    return t.repeat_interleave(q.shape[2] // t.shape[2], dim=2)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """Sum (B, T, H, hd) over each group: (B, T, KV, hd) in at least float32."""
    return grad.to(_wide(grad)).unflatten(2, (kv_heads, -1)).sum(3)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _flash(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        # float32 is faster than bfloat16 here: 4.5 against 5.5 ms
        heads = (t.to(_wide(q)) for t in _transposed(q, _repeated(k, q), _repeated(v, q)))
        inner = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        is_causal, mask = _causal_mask(q, segments)
        y, lse = inner(*heads, 0.0, is_causal, attn_mask=mask)
        return y.transpose(1, 2).to(q.dtype), lse
    if segments is not None:
        y, lse, *_ = torch.ops.aten._flash_attention_forward(
            *_packed(segments, q, k, v), *segments.bounds, 0.0, True, False
        )
        return _unpacked(y, lse, q)
    y, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_transposed(q, k, v), 0.0, True)
    return y.transpose(1, 2), lse


def _flash_backward(
    dy: Tensor, q: Tensor, k: Tensor, v, y, lse, segments: Segments | None = None
) -> Gradients:
    if q.device.type == "cpu":
        # 11 ms against 17 ms in bfloat16
        heads = (t.to(_wide(q)) for t in _transposed(dy, q, _repeated(k, q), _repeated(v, q), y))
        inner = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        is_causal, mask = _causal_mask(q, segments)
        grads = inner(*heads, lse, 0.0, is_causal, attn_mask=mask)
        dq, dk, dv = _transposed(*grads)
        return dq, _sum_groups(dk, k.shape[2]), _sum_groups(dv, k.shape[2])
    seed, length = torch.empty(2, dtype=torch.uint64, device=q.device), q.shape[1]
    if segments is not None:
        packed = (*_packed(segments, dy, q, k, v, y), _packed_lse(lse))
        grads = torch.ops.aten._flash_attention_backward(*packed, *segments.bounds, 0.0, True, seed, seed)
        return tuple(grad.view(t.shape) for grad, t in zip(grads, (q, k, v), strict=True))
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *_transposed(dy, q, k, v, y), lse, None, None, length, length, 0.0, True, seed, seed
    )
    return _transposed(*grads)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = _transposed(q, k, v)
    y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, True)
    return y.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def _cudnn_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    seed, length = torch.zeros((), dtype=torch.int64, device=q.device), q.shape[1]
    heads = _transposed(dy, q, k, v, y)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads, lse.unsqueeze(-1), seed, seed, None, None, None, length, length, 0.0, True
    )
    return _transposed(*grads)


def fetched_file() -> Path:
    """Return the file that says where `pgolf doctor --fetch-fa3` put FlashAttention 3, for which PyTorch."""
    return cache_file().with_name("fa3.json")


def _fetched() -> Path | None:
    try:
        found = read_json(fetched_file())
        path = Path(found["module"])
    except (OSError, PgolfError, KeyError, TypeError):
        return None
    return path if found["torch"] == torch.__version__ and path.is_file() else None


@functools.cache
def _fa3_ops() -> Any:
    """Return the namespace of FlashAttention 3's ops, the same in both packages. Never uses the network."""
    if installed(_PACKAGES["fa3"]):
        import_module(_PACKAGES["fa3"])
        return torch.ops.flash_attn_3
    spec = spec_from_file_location("pgolf_fast_fa3", _fetched() or "")
    if spec is None or spec.loader is None:
        raise ImportError(_missing("fa3"))
    sys.modules[spec.name] = module = module_from_spec(spec)  # before it runs: it imports its own parts
    spec.loader.exec_module(module)
    return module.ops


def _fa3_options(q: Tensor, segments: Segments | None) -> dict[str, Any]:
    options = {"softmax_scale": q.shape[-1] ** -0.5, "is_causal": True}
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return options if segments is None else options | dict(zip(names, segments.bounds, strict=True))


def _fa3(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    y, lse, *_ = _fa3_ops().fwd(*_packed(segments, q, k, v), **_fa3_options(q, segments))
    return (y, lse) if segments is None else _unpacked(y, lse, q)


def _fa3_backward(dy: Tensor, q: Tensor, k: Tensor, v, y, lse, segments: Segments | None = None) -> Gradients:
    grads = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    outputs = dict(zip(("dq", "dk", "dv"), _packed(segments, *grads), strict=True))
    lse = lse if segments is None else _packed_lse(lse)
    _fa3_ops().bwd(*_packed(segments, dy, q, k, v, y), lse, **outputs, **_fa3_options(q, segments))
    return grads


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found]

    y, lse, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return y, lse


def _fa4_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, y, dy, lse, causal=True)
    return dq, dk, dv


def _causal_mask(q: Tensor, segments: Segments | None) -> tuple[bool, Tensor | None]:
    """Return `is_causal` and the mask that PyTorch's CPU kernel takes, in at least float32."""
    if segments is None:
        return True, None
    visible = segments.visible(q.shape[1])
    return False, visible.new_zeros(visible.shape, dtype=_wide(q)).masked_fill_(~visible, -torch.inf)


def _scores(q: Tensor, k: Tensor, segments: Segments | None) -> Tensor:
    """Return scaled causal scores (B, H, W, T) in at least float32; q (B, H, W, hd), k (B, H, T, hd)."""
    scores = (q.to(_wide(q)) @ k.to(_wide(k)).mT).mul_(q.shape[-1] ** -0.5)
    queries, keys = scores.shape[-2:]
    if segments is not None:
        return scores.masked_fill_(~segments.visible(queries), -torch.inf)
    future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
    return scores.masked_fill_(future, -torch.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    q, k, v = _transposed(q, _repeated(k, q), _repeated(v, q))
    scores = _scores(q, k, segments)
    y = (scores.softmax(-1) @ v.to(scores.dtype)).to(q.dtype)
    return y.transpose(1, 2), scores.logsumexp(-1)


def _plain_backward(
    dy: Tensor, q: Tensor, k: Tensor, v, y, lse, segments: Segments | None = None
) -> Gradients:
    """dS = P (dP - <dy, y>), P = exp(S - lse), dP = dy V^T; then dq = dS K, dk = dS^T q, dv = P^T dy."""
    kv_heads = k.shape[2]
    dy, q, k, v, y = _transposed(dy, q, _repeated(k, q), _repeated(v, q), y)
    scores = _scores(q, k, segments)
    probabilities = torch.exp(scores - lse.unsqueeze(-1))
    dy, q, k, v, y = (t.to(scores.dtype) for t in (dy, q, k, v, y))
    along = (dy * y).sum(-1, keepdim=True)
    dscores = probabilities * (dy @ v.mT - along) * q.shape[-1] ** -0.5
    dq, dk, dv = _transposed(dscores @ k, dscores.mT @ q, probabilities.mT @ dy)
    return dq, _sum_groups(dk, kv_heads), _sum_groups(dv, kv_heads)


def _missing(name: str) -> str | None:
    """Return what must be installed for a backend, or None."""
    package = _PACKAGES.get(name)
    if package is None or installed(package) or (name == "fa3" and _fetched() is not None):
        return None
    return f"package {package} is not installed" + (f"; prebuilt: {GET_FA3}" if name == "fa3" else "")


def installed(package: str) -> bool:
    """Return whether a package can be imported. A bare folder of that name, like our kernels/, is not one."""
    try:
        spec = find_spec(package)
    except (ModuleNotFoundError, ValueError):  # the parent package is missing, or a module without a spec
        return False
    return spec is not None and spec.origin is not None


_RUN: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Gradients]]] = {
    "flash": (_flash, _flash_backward),
    "cudnn": (_cudnn, _cudnn_backward),
    "fa3": (_fa3, _fa3_backward),
    "fa4": (_fa4, _fa4_backward),
    "plain": (_plain, _plain_backward),
}
