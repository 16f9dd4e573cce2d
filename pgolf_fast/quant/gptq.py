"""GPTQ: round column by column, and let later columns compensate for each error (Frantar et al. 2022)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pgolf_fast import cores
from pgolf_fast.config.checks import need
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.weights import Tensors
from pgolf_fast.ops.native import extension
from pgolf_fast.quant.grid import PERCENTILES, Coded, best_candidate, check_matrix, scale_candidates

COSTS = 256  # a cost table's columns: code q is at index q + 128


@torch.no_grad()
def gptq(
    groups: Iterable[tuple[Tensors, Tensor]],
    *,
    clip_range: int = 31,
    percentiles: Sequence[float] = PERCENTILES,
    scale_floor: bool = True,
    sigmas: float | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> dict[str, Coded]:
    """Quantize each weight (R, C) to codes int8 (R, C) and scale float16 (R,), keeping x W^T close.

    groups: matrices that read one input (say, Q, K and V), under unique names, with its Hessian (C, C): the
    sum of x^T x, up to a factor. Columns go in descending order of the Hessian's diagonal, to which `damping`
    times its mean is added; row scales are searched as in `quantize_rows` (PR 1501), or are those of
    `sdclip_scale` if `sigmas` is given. Rows are independent, so a group with all its candidate scales takes
    one pass and one factorization.
    On a CPU, one group is in memory at a time. On a GPU, all groups of one shape run at once to fill it.
    Raises PgolfError for shapes that do not fit, non-finite values, or as `inverse_factor` does.
    """
    results = {}
    waiting: dict[torch.Size, list[_Group]] = {}
    for weights, hessian in groups:
        for name, weight in weights.items():
            check_matrix(weight, name)
            size = (weight.shape[1],) * 2
            problem = f"{name} has {size[0]} columns, so its Hessian must be {size}"
            need(hessian.shape == size, f"{problem}, but it is {tuple(hessian.shape)}")
        what = ", ".join(weights)
        problem = f"the Hessian of {what} has values that are not finite: check the calibration text"
        need(torch.isfinite(hessian).all(), problem)
        order, factor = inverse_factor(hessian, damping, what)
        dead = torch.diagonal(hessian) == 0
        rule = clip_range, percentiles, scale_floor, sigmas
        scales = [scale_candidates(w, *rule) for w in weights.values()]
        matrices = list(zip(weights, weights.values(), scales, strict=True))
        ready = (w.float().masked_fill(dead, 0.0).T[order].repeat(1, len(s)) for _, w, s in matrices)
        group = _Group(matrices, order, torch.cat(list(ready), dim=1), factor)
        waiting.setdefault(group.columns.shape, []).append(group)
        if not group.columns.is_cuda:
            results.update(_round_groups(waiting.pop(group.columns.shape), clip_range, block_size))
    for stack in waiting.values():
        results.update(_round_groups(stack, clip_range, block_size))
    return results


@dataclass(frozen=True, eq=False)
class _Group:
    """Matrices of C columns that read one input, ready to round; N counts all rows times their candidates."""

    matrices: list[tuple[str, Tensor, list[Tensor]]]  # name, weight (R, C), candidate scales float16 (R,)
    order: Tensor  # (C,) of the columns
    columns: Tensor  # float32 (C, N)
    factor: Tensor  # (C, C)

    @property
    def scales(self) -> list[Tensor]:
        return [scale for *_, scales in self.matrices for scale in scales]

    def best(self, codes: Tensor) -> dict[str, Coded]:
        """Pick each matrix's best candidate from the rounded columns, int8 (C, N)."""
        rows = torch.empty_like(codes.T, memory_format=torch.contiguous_format)
        rows[:, self.order] = codes.T
        parts = iter(rows.split([len(scale) for scale in self.scales]))
        results = {}
        for name, weight, scales in self.matrices:
            best, scale = best_candidate(weight, [(next(parts), scale) for scale in scales])
            results[name] = best.clone(), scale  # a copy, so that memory of the other candidates is freed
        return results


def _round_groups(groups: Sequence[_Group], clip_range: int, block_size: int) -> dict[str, Coded]:
    columns = torch.stack([group.columns for group in groups])
    steps = torch.stack([torch.cat(group.scales).float() for group in groups])
    factors = torch.stack([group.factor for group in groups])
    codes = round_columns(columns, steps, factors, clip_range=clip_range, block_size=block_size)
    return {name: best for g, c in zip(groups, codes, strict=True) for name, best in g.best(c).items()}


def inverse_factor(hessian: Tensor, damping: float = 0.01, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Return GPTQ's column order (C,) and the upper triangular factor U (C, C) of the inverse Hessian.

    U^T U = (H + damping mean(diag H) I)^-1, float32. Columns go in descending order of the diagonal of
    hessian (C, C), and U is for H in that order. With J reversing the order, J H J = L L^T gives
    H = (J L J)(J L J)^T, where J L J is upper, so U = (J L J)^-1 = J L^-1 J. Computed in float64, in which
    Hessians of long, repetitive text stay positive definite.
    Raises PgolfError if the Hessian is not positive definite even with 100 times the damping.
    """
    order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
    backwards = order.flip(0)
    wide = hessian[backwards][:, backwards].double()
    diagonal = torch.diagonal(wide)
    diagonal.masked_fill_(diagonal == 0, 1.0)
    undamped, mean = diagonal.clone(), diagonal.mean()
    for strength in (damping, 10 * damping, 100 * damping):
        diagonal.copy_(undamped + strength * mean)
        lower, failed = torch.linalg.cholesky_ex(wide)
        if not failed.item():
            return order, _inverse_of_lower(lower).flip(0, 1).float()
    problem = f"is not positive definite, even with {100 * damping:g} of its mean diagonal added"
    hint = "calibrate with more text, raise quant.damping, or use quant.method round"
    raise PgolfError(f"the Hessian of {name} {problem}: {hint}")


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by halves, which skips the products with zeros."""
    size = len(lower)
    if size <= 128:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = size // 2
    inverse = torch.zeros_like(lower)
    first, second = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = second @ (lower[half:, :half] @ first).neg_()
    return inverse


@torch.no_grad()
def round_columns(
    columns: Tensor,
    row_step: Tensor,
    factor: Tensor,
    *,
    clip_range: int,
    column_step: Tensor | None = None,
    cost: Tensor | None = None,
    row_class: Tensor | None = None,
    column_class: Tensor | None = None,
    lam: Tensor | float = 0.0,
    block_size: int = 128,
    threads: int = 0,
) -> Tensor:
    """Round a transposed weight, float32 (C, N) with its columns in GPTQ's order, to codes int8 (C, N).

    Column by column, element (i, n) becomes q = clamp(round(w / step)), step = row_step[n] * column_step[i];
    then (w - q step) / factor[i, i] * factor[i, j] is subtracted from every later column j. row_step (N,),
    column_step (C,) or None for ones, factor float32 (C, C), upper, with factor^T factor = H^-1.

    With `cost`, the choice is among that q, its neighbor toward zero, and zero: the first that minimizes
    (w - q step)^2 / factor[i, i]^2 + lam[n] cost[row_class[n] + column_class[i], q + 128],
    GPTQ's own loss plus the price of the code, as video coders quantize. cost float32 (K, 256): bits of each
    code for each of K classes. row_class (N,), column_class (C,): int32, zeros if None. lam, (N,) or a
    number: price of a bit over the row's importance.

    All tensors but `cost` may have a leading batch dimension: independent problems of one shape.
    On the CPU, blocks of `block_size` columns run in C++ on `threads` threads (0: `cores.threads`) if the
    extension is built, otherwise in torch; codes differ only where another order of sums rounds differently.
    Raises PgolfError for shapes that do not fit, clip_range outside 1..127, or classes without a cost.
    """
    single = columns.ndim == 2
    work = (columns[None] if single else columns).float().clone(memory_format=torch.contiguous_format)
    batch, total, width = work.shape

    def batched(name: str, given: Tensor | None, *shape: int, default: int = 0) -> Tensor:
        dtype = torch.int32 if name.endswith("class") else torch.float32
        if given is None:
            return torch.full((batch, *shape), default, dtype=dtype, device=work.device)
        tensor = (given[None] if single else given).to(work.device, dtype).contiguous()
        needed = f"{name} must be {(batch, *shape)}, but it is {tuple(tensor.shape)}"
        need(tensor.shape == (batch, *shape), f"to round columns {tuple(work.shape)}, {needed}")
        return tensor

    costs = None if cost is None else cost.float().contiguous()
    steps = batched("row_step", row_step, width), batched("column_step", column_step, total, default=1)
    classes = batched("row_class", row_class, width), batched("column_class", column_class, total)
    prices = torch.as_tensor(lam, dtype=torch.float32, device=work.device).expand(batch, width).contiguous()
    rule = _Rule(clip_range, *steps, costs, *classes, prices)
    rule.check(work)
    codes = _round_all(work, batched("factor", factor, total, total), rule, block_size, threads)
    return codes[0] if single else codes


def _round_all(work: Tensor, factor: Tensor, rule: "_Rule", block_size: int, threads: int) -> Tensor:
    """Return codes (B, C, N) of the columns `work`, whose values are replaced by their errors."""
    native = extension() if work.device.type == "cpu" else None
    codes = torch.empty_like(work, dtype=torch.int8)

    def finish(first: int, last: int) -> None:
        # Halving makes most of the error propagation large matrix products.
        if native is not None and last - first <= block_size:
            rule.round_block(native, work, codes, factor, slice(first, last), threads)
        elif last - first == 1:
            own = factor[:, first, first, None]
            code = rule.codes(work[:, first], first, own)
            work[:, first].addcmul_(code, rule.step(first), value=-1).div_(own)
            codes[:, first] = code
        else:
            middle = (first + last) // 2
            finish(first, middle)
            passed_on = factor[:, first:middle, middle:last].mT
            work[:, middle:last].baddbmm_(passed_on, work[:, first:middle], alpha=-1)
            finish(middle, last)

    if work.numel():
        finish(0, work.shape[1])
    return codes


@dataclass(frozen=True, eq=False)
class _Rule:
    """Batched arguments of `round_columns`, with none left out."""

    clip_range: int
    row_step: Tensor  # (B, N)
    column_step: Tensor  # (B, C)
    cost: Tensor | None  # (K, 256)
    row_class: Tensor  # (B, N)
    column_class: Tensor  # (B, C)
    lam: Tensor  # (B, N)

    def check(self, columns: Tensor) -> None:
        problem = f"clip_range is {self.clip_range}; codes of 8 bits or less need 1 to 127"
        need(1 <= self.clip_range <= 127, problem)
        if self.cost is not None and columns.numel():
            problem = f"cost is {tuple(self.cost.shape)}, but it must be (classes, {COSTS})"
            need(self.cost.ndim == 2 and self.cost.shape[1] == COSTS, problem)
            ends = [(int(c.min()), int(c.max())) for c in (self.row_class, self.column_class)]
            inside = min(low for low, _ in ends) >= 0 and sum(high for _, high in ends) < len(self.cost)
            given = f"row_class and column_class, in {ends[0]} and {ends[1]}"
            need(inside, f"{given}, exceed the {len(self.cost)} classes of cost")

    def codes(self, values: Tensor, column: int, own: Tensor) -> Tensor:
        """Choose codes, float32 (B, N), for the values (B, N) of a column; own (B, 1) is factor[i, i]."""
        step = self.step(column)
        nearest = torch.round(values / step).clamp_(-self.clip_range, self.clip_range)
        if self.cost is None:
            return nearest
        choices = torch.stack((nearest, nearest - nearest.sign(), torch.zeros_like(nearest)))
        classes = self.row_class + self.column_class[:, column, None]
        bits = self.cost[classes, choices.long() + COSTS // 2]
        loss = (values - choices * step).square() / own.square() + self.lam * bits
        return choices.gather(0, loss.argmin(0, keepdim=True)).squeeze(0)

    def step(self, column: int) -> Tensor:
        """Return the steps (B, N) of a column."""
        return self.row_step * self.column_step[:, column, None]

    def round_block(
        self, native: ModuleType, work: Tensor, codes: Tensor, factor: Tensor, block: slice, threads: int
    ) -> None:
        """Round columns `block` in C++: write codes (B, C, N), and replace values of `work` by errors."""
        for i in range(len(work)):
            steps = self.row_step[i], self.column_step[i, block]
            needed = work[i, block], codes[i, block], *steps, factor[i, block, block].contiguous()
            costs = {}
            if self.cost is not None:
                costs = {"cost": self.cost, "row_class": self.row_class[i], "lam": self.lam[i]}
                costs["column_class"] = self.column_class[i, block]
            arrays, named = [t.numpy() for t in needed], {name: t.numpy() for name, t in costs.items()}
            native.gptq_round_block(*arrays, self.clip_range, **named, threads=threads or cores.threads())
