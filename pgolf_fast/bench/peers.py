"""Other implementations of a case: eager PyTorch, torch.compile with several settings, and other packages."""

import contextlib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from pgolf_fast.bench.timer import temporarily
from pgolf_fast.ops import attention_backend, reference, reference_bytes
from pgolf_fast.ops.case import Case, Contender, Inputs, Outputs

# Peers round in other places than our ops and may accumulate in low precision: their tolerance is wider.
FACTOR = 10.0


class UnavailableError(Exception):
    """A peer that is not available here; the message names the package or setting in one line."""


@dataclass(frozen=True)
class Formula:
    """PyTorch code for a case, called with its plain inputs by name."""

    function: Callable[..., Outputs]
    backend: SDPBackend | None = None  # The only attention kernel it may use; None leaves it to PyTorch

    def contender(self, name: str, case: Case, inputs: Inputs | None = None) -> Contender:
        """Bind to `inputs`, by default the plain ones of `case`."""
        inputs = inputs or plain_inputs(case)
        trained = tuple(key for key, t in inputs.items() if t is not None and t.requires_grad)
        around: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        if self.backend is not None:
            around = functools.partial(torch.nn.attention.sdpa_kernel, self.backend)
        return Contender(name, self.function, inputs, trained, factor=FACTOR, around=around)


def plain_inputs(case: Case) -> Inputs:
    """Return the inputs of `case` with each bank replaced by its weights, so that no slice costs a bank."""
    banks = {bank for bank, _ in case.weights.values()}
    inputs = {name: t for name, t in case.inputs.items() if name not in banks}
    for weight, (bank, slot) in case.weights.items():
        inputs[weight] = case.inputs[bank].detach()[slot].clone().requires_grad_()
    return inputs


def formulas_of(case: Case) -> dict[str, Formula]:
    """Return the formulas of a case by peer name; "eager" is its definition."""
    if case.kernels == "mlp":
        activation = case.name.removeprefix("mlp-")
        return {"eager": Formula(lambda x, up, down: (plain_mlp(x, up, down, activation),))}
    if case.kernels == "gqa_attention":
        return _attention_formulas(case)
    if case.kernels == "int6_matmul":
        return {"eager": Formula(lambda **t: (unpacked_matmul(**t),)), "dense": Formula(_dense(case))}
    return {"eager": Formula(case.reference)}


def plain_mlp(x: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Compute `ops.mlp` from one layer's two weights."""
    return F.linear(reference.activation(F.linear(x, up), activation), down)


def sdpa_attention(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, q_gain: Tensor, **settings: Any
) -> Tensor:
    """Compute `ops.gqa_attention` from one layer's four weights and PyTorch's attention, all in x's dtype.

    settings: value_embed; cos, sin, num_kv_heads and xsa, as `ops.projected_attention` takes them; `inner` is
    another attention, and with `fused` q, k and v are one product.
    """
    weights = (query, key, value)
    if settings.pop("fused", False):
        rows = [len(weight) for weight in weights]
        q, k, v = F.linear(x, torch.cat(weights)).split(rows, dim=-1)
    else:
        q, k, v = (F.linear(x, weight) for weight in weights)
    v = v if (value_embed := settings.pop("value_embed")) is None else v + value_embed
    settings = {"inner": _sdpa, "dtype": x.dtype, **settings}
    return F.linear(reference.projected_attention(q, k, v, q_gain, **settings), out)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention of (B, T, heads, hd); the backend is the caller's choice."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def unpacked_matmul(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """Compute `ops.int6_matmul`, unpacking on every call and multiplying in x's dtype."""
    codes = reference_bytes.unpack_bits(packed, x.shape[-1], 6)
    return F.linear(x, (codes.to(scale.dtype) * scale[:, None]).to(x.dtype))


def _attention_formulas(case: Case) -> dict[str, Formula]:
    def eager(query: Tensor, key: Tensor, value: Tensor, out: Tensor, **t: Any) -> Outputs:
        banks: dict[str, Any] = {"qo_bank": torch.stack((query, out)), "kv_bank": torch.stack((key, value))}
        return (reference.gqa_attention(**t, **banks, slot=0, **case.options),)

    def sdpa(**t: Any) -> Outputs:
        return (sdpa_attention(**t, **case.options),)

    cuda = case.device.type == "cuda"
    return {
        "eager": Formula(eager),
        "sdpa-flash": Formula(sdpa, SDPBackend.FLASH_ATTENTION if cuda else None),
        **({"sdpa-cudnn": Formula(sdpa, SDPBackend.CUDNN_ATTENTION)} if cuda else {}),
    }


def _dense(case: Case) -> Callable[..., Outputs]:
    """Return the product with weights unpacked once and kept in x's dtype."""
    eye = torch.eye(case.sizes.dim, dtype=torch.float32, device=case.device)
    dense = unpacked_matmul(eye, case.inputs["packed"], case.inputs["scale"]).T.to(case.dtype).contiguous()
    return lambda x, packed, scale: (F.linear(x, dense.to(x.dtype)),)


def variants(case: Case) -> dict[str, Contender | str]:
    """Return our attention with every backend, by peer name, or why this machine cannot run it."""
    if case.kernels != "gqa_attention" or case.device.type != "cuda":
        return {}
    shape = attention_backend.Shape(case.device, case.dtype, case.sizes.head_dim)
    found: dict[str, Contender | str] = {}
    for name in (n for n in attention_backend.NAMES if n != "plain"):  # plain holds all scores in memory
        around = functools.partial(forced_attention, name)
        why_not = attention_backend.why_not(name, shape)
        found[f"ours-{name}"] = why_not or replace(case.ours(), name=f"ours-{name}", around=around)
    return found


def forced_attention(name: str) -> contextlib.AbstractContextManager[None]:
    """Make attention use one backend wherever it is supported ("auto": the table's)."""
    return temporarily(attention_backend.choose, name, "auto")


# The most that Inductor does for products on Hopper
_PERSISTENT: dict[str, object] = {
    "max_autotune": True,
    "triton.enable_persistent_tma_matmul": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": True,
}
# peer -> (formula to compile, else "eager"; settings of torch.compile)
COMPILED: dict[str, tuple[str, dict[str, object]]] = {
    "compile": ("sdpa-flash", {}),
    "compile-mix-off": ("sdpa-flash", {"options": {"triton.mix_order_reduction": False}}),
    "compile-max-autotune": ("sdpa-flash", {"mode": "max-autotune-no-cudagraphs"}),
    "compile-cudnn": ("sdpa-cudnn", {}),
    "compile-persistent-tma": ("sdpa-cudnn", {"options": _PERSISTENT}),
}
PLAIN = ("eager", "dense", "sdpa-flash", "sdpa-cudnn")
FOREIGN = ("liger", "gemlite")
OWN = ("ours-triton", "ours-flash", "ours-cudnn", "ours-fa3", "ours-fa4")
PEERS = (*OWN, *PLAIN, *COMPILED, *FOREIGN)
QUICK = ("eager", "dense", "sdpa-flash")


def compile_settings(peer: str) -> dict[str, object]:
    """Return the torch.compile settings of a peer. Raises UnavailableError for an option torch lacks."""
    settings = COMPILED[peer][1]
    if isinstance(options := settings.get("options"), dict):
        known = torch._inductor.list_options()
        if missing := [name for name in options if name not in known]:
            raise UnavailableError(f"torch {torch.__version__} has no Inductor option {missing[0]}")
    return settings


def applies(peer: str, case: Case) -> bool:
    """True if `peer` exists for this op, whether or not this machine has it."""
    if peer in PLAIN:
        return peer in formulas_of(case)
    if peer in COMPILED:
        return peer != "compile-cudnn" or "sdpa-cudnn" in formulas_of(case)
    if peer in OWN:
        return peer in variants(case)
    return case.name in _FOREIGN[peer]


def build(peer: str, case: Case) -> Contender:
    """Bind `peer` to the inputs of `case`. Raises UnavailableError if it is not available here."""
    known = formulas_of(case)
    if peer in PLAIN:
        return known[peer].contender(peer, case)
    if peer in COMPILED:
        formula = known.get(COMPILED[peer][0], known["eager"])
        compiled = torch.compile(formula.function, dynamic=False, **compile_settings(peer))  # type: ignore[call-overload]
        return replace(formula, function=compiled).contender(peer, case)
    if peer in OWN:
        variant = variants(case)[peer]
        if isinstance(variant, str):
            raise UnavailableError(variant)
        return variant
    if case.device.type != "cuda":
        raise UnavailableError(f"{peer} runs on a GPU only")
    return _FOREIGN[peer][case.name](case)


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from error


def _liger_loss(case: Case) -> Contender:
    liger, softcap = _import("liger_kernel.transformers.functional"), case.sizes.softcap

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> Outputs:
        logits = F.linear(x.flatten(0, 1), weight)
        losses = liger.liger_cross_entropy(logits, targets.flatten(), reduction="none", softcap=softcap)
        return (losses.view(targets.shape),)

    return Formula(run).contender("liger", case)


def _liger_mlp(case: Case) -> Contender:
    liger, inputs = _import("liger_kernel.transformers.functional"), plain_inputs(case)
    up = inputs.pop("up")
    # Liger takes gate rows and up rows apart
    inputs["up_apart"] = torch.cat((up[0::2], up[1::2])).detach().requires_grad_()

    def run(x: Tensor, up_apart: Tensor, down: Tensor) -> Outputs:
        gate, up = F.linear(x, up_apart).chunk(2, dim=-1)
        return (F.linear(liger.liger_swiglu(gate, up), down),)

    return Formula(run).contender("liger", case, inputs)


def _liger_norm(case: Case) -> Contender:
    liger = _import("liger_kernel.transformers.functional")

    def run(x: Tensor, branch: Tensor, x_scale: Tensor, branch_scale: Tensor) -> Outputs:
        mixed = (x_scale * x + branch_scale * branch).to(x.dtype)
        half = torch.full_like(branch_scale, 0.5)
        normed = liger.liger_rms_norm(mixed, half, reference.RMS_EPS, in_place=False)
        return mixed, normed.to(mixed.dtype)

    return Formula(run).contender("liger", case)


def _gemlite_int8(case: Case) -> Contender:
    """Bind gemlite's 8-bit product: it has no 6-bit weights."""
    helper = _import("gemlite.helper")
    maker = getattr(helper, "A16W8", None) or getattr(helper, "A16W8_INT8", None)
    if maker is None:
        raise UnavailableError("this gemlite has neither helper.A16W8 nor helper.A16W8_INT8")
    eye = torch.eye(case.sizes.dim, dtype=case.dtype, device=case.device)
    (dense,) = _dense(case)(eye, None, None)
    linear = maker(device=str(case.device)).from_weights(dense.T.contiguous())
    inputs: Inputs = {"x": case.inputs["x"]}
    return Contender("gemlite", lambda x: (linear(x),), inputs, factor=float("inf"))


_FOREIGN: dict[str, dict[str, Callable[[Case], Contender]]] = {
    "liger": {"softcap_cross_entropy": _liger_loss, "mlp-swiglu": _liger_mlp, "residual_norm": _liger_norm},
    "gemlite": {"int6_matmul": _gemlite_int8},
}
