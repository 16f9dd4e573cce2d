"""The other ways to run a case: eager, torch.compile in several settings, and kernels of other packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F

from pgolf_fast.bench.case import Case, Contender, Outputs
from pgolf_fast.ops import reference


class UnavailableError(Exception):
    """A peer that this machine lacks: which package or setting, in one line."""


# peer -> (formula to compile, the one used where a case lacks it, what torch.compile is told)
COMPILED: dict[str, tuple[str, dict[str, object]]] = {
    "compile": ("sdpa-flash", {}),
    "compile-mix-off": ("sdpa-flash", {"options": {"triton.mix_order_reduction": False}}),
    "compile-max-autotune": ("sdpa-flash", {"mode": "max-autotune-no-cudagraphs"}),
    "compile-cudnn": ("sdpa-cudnn", {}),
}
PLAIN = ("eager", "dense", "sdpa-flash", "sdpa-cudnn")
FOREIGN = ("liger", "gemlite")
OWN = ("ours-triton", "ours-flash", "ours-cudnn", "ours-fa3", "ours-fa4")
PEERS = (*OWN, *PLAIN, *COMPILED, *FOREIGN)
QUICK = ("eager", "dense", "sdpa-flash")


def compile_settings(peer: str) -> dict[str, object]:
    """What torch.compile is told for a peer of COMPILED. Raises UnavailableError for an option it lacks."""
    settings = COMPILED[peer][1]
    options = settings.get("options")
    if isinstance(options, dict):
        known = torch._inductor.list_options()
        missing = [name for name in options if name not in known]
        if missing:
            raise UnavailableError(f"torch {torch.__version__} has no Inductor option {missing[0]}")
    return settings


def applies(peer: str, case: Case) -> bool:
    """Whether `peer` means anything for this op."""
    if peer in PLAIN:
        return peer in case.formulas
    if peer in COMPILED:
        return peer != "compile-cudnn" or "sdpa-cudnn" in case.formulas
    if peer in OWN:
        return peer in case.variants
    return case.op in _FOREIGN[peer]


def build(peer: str, case: Case) -> Contender:
    """`peer` on the inputs of `case`. Raises UnavailableError when this machine lacks it."""
    if peer in PLAIN:
        return case.contender(peer, case.formulas[peer])
    if peer in COMPILED:
        formula = case.formulas.get(COMPILED[peer][0], case.formulas["eager"])
        compiled = torch.compile(formula.function, dynamic=False, **compile_settings(peer))  # type: ignore[call-overload]
        return case.contender(peer, formula, compiled)
    if peer in OWN:
        variant = case.variants[peer]
        if isinstance(variant, str):
            raise UnavailableError(variant)
        return variant
    if case.device.type != "cuda":
        raise UnavailableError(f"{peer} runs on a GPU only")
    return _FOREIGN[peer][case.op](case)


def _foreign(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{module} cannot be imported: {error}") from error


def _functional() -> ModuleType:
    return _foreign("liger_kernel.transformers.functional")


def _liger(case: Case, run: Callable[[], Outputs]) -> Contender:
    return Contender("liger", run, case.leaves(), factor=10.0)


def _liger_cross_entropy(case: Case) -> Contender:
    liger, t, softcap = _functional(), case.inputs, case.constants["softcap"]

    def run() -> Outputs:
        logits = F.linear(t["x"].flatten(0, 1), t["weight"])
        losses = liger.liger_cross_entropy(logits, t["targets"].flatten(), reduction="none", softcap=softcap)
        return (losses.view(t["targets"].shape),)

    return _liger(case, run)


def _liger_swiglu(case: Case) -> Contender:
    liger, t = _functional(), case.inputs
    # Liger wants gate rows and up rows apart
    apart = torch.cat((t["up"][0::2], t["up"][1::2])).detach().requires_grad_()

    def run() -> Outputs:
        gate, up = F.linear(t["x"], apart).chunk(2, dim=-1)
        return (F.linear(liger.liger_swiglu(gate, up), t["down"]),)

    return Contender("liger", run, {"x": t["x"], "up_apart": apart, "down": t["down"]}, factor=10.0)


def _liger_norm(case: Case) -> Contender:
    liger, t = _functional(), case.inputs
    half = torch.full_like(t["branch_scale"], 0.5)

    def run() -> Outputs:
        mixed = (t["x_scale"] * t["x"] + t["branch_scale"] * t["branch"]).to(t["x"].dtype)
        normed = liger.liger_rms_norm(mixed, half, reference.RMS_EPS, in_place=False)
        return mixed, normed.to(mixed.dtype)

    return _liger(case, run)


def _gemlite_int8(case: Case) -> Contender:
    """8-bit weights: gemlite has no 6-bit ones."""
    helper = _foreign("gemlite.helper")
    maker = getattr(helper, "A16W8", None) or getattr(helper, "A16W8_INT8", None)
    if maker is None:
        raise UnavailableError("this gemlite has neither helper.A16W8 nor helper.A16W8_INT8")
    codes_times_scale = case.formulas["dense"].function(
        torch.eye(case.shape["k"], dtype=case.dtype, device=case.device),
        case.inputs["packed"],
        case.inputs["scale"],
    )[0]
    linear = maker(device=str(case.device)).from_weights(codes_times_scale.T.contiguous())
    return Contender("gemlite", lambda: (linear(case.inputs["x"]),), {}, factor=float("inf"))


_FOREIGN: dict[str, dict[str, Callable[[Case], Contender]]] = {
    "liger": {
        "softcap_cross_entropy": _liger_cross_entropy,
        "mlp-swiglu": _liger_swiglu,
        "residual_norm": _liger_norm,
    },
    "gemlite": {"int6_matmul": _gemlite_int8},
}
