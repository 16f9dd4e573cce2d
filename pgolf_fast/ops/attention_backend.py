"""Backends of softmax(q k^T) v inside `gqa_attention`: our Triton kernels, PyTorch's, or a library.

All take (B, T, heads, hd) with K and V not repeated and return the natural logsumexp (B, H, T) in float32, so
that the backward of one may follow the forward of another. `choose` forces one; otherwise a table decides.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from pgolf_fast.ops import tiles

Gradients = tuple[Tensor, Tensor, Tensor]

# name -> description, for `pgolf doctor`
NAMES = {
    "triton": "own Triton kernels, XSA inside",
    "flash": "PyTorch's flash attention",
    "cudnn": "cuDNN's attention, through PyTorch",
    "fa3": "FlashAttention 3 (package flash_attn_interface)",
    "fa4": "FlashAttention 4 (package flash_attn.cute)",
    "plain": "all scores in memory",
}
_PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}

# Backends for 16-bit heads, by preference, on every architecture. Not measured yet: PyTorch's flash kernels
# are known to train well. float32 runs on our kernels, which are exact there.
_PREFERRED = ("flash", "triton")
_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 128  # of our kernels

_chosen: str | None = None


class Shape(NamedTuple):
    """Properties of a call that determine the choice."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    windowed: bool = False  # Queries are only the last positions: libraries disagree on what causal means


def shape_of(q: Tensor, k: Tensor) -> Shape:
    return Shape(q.device, q.dtype, q.shape[-1], q.shape[1] != k.shape[1])


def choose(name: str) -> None:
    """Force a backend in this process for every call that it supports; "auto" restores the table.

    Raises ValueError for an unknown name or a package that is not installed.
    """
    global _chosen
    if name != "auto" and name not in NAMES:
        raise ValueError(f"no attention backend {name!r}; there are auto, {', '.join(NAMES)}")
    if name in _PACKAGES and not _installed(_PACKAGES[name]):
        why = f"attention backend {name!r} needs the package {_PACKAGES[name]}, which is not installed"
        raise ValueError(why)
    _chosen = None if name == "auto" else name


def backend(shape: Shape) -> str:
    """Return the backend of a call for which the op runs kernels."""
    if _chosen is not None and why_not(_chosen, shape) is None:
        return _chosen
    if tiles.forced() is not None:
        return "triton"
    if shape.dtype in _SIXTEEN_BITS and not shape.windowed:
        return next((name for name in _PREFERRED if why_not(name, shape) is None), "triton")
    return "triton"


def without_kernels(shape: Shape) -> str:
    """Return the backend of a call that runs in PyTorch: CPU, float64, an old GPU, or by choice."""
    return "plain" if why_not("flash", shape) else "flash"


def why_not(name: str, shape: Shape) -> str | None:
    """Return why `name` does not support a call on this machine, or None if it does."""
    if name == "triton":
        return None if shape.head_dim <= LARGEST_HEAD_DIM else f"heads wider than {LARGEST_HEAD_DIM}"
    if name == "plain" or (name == "flash" and shape.device.type == "cpu"):
        return None
    if shape.windowed:
        return "a window of queries"
    if shape.device.type != "cuda":
        return "no CUDA GPU"
    if name in _PACKAGES and not _installed(_PACKAGES[name]):
        return f"package {_PACKAGES[name]} is not installed"
    if shape.dtype not in _SIXTEEN_BITS:
        return "16-bit heads only"
    if shape.head_dim % 8 or shape.head_dim > (256 if name == "flash" else 128):
        return f"heads of {shape.head_dim} channels"
    capability = torch.cuda.get_device_capability(shape.device)
    if capability < (8, 0) or (name == "fa3" and capability[0] != 9) or (name == "fa4" and capability[0] < 9):
        return f"compute capability {capability[0]}.{capability[1]}"
    return None


def available(device: torch.device, head_dim: int = 64) -> list[tuple[str, str, str]]:
    """Return each backend's name, description, and "chosen", "available" or why not, for 16-bit heads."""
    shape = Shape(device, torch.bfloat16, head_dim)
    served = device.type == "cuda" or tiles.forced() is not None
    chosen = backend(shape) if served else "flash"
    rows = []
    for name, what in NAMES.items():
        reason = "kernels need a CUDA GPU" if name == "triton" and not served else why_not(name, shape)
        rows.append((name, what, "chosen" if name == chosen else reason or "available"))
    return rows


def forward(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute causal attention at scale 1 / sqrt(hd) and its logsumexp (B, H, W).

    q (B, W, H, hd), k and v (B, T, KV, hd); y is like q. W < T means the last W positions, which only "plain"
    and, on a CPU, "flash" support. Not for "triton".
    """
    return _RUN[name][0](q, k, v)


def backward(name: str, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    """Return gradients of q, k and v, in float32 or v's dtype; `y` enters only through row sums of dy * y."""
    return _RUN[name][1](dy, q, k, v, y, lse)


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def _heads_last(dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _repeated(t: Tensor, q: Tensor) -> Tensor:
    """Repeat each head of (B, T, KV, hd) for every query head of its group."""
    return t.repeat_interleave(q.shape[2] // t.shape[2], dim=2)


def _sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    """Sum (B, T, H, hd) over each group: (B, T, KV, hd) in at least float32."""
    return grad.to(_wide(grad)).unflatten(2, (kv_heads, -1)).sum(3)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu" and q.shape[1] < k.shape[1]:
        rows = (_group_rows(q, k), *(t.to(_wide(t)) for t in _heads_first(k, v)))
        mask = _group_mask(q, k)
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, False, attn_mask=mask)
        return _ungroup_rows(y, q).to(q.dtype), lse.reshape(q.shape[0], q.shape[2], q.shape[1])
    if q.device.type == "cpu":
        # float32 is faster than bfloat16 here: 4.5 against 5.5 ms
        heads = (t.to(_wide(q)) for t in _heads_first(q, _repeated(k, q), _repeated(v, q)))
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True)
        return y.transpose(1, 2).to(q.dtype), lse
    y, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, True)
    return y.transpose(1, 2), lse


def _group_rows(t: Tensor, k: Tensor) -> Tensor:
    """Turn heads that share keys into more queries: (B, W, H, hd) -> (B, KV, H / KV * W, hd), >= float32.

    Keys and values need no repeating: 2.3 ms against 7.3 ms for "plain" (8 x 64 queries, 4 heads, 256 keys).
    """
    return t.to(_wide(t)).transpose(1, 2).reshape(t.shape[0], k.shape[2], -1, t.shape[3])


def _ungroup_rows(t: Tensor, q: Tensor) -> Tensor:
    """Invert `_group_rows`: (B, KV, H / KV * W, hd) -> (B, W, H, hd)."""
    return t.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _group_mask(q: Tensor, k: Tensor) -> Tensor:
    """Return the causal mask for `_group_rows` of the last W of T positions, as an addend (H / KV * W, T)."""
    queries, keys = q.shape[1], k.shape[1]
    mask = torch.full((queries, keys), -torch.inf, dtype=_wide(q), device=q.device).triu_(1 + keys - queries)
    return mask.repeat(q.shape[2] // k.shape[2], 1)


def _flash_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    if q.device.type == "cpu" and q.shape[1] < k.shape[1]:
        dy_rows, q_rows, y_rows = (_group_rows(t, k) for t in (dy, q, y))
        keys, values = (t.to(_wide(t)) for t in _heads_first(k, v))
        lse = lse.reshape(q_rows.shape[:3])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy_rows, q_rows, keys, values, y_rows, lse, 0.0, False, attn_mask=_group_mask(q, k)
        )
        return _ungroup_rows(dq, q), dk.transpose(1, 2), dv.transpose(1, 2)
    if q.device.type == "cpu":
        # 11 ms against 17 ms in bfloat16
        heads = (t.to(_wide(q)) for t in _heads_first(dy, q, _repeated(k, q), _repeated(v, q), y))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads, lse, 0.0, True)
        dq, dk, dv = _heads_last(*grads)
        return dq, _sum_groups(dk, k.shape[2]), _sum_groups(dv, k.shape[2])
    seed, length = torch.empty(2, dtype=torch.uint64, device=q.device), q.shape[1]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *_heads_first(dy, q, k, v, y), lse, None, None, length, length, 0.0, True, seed, seed
    )
    return _heads_last(*grads)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    heads = _heads_first(q, k, v)
    y, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True, 0.0, True)
    return y.transpose(1, 2), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def _cudnn_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    seed, length = torch.zeros((), dtype=torch.int64, device=q.device), q.shape[1]
    heads = _heads_first(dy, q, k, v, y)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *heads, lse.unsqueeze(-1), seed, seed, None, None, None, length, length, 0.0, True
    )
    return _heads_last(*grads)


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    import flash_attn_interface  # type: ignore[import-not-found]  # noqa: F401  # registers the ops used here

    y, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, softmax_scale=q.shape[-1] ** -0.5, is_causal=True)
    return y, lse


def _fa3_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    import flash_attn_interface  # noqa: F401

    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    scale = q.shape[-1] ** -0.5
    torch.ops.flash_attn_3.bwd(dy, q, k, v, y, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=True)
    return dq, dk, dv


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found]

    y, lse, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return y, lse


def _fa4_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, y, dy, lse, causal=True)
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Return scaled causal scores (B, H, W, T) in at least float32; q (B, H, W, hd), k (B, H, T, hd)."""
    scores = (q.to(_wide(q)) @ k.to(_wide(k)).mT).mul_(q.shape[-1] ** -0.5)
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
    return scores.masked_fill_(future, -torch.inf)


def _plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(q, _repeated(k, q), _repeated(v, q))
    scores = _scores(q, k)
    y = (scores.softmax(-1) @ v.to(scores.dtype)).to(q.dtype)
    return y.transpose(1, 2), scores.logsumexp(-1)


def _plain_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor) -> Gradients:
    """dS = P (dP - <dy, y>), P = exp(S - lse), dP = dy V^T; then dq = dS K, dk = dS^T q, dv = P^T dy."""
    kv_heads = k.shape[2]
    dy, q, k, v, y = _heads_first(dy, q, _repeated(k, q), _repeated(v, q), y)
    scores = _scores(q, k)
    probabilities = torch.exp(scores - lse.unsqueeze(-1))
    dy, q, k, v, y = (t.to(scores.dtype) for t in (dy, q, k, v, y))
    along = (dy * y).sum(-1, keepdim=True)
    dscores = probabilities * (dy @ v.mT - along) * q.shape[-1] ** -0.5
    dq, dk, dv = _heads_last(dscores @ k, dscores.mT @ q, probabilities.mT @ dy)
    return dq, _sum_groups(dk, kv_heads), _sum_groups(dv, kv_heads)


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


_RUN: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Gradients]]] = {
    "flash": (_flash, _flash_backward),
    "cudnn": (_cudnn, _cudnn_backward),
    "fa3": (_fa3, _fa3_backward),
    "fa4": (_fa4, _fa4_backward),
    "plain": (_plain, _plain_backward),
}
