"""Errors of rounding the banks to 6 bits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.console import Table, number
from pgolf_fast.data.tokenizer import byte_table
from pgolf_fast.errors import PgolfError
from pgolf_fast.lab.analysis.geometry import common
from pgolf_fast.lab.analysis.models import LoadedModel, validation_or_why
from pgolf_fast.lab.analysis.summary import Options, Summary, columns, draw_bars, ratio, tabulate, unmeasured
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.quant.calibration import collect_hessians, self_generate
from pgolf_fast.quant.grid import dequantize, quantize_rows
from pgolf_fast.quant.state import SLOTS, group_of, unbank

LARGEST_CODE = 31
FIXED_STEP_MSE = 1 / LARGEST_CODE**2 / 12  # 8.67e-5, of rounding smooth distributions to multiples of 1/31


def floored_grid(matrix: Tensor) -> Tensor:
    """Round a matrix (R, C) to the published grid: ±31 steps of max / 31 per row, at least 1/31."""
    step = matrix.abs().amax(1, keepdim=True).div(LARGEST_CODE).clamp_min(1 / LARGEST_CODE)
    return torch.round(matrix / step).clamp_(-LARGEST_CODE, LARGEST_CODE) * step


def row_grid(matrix: Tensor) -> Tensor:
    """Round a matrix (R, C) to 6-bit steps that follow each row, by this package's percentile search."""
    return dequantize(*quantize_rows(matrix, clip_range=LARGEST_CODE, scale_floor=False))


GRIDS: dict[str, Callable[[Tensor], Tensor]] = {"published": floored_grid, "row": row_grid}


def analyze(models: Sequence[LoadedModel], options: Options) -> list[Summary]:
    """Measure rounding errors of each bank: as published, relative to the weights, and in the outputs.

    The last needs validation tokens or text that the model writes. Raises PgolfError for unreadable data.
    """
    summaries = [published(models), corrected(models)]
    hessians: dict[str, Mapping[str, Tensor]] = {}
    texts: dict[str, str] = {}
    for model in models:
        own, text = calibrate(model, options, models[0])
        if own is None:
            name = "quantization errors, Hessian-weighted"
            return [*summaries, unmeasured(name, f"no calibration: {text}")]
        hessians[model.name], texts[model.name] = own, text
    if len(set(texts.values())) > 1:
        text = "; ".join(f"{name}: {own}" for name, own in texts.items())
    return [*summaries, weighted(models, hessians, text)]


def calibrate(
    model: LoadedModel, options: Options, first: LoadedModel | None = None
) -> tuple[Mapping[str, Tensor] | None, str]:
    """Return float32 Hessians by group and a description of their text; or None and what to give.

    The text is `options.calibration_tokens` validation tokens of the run of the `first` model (default: its
    own), or without data text that the model writes, as much as its configuration says.
    """
    try:
        config = model.need_config()
    except PgolfError as error:
        return None, str(error)
    validation, tokenizer = validation_or_why([first or model, model], options), model.tokenizer()
    if not isinstance(validation, str):
        network = model.network(validation.source.table, options.device)
        ids = torch.from_numpy(validation.first(options.calibration_tokens))
        text = ids.unfold(0, validation.seq_len + 1, validation.seq_len)
        described = f"{len(text) * validation.seq_len:,} validation tokens"
    elif tokenizer is None:
        return None, validation
    else:
        network, length = model.network(byte_table(tokenizer), options.device), config.train.seq_len
        text, described = None, "tokens written by the model"
    try:
        if text is None:
            text = self_generate(network, config.quant, length, model.packed)
            described = f"{text.numel():,} {described}"
        return collect_hessians(network, text), described
    except PgolfError as error:
        return None, f"{model.name}: {error}"


def published(models: Sequence[LoadedModel]) -> Summary:
    """Measure the mean squared error of each bank on the floored grid (PR 1501).

    The last row but one is weighted by parameters. Two models of the same shapes also have ratios, and the
    number of slots where the first has the lower error.
    """
    by_slot = {m.name: {bank: _errors(m.state[bank], floored_grid) for bank in BANK_NAMES} for m in models}
    means = {bank: [float(own[bank].mean()) for own in by_slot.values()] for bank in BANK_NAMES}
    overall = {}
    for place, model in enumerate(models):
        sizes = {bank: model.state[bank].numel() for bank in BANK_NAMES}
        total = sum(means[bank][place] * size for bank, size in sizes.items())
        overall[model.name] = total / sum(sizes.values())
    means |= {"all": [*overall.values()], "step² / 12": [FIXED_STEP_MSE] * len(models)}
    header, why = ["bank", *overall], ""
    rows = [[bank, *(f"{error:.4e}" for error in errors)] for bank, errors in means.items()]
    try:
        if len(models) == 2 and common(models):
            header += ["ratio", f"lower in {models[0].name}"]
            lower = {bank: torch.lt(*(own[bank] for own in by_slot.values())).tolist() for bank in BANK_NAMES}
            for row in rows:
                slots = lower.get(row[0])
                row.append(number(ratio(*means[row[0]]), ".5f"))
                row.append("-" if slots is None else f"{sum(slots)}/{len(slots)}")
    except PgolfError as error:
        why = f" No ratios: {error}."
    values = {
        name: {"slot_mse": {bank: e.tolist() for bank, e in by_slot[name].items()}, "mean_mse": mse}
        for name, mse in overall.items()
    }
    return Summary.published(
        "quantization errors on the published grid",
        "Shows the error of the step 1/31, which is step² / 12 = 8.67e-5 for any bank whose rows stay below "
        "1 and whose weights spread over more than a step; cannot show which of two such models rounds "
        f"better, since it hardly depends on their weights.{why}",
        Table(header, rows),
        {"step_squared_over_12": FIXED_STEP_MSE, "models": values},
    )


def corrected(models: Sequence[LoadedModel]) -> Summary:
    """Measure squared errors of both grids relative to the bank, and the share of rows on the floor."""
    values = {m.name: {name: _losses_of_rounding(m.state[name]) for name in BANK_NAMES} for m in models}
    shown = columns(".1%", rows_on_the_floor="rows below 1") + columns(".3e", mse_row="MSE, row grid")
    shown += columns(".3%", relative_published="lost, published grid", relative_row="lost, row grid")
    return Summary(
        "quantization errors by row",
        "Shows how much of the weights' squares rounding loses, with fixed steps and with steps that follow "
        "each row; cannot show what the loss will be, as some weights matter more than others.",
        *tabulate(("model", "bank"), shown, values),
    )


def _losses_of_rounding(bank: Tensor) -> dict[str, float | None]:
    energy = float(bank.double().square().sum())
    part: dict[str, float | None] = {"rows_on_the_floor": float((bank.abs().amax(2) < 1).double().mean())}
    for grid, rounded in GRIDS.items():
        mse = float(_errors(bank, rounded).mean())
        part |= {f"mse_{grid}": mse, f"relative_{grid}": ratio(mse * bank.numel(), energy)}
    return part


def weighted(
    models: Sequence[LoadedModel], hessians: Mapping[str, Mapping[str, Tensor]], text: str
) -> Summary:
    """Measure |x E^T|^2 / |x W^T|^2 over calibration inputs x, where E = W - rounded W, by bank and grid.

    Hessians are those of GPTQ, with 1 % of the mean of their diagonal added to it.
    """
    values: dict[str, Any] = {}
    for model in models:
        matrices = unbank(model.state)
        sums = {name: dict.fromkeys((*GRIDS, "output"), 0.0) for name in BANK_NAMES}
        for bank, kinds in SLOTS.items():
            for name in (n for n in matrices if n.split(".", 2)[-1] in kinds):
                weight = matrices[name]
                hessian = hessians[model.name][group_of(name)].cpu().double()
                sums[bank]["output"] += energy_out(weight.double(), hessian)
                for grid, rounded in GRIDS.items():
                    sums[bank][grid] += energy_out((weight - rounded(weight)).double(), hessian)
        values[model.name] = {
            bank: {grid: ratio(part[grid], part["output"]) for grid in GRIDS} for bank, part in sums.items()
        }
    heights = {
        f"{name}, {grid} grid": [100 * (banks[bank][grid] or 0) for bank in BANK_NAMES]
        for name, banks in values.items()
        for grid in GRIDS
    }
    labels = {"ylabel": "% of the outputs' squares", "title": "changed by rounding to 6 bits"}
    shown = columns(".3%", published="changed, published grid", row="changed, row grid")
    return Summary(
        "quantization errors, Hessian-weighted",
        f"Shows how much of each bank's output (sum of squares, on {text}) plain rounding changes; cannot "
        "show how the following layers respond, nor what GPTQ would save.",
        tabulate(("model", "bank"), shown, values)[0],
        {"calibration": text, **values},
        draw_bars("hessian_weighted", BANK_NAMES, heights, None, yscale="log", **labels),
    )


def energy_out(matrix: Tensor, hessian: Tensor) -> float:
    """Return the sum over inputs x of |x matrix^T|^2, where hessian = sum of x^T x: trace(M H M^T)."""
    return float((matrix @ hessian * matrix).sum())


def _errors(bank: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean squared errors of the slots, float64 (slots,)."""
    return torch.stack([(matrix.double() - rounded(matrix).double()).square().mean() for matrix in bank])
