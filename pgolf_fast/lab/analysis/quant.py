"""What rounding the banks to 6 bits costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf_fast.bench.drawing import label
from pgolf_fast.data.tokenizer import byte_table
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.finding import Finding
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.plots import drawn
from pgolf_fast.lab.analysis.subject import Subject
from pgolf_fast.lab.analysis.tables import NONE, number, ratio, unmeasured
from pgolf_fast.lab.analysis.validation import diverged, validation_or_why
from pgolf_fast.lab.analysis.weights import common
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.quant.calibration import collect_hessians, self_generate
from pgolf_fast.quant.grid import dequantize, quantize_rows
from pgolf_fast.quant.state import SLOTS, group_of, unbank

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_CODE = 31
FIXED_STEP_MSE = 1 / LARGEST_CODE**2 / 12  # 8.67e-5
"""Mean squared error of rounding anything smooth to multiples of 1/31."""


def floored_grid(matrix: Tensor) -> Tensor:
    """A matrix (R, C) on the published grid: codes ±31, each row's step its largest / 31, at least 1/31."""
    step = matrix.abs().amax(1, keepdim=True).div(LARGEST_CODE).clamp_min(1 / LARGEST_CODE)
    return torch.round(matrix / step).clamp_(-LARGEST_CODE, LARGEST_CODE) * step


def row_grid(matrix: Tensor) -> Tensor:
    """A matrix (R, C) on 6-bit steps that follow each row, with this package's percentile search."""
    return dequantize(*quantize_rows(matrix, clip_range=LARGEST_CODE, scale_floor=False))


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {"published": floored_grid, "row": row_grid}


def quant_findings(subjects: Sequence[Subject], options: Options) -> list[Finding]:
    """Rounding errors of each bank: squared as published; against the weights, and against what they compute.

    The last needs calibration: validation tokens, or a run's own text. Raises PgolfError for data that was
    asked for and cannot be read.
    """
    findings = [published(subjects), corrected(subjects)]
    hessians: dict[str, Mapping[str, Tensor]] = {}
    texts: dict[str, str] = {}
    for subject in subjects:
        found, how = calibrate(subject, options, subjects[0])
        if found is None:
            return [*findings, unmeasured("quantisation errors, Hessian-weighted", f"no calibration: {how}")]
        hessians[subject.name], texts[subject.name] = found, how
    if len(set(texts.values())) > 1:
        how = "; ".join(f"{name}: {text}" for name, text in texts.items())
    return [*findings, weighted(subjects, hessians, how)]


def calibrate(
    subject: Subject, options: Options, first: Subject | None = None
) -> tuple[Mapping[str, Tensor] | None, str]:
    """Hessians by group name, float32, and what they were taken on; or None, and what to give.

    On `options.calibration_tokens` validation tokens of the `first` model's run (its own by default), or
    without data on text the model writes, as much as its run's settings say.
    """
    try:
        subject.known()
    except PgolfError as error:
        return None, str(error)
    validation = validation_or_why([first or subject, subject], options)
    tokenizer = subject.tokenizer()
    if not isinstance(validation, str):
        model = subject.model(validation.source.table, options.device)
        ids = torch.from_numpy(validation.first(options.calibration_tokens))
        text = ids.unfold(0, validation.seq_len + 1, validation.seq_len)
        how = f"{len(text) * validation.seq_len:,} validation tokens"
    elif tokenizer is None or subject.config is None:
        return None, validation
    else:
        model, length = subject.model(byte_table(tokenizer), options.device), subject.config.train.seq_len
        ids = torch.arange(min(length, model.config.vocab_size), device=options.device)
        with torch.no_grad():  # drawing from what is not finite is an error of another kind
            if not bool(model.logits(ids[None]).isfinite().all()):
                return None, str(diverged(subject.name, "logits"))
        text = self_generate(model, subject.config.quant, length)
        how = f"{text.numel():,} tokens the model wrote itself"
    hessians = collect_hessians(model, text)
    if not all(bool(hessian.isfinite().all()) for hessian in hessians.values()):
        return None, str(diverged(subject.name, "Hessians"))
    return hessians, how


def published(subjects: Sequence[Subject]) -> Finding:
    """Mean squared error of each bank on the floored grid, and of how many slots the first model's is less.

    The last row is weighted by parameters (PR 1501). Two models of different shapes have no ratios.
    """
    by_slot = {s.name: {name: _errors(s.state[name], floored_grid) for name in BANK_NAMES} for s in subjects}
    weights = {
        s.name: torch.tensor([s.state[n].numel() for n in BANK_NAMES], dtype=torch.float64) for s in subjects
    }
    means = {name: torch.stack([slots.mean() for slots in bank.values()]) for name, bank in by_slot.items()}
    overall = {name: float((means[name] * w).sum() / w.sum()) for name, w in weights.items()}
    two, why = len(subjects) == 2, ""
    try:
        two = two and bool(common(subjects))
    except PgolfError as error:
        two, why = False, f" No ratios: {error}."
    rows = []
    for i, bank in enumerate(BANK_NAMES):
        cells = [number(float(means[s.name][i]), ".4e") for s in subjects]
        if two:
            a, b = (by_slot[s.name][bank] for s in subjects)
            cells += [
                number(ratio(float(a.mean()), float(b.mean())), ".5f"),
                f"{int((a < b).sum())}/{len(a)}",
            ]
        rows.append((bank, *cells))
    cells = [number(overall[s.name], ".4e") for s in subjects]
    if two:
        cells += [number(ratio(*(overall[s.name] for s in subjects)), ".5f"), NONE]
    rows.append(("all", *cells))
    rows.append(("step² / 12", *([f"{FIXED_STEP_MSE:.4e}"] * len(subjects)), *([NONE, NONE] if two else [])))
    names = [s.name for s in subjects]
    values = {
        s.name: {"slot_mse": {n: v.tolist() for n, v in by_slot[s.name].items()}, "mean_mse": overall[s.name]}
        for s in subjects
    }
    return Finding(
        "quantisation errors on the published grid",
        "published",
        "Shows the error of the step 1/31, which is step² / 12 = 8.67e-5 for any bank whose rows stay below "
        "1 and whose weights spread over more than a step; cannot show which of two such models rounds "
        f"better, since it hardly depends on their weights.{why}",
        ("bank", *names, *(["ratio", f"lower in {names[0]}"] if two else [])),
        rows,
        {"step_squared_over_12": FIXED_STEP_MSE, "models": values},
    )


def corrected(subjects: Sequence[Subject]) -> Finding:
    """Squared errors of both grids as shares of the bank's squares, and the rows that the floor rules."""
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {}
    for subject in subjects:
        found[subject.name] = {}
        for name in BANK_NAMES:
            bank = subject.state[name]
            energy = float(bank.double().square().sum())
            floored = float((bank.abs().amax(2) < 1).double().mean())
            parts: dict[str, float | None] = {"rows_on_the_floor": floored}
            for grid, rounded in GRIDS.items():
                errors = _errors(bank, rounded)
                parts[f"mse_{grid}"] = float(errors.mean())
                parts[f"relative_{grid}"] = ratio(float(errors.mean()) * bank.numel(), energy)
            found[subject.name][name] = parts
            shares = (_percent(parts[f"relative_{grid}"]) for grid in GRIDS)
            rows.append((subject.name, name, f"{floored:.1%}", number(parts["mse_row"], ".3e"), *shares))
    return Finding(
        "quantisation errors by row",
        "corrected",
        "Shows how much of the weights' squares rounding loses, with steps that are fixed and with steps "
        "that follow each row; cannot show what the loss will be, as weights do not all matter the same.",
        ("model", "bank", "rows below 1", "MSE, row grid", "lost, published grid", "lost, row grid"),
        rows,
        found,
    )


def weighted(subjects: Sequence[Subject], hessians: Mapping[str, Mapping[str, Tensor]], how: str) -> Finding:
    """|x E^T|^2 / |x W^T|^2 over calibration inputs x, E = W - rounded W, by bank and grid.

    Hessians are as GPTQ gets them: with 1 % of the mean of their diagonal added to it.
    """
    rows: list[tuple[str, ...]] = []
    found: dict[str, Any] = {"calibration": how}
    for subject in subjects:
        matrices = unbank(subject.state)
        sums = {name: dict.fromkeys((*GRIDS, "output"), 0.0) for name in BANK_NAMES}
        for bank, kinds in SLOTS.items():
            for name in (n for n in matrices if n.split(".", 2)[-1] in kinds):
                weight = matrices[name]
                hessian = hessians[subject.name][group_of(name)].cpu().double()
                sums[bank]["output"] += energy_out(weight.double(), hessian)
                for grid, rounded in GRIDS.items():
                    sums[bank][grid] += energy_out((weight - rounded(weight)).double(), hessian)
        found[subject.name] = {
            bank: {grid: ratio(part[grid], part["output"]) for grid in GRIDS} for bank, part in sums.items()
        }
        rows += [
            (subject.name, bank, *(_percent(share) for share in shares.values()))
            for bank, shares in found[subject.name].items()
        ]
    return Finding(
        "quantisation errors, Hessian-weighted",
        "corrected",
        f"Shows how much of what each bank computes (its outputs' squares, on {how}) plain rounding changes; "
        "cannot show how the layers after it take that, nor what GPTQ would save.",
        ("model", "bank", "changed, published grid", "changed, row grid"),
        rows,
        found,
        drawn("hessian_weighted", lambda axes: _paint(axes, [s.name for s in subjects], found)),
    )


def energy_out(matrix: Tensor, hessian: Tensor) -> float:
    """sum over inputs x of |x matrix^T|^2, where hessian = sum of x^T x: trace(matrix H matrix^T)."""
    return float((matrix @ hessian * matrix).sum())


def _errors(bank: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean squared errors of the slots, float64 (slots,)."""
    return torch.stack([(matrix.double() - rounded(matrix).double()).square().mean() for matrix in bank])


def _percent(share: float | None) -> str:
    return number(share, ".3%")


def _paint(axes: list[Axes], names: list[str], found: dict[str, Any]) -> None:
    groups = [(name, grid) for name in names for grid in GRIDS]
    for i, (name, grid) in enumerate(groups):
        places = [j + 0.8 * i / len(groups) for j in range(len(BANK_NAMES))]
        shares = [100 * (found[name][bank][grid] or 0) for bank in BANK_NAMES]
        axes[0].bar(places, shares, 0.8 / len(groups), label=label(f"{name}, {grid} grid"))
    axes[0].set_xticks([j + 0.4 - 0.4 / len(groups) for j in range(len(BANK_NAMES))], BANK_NAMES)
    axes[0].set(ylabel="% of the outputs' squares", yscale="log", title="changed by rounding to 6 bits")
    axes[0].legend(fontsize=8)
