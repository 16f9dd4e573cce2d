"""Compare the grids reference, percentile and rd at equal bytes on a trained run, and the parts of rd.

    python benchmarks/study_grid.py runs/small [--out benchmarks/results/grid_small.json] [--no-parts]

Every artifact is a whole file, packed by the same codecs. The targets are the sizes of `reference` at 4, 5
and 6 bits, where it needs no pruning. Grids of fixed bits meet a target in the better of two forms: the most
bits that fit, or one bit more with as many +-1 codes zeroed as needed, finest rows first (PR 1501).
Calibration text, Hessians and data are the same for all. Scores are over all validation data of the run.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.fit import fit_to_target
from pgolf_fast.artifact.load import load
from pgolf_fast.artifact.pack import artifact_bytes
from pgolf_fast.bench.drawing import write_png
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import PackConfig, QuantConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import plain_score
from pgolf_fast.io import write_text
from pgolf_fast.quant import rd
from pgolf_fast.quant.calibration import collect_fisher, collect_hessians, self_generate
from pgolf_fast.quant.rd import RateDistortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, dequantize_state, is_slot, quantize_state

Row = dict[str, object]

BITS = range(3, 9)
DIVERGENCE_TOKENS = 65_536


class Study:
    """A run, calibrated once; scores states by bits per byte and by divergence from the float model."""

    def __init__(self, path: Path, data: str | None):
        self.folder = RunFolder(path)
        config = self.folder.read_config()
        self.quant = replace(config.quant, calibration_sequences=64, calibration_length=config.train.seq_len)
        data_config = config.data if data is None else replace(config.data, path=data)
        self.config = replace(config, quant=self.quant, data=data_config)
        self.model = load(self.folder, "float", config=self.config).model
        self.floats = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        source = open_source(self.config.data, config.model.vocab_size)
        device = self.model.tok_emb.weight.device
        self.stream = Stream(source.validation(config.eval_seq_len), source.table, device)
        self.text = self_generate(self.model, self.quant, config.train.seq_len)
        self.hessians = collect_hessians(self.model, self.text)
        self.fishers = collect_fisher(self.model, self.text, self.hessians)

    def bytes(self, state: QuantizedState, quant: QuantConfig) -> int:
        return artifact_bytes(state, replace(self.config, quant=quant, pack=PackConfig(code_bytes=0)))

    def bpb(self, state: dict[str, Tensor]) -> float:
        self.model.load_state_dict(state)
        return plain_score(self.model, self.stream, self.config).bpb

    @torch.no_grad()
    def divergence(self, state: dict[str, Tensor]) -> float:
        """Return the KL divergence from the float model in bits per byte: far less noisy than bpb."""
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
    """Zero as few +-1 codes as needed to fit, finest rows first; return None if no number suffices."""
    names = list(state.matrices())
    ones, costs = [], []
    for index, name in enumerate(names):
        matrix = state.matrices()[name]
        at = torch.nonzero(matrix.codes.flatten().abs() == 1).flatten()
        ones.append(torch.stack((torch.full_like(at, index), at)))
        costs.append(matrix.scale.float().square()[at // matrix.codes.shape[1]])
    order = torch.cat(ones, dim=1)[:, torch.argsort(torch.cat(costs), stable=True)]

    def zeroed(count: int) -> QuantizedState:
        tensors = dict(state.tensors)
        for index, name in enumerate(names):
            matrix = state.matrices()[name]
            codes = matrix.codes.flatten().clone()
            codes[order[1, :count][order[0, :count] == index]] = 0
            tensors[name] = replace(matrix, codes=codes.view_as(matrix.codes))
        return QuantizedState(tensors)

    low, high = 0, order.shape[1]
    if size(zeroed(high)) > target:
        return None
    while high - low > 16:
        middle = (low + high) // 2
        low, high = (low, middle) if size(zeroed(middle)) <= target else (middle, high)
    return zeroed(high)


def fixed_bits(
    study: Study, grid: str, target: int, natural: dict[int, tuple[QuantizedState, int]]
) -> Iterator[tuple[str, QuantizedState]]:
    """Yield the states with which a grid of fixed bits meets the target, and how."""
    fitting = [bits for bits, (_, size) in natural.items() if size <= target]
    if fitting:
        yield f"{max(fitting)} bits", natural[max(fitting)][0]
    if over := min((bits for bits in natural if bits not in fitting), default=0):
        quant = replace(study.quant, grid=grid, bits=over)  # type: ignore[arg-type]
        state = pruned(natural[over][0], lambda s: study.bytes(s, quant), target)
        if state is not None:
            yield f"{over} bits, pruned", state


def compare(study: Study) -> list[Row]:
    """Return rows of target, grid, how, bytes and bpb; of several states the one that diverges least."""
    natural: dict[str, dict[int, tuple[QuantizedState, int]]] = {"reference": {}, "percentile": {}}
    for grid, bits in itertools.product(natural, BITS):
        quant = replace(study.quant, grid=grid, bits=bits)  # type: ignore[arg-type]
        state = quantize_state(study.floats, quant, study.hessians)
        natural[grid][bits] = state, study.bytes(state, quant)
    rows: list[Row] = []
    for target in (natural["reference"][bits][1] for bits in (4, 5, 6)):
        for grid, states in natural.items():
            fitting = [
                (study.divergence(dequantize_state(state)), how, state)
                for how, state in fixed_bits(study, grid, target, states)
            ]
            if fitting:
                _, how, state = min(fitting, key=lambda one: one[0])
                size = study.bytes(state, replace(study.quant, grid=grid))  # type: ignore[arg-type]
                bpb = study.bpb(dequantize_state(state))
                console.logger.info("%d %s: %.5f", target, grid, bpb)
                rows.append({"target": target, "grid": grid, "how": how, "bytes": size, "bpb": bpb})
        rows.append(rd_row(study, target))
    return rows


def rd_row(study: Study, target: int) -> Row:
    quant = replace(study.quant, grid="rd", target_bytes=target)
    grids, start = RateDistortion(study.floats, study.fishers, quant), time.perf_counter()
    landed = fit_to_target(grids, lambda state: study.bytes(state, quant), target)
    seconds, bpb = time.perf_counter() - start, study.bpb(dequantize_state(landed.state))
    console.logger.info("%d rd: %.5f", target, bpb)
    how = f"{landed.price:.2e} nats/bit"
    row = {"target": target, "grid": "rd", "how": how, "bytes": landed.artifact_bytes, "bpb": bpb}
    return {**row, "landing_seconds": seconds}


class _BanksOnly(RateDistortion):
    """Grid rd on bank matrices only; tables and projections as in the other grids."""

    small: dict[str, QuantizedTensor | Tensor]

    def quantize(self, price: float, like: QuantizedState | None = None) -> QuantizedState:
        tensors = super().quantize(price, like).tensors
        return QuantizedState({n: t if is_slot(n) else self.small[n] for n, t in tensors.items()})


def parts(study: Study, target: int) -> list[Row]:
    """Return the divergence at the target with one part of rd removed or added."""
    quant, floats, fishers = replace(study.quant, grid="rd", target_bytes=target), study.floats, study.fishers
    mean = float(torch.cat([f.rows for n, f in fishers.items() if is_slot(n)]).mean())
    row_means = {n: replace(f, rows=torch.full_like(f.rows, f.rows.mean())) for n, f in fishers.items()}
    one_mean = {n: replace(f, rows=torch.full_like(f.rows, mean)) for n, f in fishers.items()}
    banks_only = _BanksOnly(floats, {n: f for n, f in fishers.items() if is_slot(n)}, quant)
    percentile = quantize_state(floats, replace(study.quant, grid="percentile"), study.hessians)
    banks_only.small = percentile.tensors
    whole, rowwise = (RateDistortion(floats, fishers, quant) for _ in range(2))
    for i, group in enumerate(rowwise._groups):
        # One step for all columns: their error then counts by the mean of 1 / U_ii^2.
        pivot = torch.diagonal(group.factor).pow(-2).mean().rsqrt().item()
        ones = torch.ones_like(group.column_step)
        rowwise._groups[i] = replace(group, column_step=ones, mean_pivot=pivot)
    variants = {
        "rd": whole,
        "no column steps": rowwise,
        "rows of a matrix equal": RateDistortion(floats, row_means, quant),
        "all rows equal": RateDistortion(floats, one_mean, quant),
        "nearest codes": whole,
        "bank matrices only": banks_only,
        "corrections of rank <= 8": RateDistortion(floats, fishers, replace(quant, rank=8)),
    }
    rows: list[Row] = []
    for name, grids in variants.items():
        price = 0.0 if name == "nearest codes" else rd.ROUNDING_PRICE
        with mock.patch.object(rd, "ROUNDING_PRICE", price):
            landed = fit_to_target(grids, lambda state: study.bytes(state, quant), target)
        lost = study.divergence(dequantize_state(landed.state))
        console.logger.info("%s: %.5f", name, lost)
        rows.append({"part": name, "bytes": landed.artifact_bytes, "divergence": lost})
    return rows


def draw(path: Path, result: dict) -> None:
    def paint(figure) -> None:
        axes = figure.subplots()
        for grid in ("reference", "percentile", "rd"):
            every = [*result["rows"], *result["curve"]]
            points = sorted((r["bytes"] / 1e6, r["bpb"]) for r in every if r["grid"] == grid)
            sizes, scores = zip(*points, strict=True)
            axes.plot(sizes, [bpb - result["float_bpb"] for bpb in scores], "o-", label=grid)
        title = f"{result['run']}, non-overlapping; float weights: {result['float_bpb']:.4f}"
        axes.set(xlabel="MB of the artifact", ylabel="bits per byte above the float weights", title=title)
        axes.set_yscale("log")
        axes.grid(which="both")
        axes.legend()

    write_png(path, paint, (7, 4.5), "picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="folder of shards; default: the run's")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grid_small.json")
    parser.add_argument("--no-parts", action="store_true", help="leave out the parts of rd")
    arguments = parser.parse_args()
    console.setup_logging()
    study = Study(arguments.run, arguments.data)
    result: dict = {"run": study.config.name, "validation_targets": study.stream.num_targets}
    result["float_bpb"] = study.bpb(study.floats)
    result["rows"] = compare(study)
    targets = sorted({row["target"] for row in result["rows"]})
    result["curve"] = [rd_row(study, int(share * targets[0])) for share in (0.55, 0.75)]
    if not arguments.no_parts:
        result["parts_target"], result["parts"] = targets[0], parts(study, targets[0])
    write_text(arguments.out, json.dumps({**result, **provenance()}, indent=2) + "\n")
    draw(arguments.out.with_suffix(".png"), result)
    for rows in filter(None, (result["rows"], result.get("parts"))):
        names = [name for name in rows[0] if name != "landing_seconds"]
        console.logger.info("%s\n", console.Table(names, [[row[name] for name in names] for row in rows]))


if __name__ == "__main__":
    main()
