"""Grid sdclip: rows clipped at multiples of their standard deviation, the token table by GPTQ too (PR 1394).

With quantized low-rank corrections (LQER, PR 1797) and one group of columns with more bits (AWQ, PR 1908).
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.console import progress
from pgolf_fast.model.weights import Tensors
from pgolf_fast.quant.gptq import gptq, inverse_factor
from pgolf_fast.quant.grid import SMALLEST_SCALE, Coded, check_matrix, round_to_grid, row_scale, sdclip_scale
from pgolf_fast.quant.state import (
    GROUP,
    TABLE_BITS,
    TOKEN_TABLE,
    Matrices,
    QuantizedState,
    QuantizedTensor,
    group_of,
    is_slot,
    quantize_state,
    stays_float,
    unbank,
)

GATES = ".attn_gate_w"  # end of the names of head gates, which are int8 whatever their size
LEFT_BITS, RIGHT_BITS = 2, 4


@torch.no_grad()
def quantize_sdclip(state: Tensors, config: QuantConfig, hessians: Tensors | None = None) -> QuantizedState:
    """Quantize a state dict on grid sdclip; tensors that are no matrices of its own are as on other grids.

    hessians: from `collect_hessians` with `means`; None rounds to nearest. Raises PgolfError as `gptq` does.
    """
    tensors = unbank(state)
    table = state[TOKEN_TABLE].numel() > config.small_tensor and not stays_float(TOKEN_TABLE, config)
    own = {name: t for name, t in tensors.items() if is_slot(name) or (name == TOKEN_TABLE and table)}
    weights = {name: tensor.detach().float() for name, tensor in own.items()}
    rules: dict[tuple[float, int], dict[str, dict[str, Tensor]]] = {}
    for name, weight in weights.items():
        rules.setdefault(_rule(name, config), {}).setdefault(group_of(name), {})[name] = weight
    done: Matrices = {}
    for (sigmas, bits), groups in rules.items():
        coded: dict[str, Coded] = {}
        clip, steps = 2 ** (bits - 1) - 1, progress(groups, f"quantize ({config.method})", unit="group")
        if hessians is None:
            for name, weight in (item for group in steps for item in groups[group].items()):
                check_matrix(weight, name)
                scale = sdclip_scale(weight, clip, sigmas)
                coded[name] = round_to_grid(weight, scale, clip), scale
        else:
            missing = next((group for group in groups if group not in hessians), None)
            need(missing is None, f"quant.method gptq needs the Hessian {missing}: collect it with `means`")
            pairs = ((groups[group], hessians[group]) for group in steps)
            rule: dict[str, Any] = {"block_size": config.block_size, "damping": config.damping}
            coded = gptq(pairs, clip_range=clip, sigmas=sigmas, **rule)
        done |= {n: QuantizedTensor(codes.cpu(), scale.cpu(), bits) for n, (codes, scale) in coded.items()}
    if config.protect_group and hessians is not None:
        of = {n: group_scores(w, hessians[group_of(n)]) for n, w in weights.items() if w.shape[1] >= GROUP}
        need(of, f"quant.protect_group needs a matrix of at least {GROUP} columns: turn it off")
        name = max(of, key=lambda n: float(of[n].max()))
        sigmas, bits = _rule(name, config)
        place = GROUP * int(of[name].argmax())
        pair = weights[name], hessians[group_of(name)]
        done[name] = protect(*pair, place, sigmas=sigmas, bits=bits, damping=config.damping)
    if config.rank:
        errors = {name: weight.cpu() - done[name].dequantized() for name, weight in weights.items()}
        norms = {name: float(error.norm()) for name, error in errors.items()}
        for name in sorted(norms, key=lambda n: -norms[n])[: config.lqer_tensors]:
            factors = quantized_factors(*low_rank(errors[name], config.rank), config.lqer_group)
            done[name] = replace(done[name], low_rank=factors)
    gates = {name: int8_rows(gate) for name, gate in tensors.items() if name.endswith(GATES)}
    return quantize_state(state, config, matrices=done | gates)


def _rule(name: str, config: QuantConfig) -> tuple[float, int]:
    """Return a matrix's standard deviations and bits."""
    if name == TOKEN_TABLE:
        return config.table_sigmas, config.table_bits
    return config.attention_sigmas if ".attn." in name else config.mlp_sigmas, config.bits


def int8_rows(weight: Tensor) -> QuantizedTensor:
    """Round rows to steps of their largest value over 127."""
    scale = row_scale(weight.detach().abs().amax(dim=1), 127, floor=False)
    return QuantizedTensor(round_to_grid(weight.detach(), scale, 127).cpu(), scale.cpu(), TABLE_BITS)


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best factors (R, rank) and (rank, C) of an error (R, C), singular values in the first."""
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def quantized_factors(left: Tensor, right: Tensor, group: int) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Round factors (R, k) and (k, C): 2 bits with one scale, 4 bits with one for `group` elements in order.

    The least code has no positive counterpart, so signs of the factors matter (PR 1797). The group is smaller
    if it does not divide the elements.
    """
    group = math.gcd(group, right.numel())
    return _rounded(left.reshape(1, -1), LEFT_BITS), _rounded(right.reshape(-1, group), RIGHT_BITS)


def _rounded(rows: Tensor, bits: int) -> QuantizedTensor:
    half = 2 ** (bits - 1)
    scale = (rows.abs().amax(dim=1) / (half - 0.5)).clamp_min(SMALLEST_SCALE).half()
    codes = torch.round(rows / scale.float()[:, None]).clamp_(-half, half - 1)
    return QuantizedTensor(codes.to(torch.int8), scale, bits)


def group_scores(weight: Tensor, hessian: Tensor, group: int = GROUP) -> Tensor:
    """Return for each `group` of columns the sum of root mean square input times mean |weight|, float64."""
    root = torch.diagonal(hessian).double().clamp_min(0).sqrt()
    score = root * weight.double().abs().mean(dim=0)
    return score[: len(score) // group * group].view(-1, group).sum(dim=1)


def protect(
    weight: Tensor,
    hessian: Tensor,
    first: int,
    *,
    sigmas: float,
    bits: int,
    damping: float = 0.01,
    group: int = GROUP,
) -> QuantizedTensor:
    """Quantize a matrix by GPTQ as `gptq` does, with 8 bits for the `group` columns from `first` on.

    A plain loop over columns, since the group's steps and clipping differ from the others' (PR 1908).
    """
    order, factor = inverse_factor(hessian, damping)
    wide, scale = (sdclip_scale(weight, clip, sigmas) for clip in (127, 2 ** (bits - 1) - 1))
    work = weight.float().masked_fill(torch.diagonal(hessian) == 0, 0.0).T[order]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for i, column in enumerate(order.tolist()):
        inside = first <= column < first + group
        step, clip = (wide.float(), 127) if inside else (scale.float(), 2 ** (bits - 1) - 1)
        code = torch.round(work[i] / step).clamp_(-clip, clip)
        codes[:, column] = code.to(torch.int8)
        work[i + 1 :].addr_(factor[i, i + 1 :], (work[i] - code * step) / factor[i, i], alpha=-1)
    return QuantizedTensor(codes.cpu(), scale.cpu(), 8, protected=(first, wide.cpu()))
