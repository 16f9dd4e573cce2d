"""Grids at equal bytes: reference, percentile and rd on a trained run, and what each part of rd is worth.

    python benchmarks/study_grid.py runs/small [--out benchmarks/results/grid_small.json] [--no-parts]

Every artifact is the whole file, packed by the same codecs. Targets are what `reference` takes at 4, 5 and 6
bits, so that it needs no pruning there. Grids of fixed bits meet a target in the better of two ways: the most
bits that fit, or one bit more with as many +-1 codes zeroed as needed, finest rows first (PR 1501).
Calibration text, Hessians and data are the same for all. Scores are over all of the run's validation data.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.landing import fit_to_target
from pgolf_fast.artifact.pack import artifact_bytes
from pgolf_fast.artifact.steps import float_model
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import PackConfig, QuantConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import plain_score
from pgolf_fast.quant import rd
from pgolf_fast.quant.calibration import collect_hessians, self_generate
from pgolf_fast.quant.fisher import collect_fisher
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import (
    QuantizedState,
    QuantizedTensor,
    dequantize_state,
    is_slot,
    quantize_state,
)

BITS = range(3, 9)
DIVERGENCE_TOKENS = 65_536


class Study:
    """One run, calibrated once; scores of states by bits per byte, and divergence from the float model."""

    def __init__(self, path: Path, data: str | None):
        self.folder = RunFolder(path)
        config = self.folder.read_config()
        self.quant = replace(config.quant, calibration_sequences=64, calibration_length=config.train.seq_len)
        data_config = config.data if data is None else replace(config.data, path=data)
        self.config = replace(config, quant=self.quant, data=data_config)
        self.model = float_model(self.folder, self.config)
        self.floats = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        source = open_source(self.config.data, config.model.vocab_size)
        device = self.model.tok_emb.weight.device
        self.stream = Stream(source.validation(config.eval_seq_len), source.table, device)
        self.text = self_generate(self.model, self.quant, config.train.seq_len)
        self.hessians = collect_hessians(self.model, self.text)
        self.fishers = collect_fisher(self.model, self.text, self.hessians)

    def bytes(self, state: QuantizedState, quant: QuantConfig) -> int:
        tree = run_config_to_dict(replace(self.config, quant=quant))
        return artifact_bytes(state, tree, PackConfig(code_bytes=0))

    def bpb(self, state: dict[str, Tensor]) -> float:
        self.model.load_state_dict(state)
        return plain_score(self.model, self.stream, self.config).bpb

    @torch.no_grad()
    def divergence(self, state: dict[str, Tensor]) -> float:
        """KL divergence from the float model in bits per byte: what bpb shows, with far less noise."""
        length, total = self.config.eval_seq_len, 0.0
        count = min(DIVERGENCE_TOKENS, self.stream.num_targets) // length
        for batch in self.stream.tokens[: count * length].view(count, length).split(16):
            logs = []
            for weights in (self.floats, state):
                self.model.load_state_dict(weights)
                logs.append(torch.log_softmax(self.model.logits(batch).float(), dim=-1))
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        return total / (math.log(2) * int(self.stream.target_bytes[: count * length].sum()))


def pruned(
    state: QuantizedState, size: Callable[[QuantizedState], int], target: int
) -> QuantizedState | None:
    """The state with the fewest +-1 codes zeroed that fits, finest rows first; None if it cannot fit."""
    names = list(state.matrices())
    ones, costs = [], []
    for index, name in enumerate(names):
        matrix = state.matrices()[name]
        at = torch.nonzero(matrix.codes.flatten().abs() == 1).flatten()
        ones.append(torch.stack((torch.full_like(at, index), at)))
        costs.append(matrix.scale.float().square()[at // matrix.codes.shape[1]])
    places = torch.cat(ones, dim=1)[:, torch.argsort(torch.cat(costs), stable=True)]

    def zeroed(count: int) -> QuantizedState:
        tensors = dict(state.tensors)
        for index, name in enumerate(names):
            matrix = state.matrices()[name]
            codes = matrix.codes.flatten().clone()
            codes[places[1, :count][places[0, :count] == index]] = 0
            tensors[name] = replace(matrix, codes=codes.view_as(matrix.codes))
        return QuantizedState(tensors)

    low, high = 0, places.shape[1]
    if size(zeroed(high)) > target:
        return None
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (low, middle) if size(zeroed(middle)) <= target else (middle, high)
    return zeroed(high)


def fixed_bits(
    study: Study, grid: str, target: int, natural: dict[int, tuple[QuantizedState, int]]
) -> Iterator[tuple[str, QuantizedState]]:
    """The ways in which a grid of fixed bits meets the target."""
    fitting = [bits for bits, (_, size) in natural.items() if size <= target]
    if fitting:
        yield f"{max(fitting)} bits", natural[max(fitting)][0]
    over = min((bits for bits in natural if bits not in fitting), default=None)
    if over is not None:
        quant = replace(study.quant, grid=grid, bits=over)  # type: ignore[arg-type]
        state = pruned(natural[over][0], lambda s: study.bytes(s, quant), target)
        if state is not None:
            yield f"{over} bits, pruned", state


def compare(study: Study) -> list[dict[str, object]]:
    """Rows of target, grid, how, bytes and bpb; of several ways only that which diverges least."""
    natural: dict[str, dict[int, tuple[QuantizedState, int]]] = {}
    for grid in ("reference", "percentile"):
        natural[grid] = {}
        for bits in BITS:
            quant = replace(study.quant, grid=grid, bits=bits)
            state = quantize_state(study.floats, quant, study.hessians)
            natural[grid][bits] = state, study.bytes(state, quant)
    rows: list[dict[str, object]] = []
    for target in (natural["reference"][bits][1] for bits in (4, 5, 6)):
        for grid, states in natural.items():
            ways = []
            for how, state in fixed_bits(study, grid, target, states):
                ways.append((study.divergence(dequantize_state(state)), how, state))
                console.logger.info("%d %s, %s: divergence %.5f", target, grid, how, ways[-1][0])
            if ways:
                _, how, state = min(ways, key=lambda way: way[0])
                size = study.bytes(state, replace(study.quant, grid=grid))  # type: ignore[arg-type]
                bpb = study.bpb(dequantize_state(state))
                console.logger.info("%d %s: %.5f", target, grid, bpb)
                rows.append({"target": target, "grid": grid, "how": how, "bytes": size, "bpb": bpb})
        rows.append(rd_row(study, target))
    return rows


def rd_row(study: Study, target: int) -> dict[str, object]:
    quant = replace(study.quant, grid="rd", target_bytes=target)
    grids, start = RateDistortion(study.floats, study.fishers, quant), time.perf_counter()
    landed = fit_to_target(grids, lambda state: study.bytes(state, quant), target)
    seconds = time.perf_counter() - start
    how = f"{landed.price:.2e} nats/bit"
    bpb = study.bpb(dequantize_state(landed.state))
    console.logger.info("%d rd: %.5f", target, bpb)
    row = {"target": target, "grid": "rd", "how": how, "bytes": landed.artifact_bytes, "bpb": bpb}
    return {**row, "landing_seconds": seconds}


class _TablesAside(RateDistortion):
    """Grid rd on bank matrices only; tables and projections as the other grids have them."""

    others: dict[str, QuantizedTensor | Tensor]

    def quantize(self, price: float, like: QuantizedState | None = None) -> QuantizedState:
        tensors = super().quantize(price, like).tensors
        return QuantizedState({n: t if is_slot(n) else self.others[n] for n, t in tensors.items()})


def parts(study: Study, target: int) -> list[dict[str, object]]:
    """What the target costs in divergence with one part of rd left out, or put in."""
    quant = replace(study.quant, grid="rd", target_bytes=target)
    mean = torch.cat([f.rows for n, f in study.fishers.items() if is_slot(n)]).mean()
    row_means = {n: replace(f, rows=torch.full_like(f.rows, f.rows.mean())) for n, f in study.fishers.items()}
    one_mean = {n: replace(f, rows=torch.full_like(f.rows, float(mean))) for n, f in study.fishers.items()}
    slots = {n: f for n, f in study.fishers.items() if is_slot(n)}
    aside = _TablesAside(study.floats, slots, quant)
    aside.others = quantize_state(
        study.floats, replace(study.quant, grid="percentile"), study.hessians
    ).tensors
    rowwise = RateDistortion(study.floats, study.fishers, quant)
    rowwise._groups = [
        # one step for all columns: its error counts by the mean of 1 / U_ii^2
        replace(g, column_step=torch.ones_like(g.column_step), mean_pivot=_one_pivot(g.factor))
        for g in rowwise._groups
    ]
    whole = RateDistortion(study.floats, study.fishers, quant)
    variants: list[tuple[str, RateDistortion, float]] = [
        ("rd", whole, rd.ROUNDING_PRICE),
        ("no column steps", rowwise, rd.ROUNDING_PRICE),
        ("rows of a matrix equal", RateDistortion(study.floats, row_means, quant), rd.ROUNDING_PRICE),
        ("all rows equal", RateDistortion(study.floats, one_mean, quant), rd.ROUNDING_PRICE),
        ("nearest codes", whole, 0.0),
        ("bank matrices only", aside, rd.ROUNDING_PRICE),
        (
            "corrections of rank <= 8",
            RateDistortion(study.floats, study.fishers, replace(quant, rank=8)),
            rd.ROUNDING_PRICE,
        ),
    ]
    rows: list[dict[str, object]] = []
    for name, grids, rounding in variants:
        rd.ROUNDING_PRICE, usual = rounding, rd.ROUNDING_PRICE
        landed = fit_to_target(grids, lambda state: study.bytes(state, quant), target)
        rd.ROUNDING_PRICE = usual
        lost = study.divergence(dequantize_state(landed.state))
        console.logger.info("%s: %.5f", name, lost)
        rows.append({"part": name, "bytes": landed.artifact_bytes, "divergence": lost})
    return rows


def _one_pivot(factor: Tensor) -> float:
    return torch.diagonal(factor).pow(-2).mean().rsqrt().item()


def draw(path: Path, result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for grid, colour in (("reference", "#b04a3a"), ("percentile", "#c69214"), ("rd", "#2c6fbb")):
        points = sorted(
            (r["bytes"], r["bpb"]) for r in [*result["rows"], *result["curve"]] if r["grid"] == grid
        )
        sizes, scores = np.array(points).T
        axes.plot(sizes, scores - result["float_bpb"], "o-", label=grid, color=colour)
    title = f"{result['run']}, non-overlapping; float weights: {result['float_bpb']:.4f}"
    axes.set(xlabel="bytes of the artifact", ylabel="bits per byte above the float weights", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.1f} M")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="folder of shards; default: the run's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grid_small.json")
    parser.add_argument("--no-parts", action="store_true", help="leave out what the parts of rd are worth")
    arguments = parser.parse_args()
    console.setup_logging()
    study = Study(arguments.run, arguments.data)
    result: dict = {"run": study.config.name, "validation_targets": study.stream.num_targets}
    result["float_bpb"] = study.bpb(study.floats)
    result["rows"] = compare(study)
    targets = sorted({row["target"] for row in result["rows"]})
    result["curve"] = [rd_row(study, int(share * targets[0])) for share in (0.55, 0.75)]
    if not arguments.no_parts:
        result["parts_target"] = targets[0]
        result["parts"] = parts(study, targets[0])
    arguments.out.write_text(json.dumps({**result, **provenance()}, indent=2) + "\n")
    draw(arguments.out.with_suffix(".png"), result)
    lines = [
        (f"{r['target']:,}", r["grid"], r["how"], f"{r['bytes']:,}", f"{r['bpb']:.5f}")
        for r in result["rows"]
    ]
    console.logger.info("%s", console.table(lines, ("target", "grid", "by", "bytes", "bpb")))
    for row in result.get("parts", []):
        console.logger.info("%-28s %10d bytes  divergence %.5f", row["part"], row["bytes"], row["divergence"])


if __name__ == "__main__":
    main()
