"""Rate-distortion quantization: a step per row and column from what errors and bits cost.

With an ideal entropy coder a code of step s costs h - log2 s bits, where h is the weight's differential
entropy. GPTQ turns its rounding error of s^2 / 12 into 1/2 f_r s^2 / (12 U_ii^2) nats, where f_r is the row's
importance and U the factor of the inverse Hessian (`inverse_factor`). At a price of `price` nats per bit the
sum is minimal for s = sqrt(12 price / ln 2) U_ii / sqrt(f_r): every column pivot of every row of every
matrix then suffers the same loss. This is reverse water-filling (Cover and Thomas, ch. 10), applied to the
columns of a layer as in WaterSIC (Lifar et al., arXiv 2603.04956), with rows and layers weighted by the loss
as in GuidedQuant (Kim et al., arXiv 2505.07004). `price` alone sets all steps.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.config.checks import need
from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.console import progress
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.weights import Tensors
from pgolf_fast.quant.calibration import Fisher, collect_fisher, collect_hessians, self_generate
from pgolf_fast.quant.gptq import inverse_factor, round_columns
from pgolf_fast.quant.grid import check_matrix
from pgolf_fast.quant.state import (
    Matrices,
    QuantizedState,
    QuantizedTensor,
    Stored,
    code_bits,
    group_of,
    stays_float,
    to_float16,
    unbank,
)

CLIP_RANGE = 127
HEADROOM = 110  # largest code before GPTQ: its updates move weights outwards
# Share of the price that rounding pays. Above it, weights shrink so much that errors add up over layers,
# which the sum over matrices ignores (`small` in 600,000 bytes: a divergence of 0.0367 bits per byte at 0.4,
# 0.0354 at 0.8, 0.0372 at 1.3).
ROUNDING_PRICE = 0.8
# Cost of all errors, in nats per token, below which finer grids are useless: all codes then have 8 bits.
# A larger value would drop weights of a barely trained model that have no importance yet.
FINEST_LOSS = 1e-12
_MANTISSA = 4  # steps per octave: the low byte of such a float16 is zero, so it codes to nothing
_PER_OCTAVE = 3  # classes of the cost table per factor of two in spread
_ROW_CLASSES, _COLUMN_CLASSES = 41, 25
_ROW_ZERO, _COLUMN_ZERO = 12, 12  # classes of a row with a spread of one step, and of an average column
_FACTOR_BITS = 6.5  # bits that the entropy coder spends on an element of a correction's factors


def short_steps(steps: Tensor) -> Tensor:
    """Round float32 steps to two mantissa bits: 1, 1.25, 1.5 or 1.75 times 2^k."""
    octave = torch.exp2(torch.floor(torch.log2(steps.clamp(2.0**-14, 2.0**15))))
    return (torch.round(steps / octave * _MANTISSA) / _MANTISSA * octave).clamp(2.0**-14, 2.0**15)


def short_floats(values: Tensor) -> Tensor:
    """Round signed values as `short_steps` does; below 2^-14 they become zero."""
    return torch.where(values.abs() < 2.0**-14, 0.0, values.sign() * short_steps(values.abs()))


def code_costs(spreads: Tensor) -> Tensor:
    """Return the bits (K, 256) of codes -128..127 for rounded normal weights of spreads (K,), in steps.

    A 2 % share of a Laplace distribution of the same spread models outliers.
    """
    codes = torch.arange(-128.0, 128.0, device=spreads.device)
    edges = (codes[:, None] + codes.new_tensor([-0.5, 0.5])).T  # (2, 256)
    wide = spreads[:, None]
    normal = torch.special.ndtr(edges[1] / wide) - torch.special.ndtr(edges[0] / wide)
    tail = torch.exp(-math.sqrt(2) * codes.abs() / wide)
    tail = tail / tail.sum(dim=1, keepdim=True)
    return -torch.log2(0.98 * normal + 0.02 * tail.clamp_min(1e-12))


@dataclass(frozen=True, eq=False)
class _Group:
    """Matrices that read one input, as float32 columns (C, N) in GPTQ's order; N counts their rows."""

    names: dict[str, int]  # name -> rows
    columns: Tensor
    order: Tensor  # (C,)
    factor: Tensor  # (C, C)
    importance: Tensor  # (N,)
    column_step: Tensor  # (C,) U_ii over their geometric mean, rounded by short_steps
    mean_pivot: float

    @property
    def rows(self) -> list[int]:
        return list(self.names.values())

    def sampled(self, every: int) -> _Group:
        """Keep every `every`-th row of each matrix."""
        kept = torch.cat([torch.arange(rows) % every == 0 for rows in self.rows]).to(self.columns.device)
        names = {name: -(-rows // every) for name, rows in self.names.items()}
        columns = self.columns[:, kept].contiguous()
        return replace(self, names=names, columns=columns, importance=self.importance[kept])

    def row_steps(self, price: float, column_step: Tensor) -> Tensor:
        """Return row steps (N,) for a column step of 1, larger where 8-bit codes could not hold the row."""
        largest = (self.columns.abs() / column_step[:, None]).amax(dim=0)
        return short_steps(torch.maximum(_root(price) * self.row_unit, 1.125 / HEADROOM * largest))

    def column_steps(self, price: float) -> Tensor:
        """Return column steps (C,), larger for columns whose typical weight would overflow 8-bit codes."""
        excess = (4.5 / HEADROOM / _root(price) * self.medians / self.column_step).clamp_min(1.0)
        return short_steps(self.column_step * (excess / excess.median()).clamp_min(1.0))

    @property
    def row_unit(self) -> Tensor:
        """Row steps (N,) at a price of ln 2 / 12 nats per bit."""
        return self.mean_pivot * self.importance.rsqrt()

    @functools.cached_property
    def medians(self) -> Tensor:
        """Median weight magnitude per column (C,), in units of the row steps."""
        return (self.columns.abs() / self.row_unit).median(dim=1).values

    def spreads(self, row_step: Tensor, column_step: Tensor) -> tuple[Tensor, Tensor]:
        """Return log2 of the RMS code of each row (N,), and of each column (C,) relative to their mean."""
        square = self.columns.square()
        by_row, by_column = row_step**-2, column_step**-2
        rows = by_row * (square.T @ by_column) / len(by_column)
        columns = by_column * (square @ by_row) / len(by_row)
        logs = [0.5 * torch.log2(mean + 0.02) for mean in (rows, columns)]
        return logs[0], logs[1] - logs[1].mean()

    @functools.cached_property
    def variances(self) -> Tensor:
        """Mean square codes at price 1, from every 16th row: at most 1,000 quantiles."""
        rows = slice(None, None, 16)
        steps = _root(1.0) * self.row_unit[rows] * self.column_step[:, None]
        of_rows, of_columns = ((self.columns[:, rows] / steps).square().mean(dim) for dim in (0, 1))
        ordered = (of_rows[:, None] * (of_columns / of_columns.mean())).flatten().sort().values
        every = -(-len(ordered) // 1000)
        return ordered[every // 2 :: every]


class RateDistortion:
    """A model ready to be quantized at any price of a bit.

    state: a state dict; fishers: factors by matrix name, from `collect_fisher`. Matrices without factors,
    tables configured as float16, and vectors are stored as float16.
    Raises PgolfError for non-finite values.
    """

    def __init__(self, state: Tensors, fishers: Mapping[str, Fisher], config: QuantConfig):
        self.tensors, self.config = unbank(state), config
        members: dict[str, list[str]] = {}
        for name in self.tensors:
            if name in fishers and not stays_float(name, config):
                members.setdefault(group_of(name), []).append(name)
        named = progress(members.values(), "pivots", unit="group")
        self._groups = [self._prepare(names, fishers) for names in named]

    def _prepare(self, names: list[str], fishers: Mapping[str, Fisher]) -> _Group:
        weights = {name: self.tensors[name].detach().float() for name in names}
        for name, weight in weights.items():
            check_matrix(weight, name)
        shared = fishers[names[0]]
        order, factor = inverse_factor(shared.hessian, shared.damping, ", ".join(names))
        pivots = torch.diagonal(factor)
        mean = pivots.log().mean().exp()
        rows = {name: len(weight) for name, weight in weights.items()}
        columns = torch.cat([weight.T[order] for weight in weights.values()], dim=1)
        importance, steps = torch.cat([fishers[name].rows for name in names]), short_steps(pivots / mean)
        return _Group(rows, columns, order, factor, importance, steps, mean.item())

    @property
    def weights(self) -> int:
        """Number of weights stored as codes."""
        return sum(group.columns.numel() for group in self._groups)

    @property
    def finest_price(self) -> float:
        """Price below which more bits are useless: all errors together cost FINEST_LOSS."""
        return 2 * math.log(2) * FINEST_LOSS / max(self.weights, 1)

    def expected_bytes(self, price: float) -> float:
        """Estimate the bytes of codes and float16 from the entropy of normal weights, to a few percent."""
        bits = 16.0 * (sum(t.numel() for t in self.tensors.values()) - self.weights)
        for group in self._groups:
            entropy = 0.5 * torch.log2(1 + 2 * math.pi * math.e / price * group.variances)
            bits += entropy.clamp_max(7.0).mean().item() * group.columns.numel()  # 8-bit codes carry about 7
            bits += 8.0 * sum(group.columns.shape)
        return bits / 8

    def sampled(self, every: int) -> RateDistortion:
        """Keep every `every`-th row of every matrix and nothing else: enough to relate price and bytes."""
        sample = copy.copy(self)
        sample._groups = [group.sampled(every) for group in self._groups]
        sample.tensors = {name: self.tensors[name][::every] for group in self._groups for name in group.names}
        return sample

    def quantize(self, price: float, like: QuantizedState | None = None) -> QuantizedState:
        """Quantize at `price` nats per bit.

        like: a finer state that lends its column steps and right correction factors. The two states then
        differ in rows only. Rows are independent, so any mixture of their rows is a valid state.
        """
        done: dict[str, Stored] = {}
        for group in progress(self._groups, f"price {price:.2e}", unit="group"):
            done.update(self._quantize_group(group, price, like.tensors if like else {}))
        done |= {name: to_float16(name, t) for name, t in self.tensors.items() if name not in done}
        return QuantizedState({name: done[name] for name in self.tensors})

    def _quantize_group(self, group: _Group, price: float, like: Mapping[str, Stored]) -> Matrices:
        shared = [t for t in (like.get(name) for name in group.names) if isinstance(t, QuantizedTensor)]
        column_step = group.column_steps(price)
        if shared and shared[0].column_scale is not None:
            column_step = shared[0].column_scale.to(column_step.device).float()[group.order]
        row_step = group.row_steps(price, column_step)
        rows, columns = group.spreads(row_step, column_step)
        lattice = torch.arange(_ROW_CLASSES + _COLUMN_CLASSES - 1, device=rows.device)
        rule: dict[str, Any] = {"clip_range": CLIP_RANGE, "block_size": self.config.block_size}
        rule["cost"] = code_costs(torch.exp2((lattice - _ROW_ZERO - _COLUMN_ZERO) / _PER_OCTAVE))
        rule["row_class"] = _classes(rows, _ROW_ZERO, _ROW_CLASSES)
        rule["column_class"] = _classes(columns, _COLUMN_ZERO, _COLUMN_CLASSES)
        rule["lam"] = 2 * ROUNDING_PRICE * price / group.importance
        codes = round_columns(group.columns, row_step, group.factor, column_step=column_step, **rule)
        original = group.order.argsort()
        column_scale = column_step[original].half().cpu()
        split, scales = (t.cpu().split(group.rows) for t in (codes[original].T, row_step.half()))
        own = zip(group.names, split, scales, strict=True)
        done = {n: QuantizedTensor(c.contiguous(), s, code_bits(c), column_scale.clone()) for n, c, s in own}
        if self.config.rank:
            error = group.columns - codes * row_step * column_step[:, None]
            errors, importances = error.split(group.rows, dim=1), group.importance.split(group.rows)
            for name, part, importance in zip(group.names, errors, importances, strict=True):
                finer = like.get(name)
                right = finer.low_rank[1] if isinstance(finer, QuantizedTensor) and finer.low_rank else None
                if finer is None or right is not None:
                    low_rank = self._correction(group, part, importance, price, right)
                    done[name] = replace(done[name], low_rank=low_rank)
        return done

    def _correction(
        self, group: _Group, error: Tensor, importance: Tensor, price: float, right: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """Return float16 factors left and right that reduce `error` (C, R); None if not worth their bytes.

        Singular vectors of the error, whitened by importance and Hessian, are optimal (LQER, Zhang et al.
        2024). Each of the first `config.rank` must save more nats than its bytes cost.
        """
        # e^T H e = |w|^2 for w = U^-T e
        white = torch.linalg.solve_triangular(group.factor.T, error, upper=False).T
        if right is None:
            weighed = white * importance.sqrt()[:, None]
            _, values, directions = torch.linalg.svd(weighed, full_matrices=False)
            saved, cost = 0.5 * values[: self.config.rank].square(), price * _FACTOR_BITS * sum(error.shape)
            count = int((saved > cost).sum())
            if count == 0:
                return None
            ordered = directions[:count] @ group.factor  # back from white to columns
            right = ordered[:, group.order.argsort()]
            right = short_floats(right / right.abs().amax(dim=1, keepdim=True)).half()
        columns = right.to(error.device).float()[:, group.order].T
        basis = torch.linalg.solve_triangular(group.factor.T, columns, upper=False)
        left = torch.linalg.lstsq(basis, white.T).solution.T
        return short_floats(left).half().cpu(), right.cpu()


def _root(price: float) -> float:
    """Return the step for unit importance and pivot."""
    return math.sqrt(12 * price / math.log(2))


def _classes(spreads: Tensor, zero: int, count: int) -> Tensor:
    return (torch.round(_PER_OCTAVE * spreads) + zero).clamp_(0, count - 1).int()


def rate_distortion(
    model: GPT, config: QuantConfig, *, seq_len: int, text: Tensor | None = None
) -> RateDistortion:
    """Prepare a model for `RateDistortion` on `text`, by default what it writes. The model is not changed.

    seq_len: the training length, which calibration text does not exceed.
    Raises PgolfError unless the method is gptq.
    """
    need(config.method == "gptq", f"quant.grid rd needs quant.method gptq, not {config.method}")
    text = self_generate(model, config, seq_len) if text is None else text
    hessians = collect_hessians(model, text)
    fishers = collect_fisher(model, text, hessians, damping=config.damping, seed=config.seed)
    return RateDistortion(model.state_dict(), fishers, config)
