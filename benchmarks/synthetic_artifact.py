"""Made-up models of full size with the statistics of PR 1501's artifact, and the folder that holds one.

Bank codes are Gaussian with a standard deviation of 4.83 steps, rounded and clipped: 4.32 bits a weight and
16 % of +-1, as counted in that artifact. All rows have the step 1/31, the floor of the grid, as nearly all do
there. A spread varies the variance of the codes by row or by column, and the steps of the rows.

A folder holds `reference.pt` for the general compressors (the layout of PR 1501: torch.save of names, values
and kinds, one byte a weight), `codes.bin` (the bank codes alone) and `config.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.calibration import Fisher
from pgolf_fast.quant.grid import quantize_int8_rows
from pgolf_fast.quant.state import (
    READERS,
    TABLE_BITS,
    QuantizedState,
    QuantizedTensor,
    group_of,
    hessian_name,
    is_slot,
    unbank,
)

REFERENCE, CODES, CONFIG = "reference.pt", "codes.bin", "config.json"
BITS, CLIP = 6, 31
SIGMA = 4.83  # standard deviation of the bank codes, in steps: P(|code| = 1) = 16.19 %
TABLE_STD = 0.15  # of table weights: about 6.3 bits each at steps of 1/127
SMALL_TENSOR = 65_536  # elements up to which a tensor stays float16


@dataclass(frozen=True, eq=False)
class Synthetic:
    """A model, and the bits that a coder would need for its bank codes if it knew their distributions."""

    quantized: QuantizedState
    oracle_bits: float | None = None


def unbanked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its unbanked name, in the order of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in unbank(_meta_state(config)).items()}


def _meta_state(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return GPT(config).state_dict()


def synthetic(config: ModelConfig, *, rows: float = 0.0, columns: float = 0.0, seed: int = 0) -> Synthetic:
    """Return the same model for the same arguments.

    rows, columns: standard deviation of the log of every row's (column's) scale. `rows` also spreads the
    steps of the rows, which are all 1/31 without it.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, QuantizedTensor | Tensor] = {}
    oracle_bits = 0.0
    for name, shape in unbanked_shapes(config).items():
        if is_slot(name):
            codes, bits = _codes(random, shape, rows, columns)
            oracle_bits += bits
            steps = np.exp(rows * random.standard_normal(shape[0])) / CLIP
            scale = torch.from_numpy(steps.astype(np.float16))
            tensors[name] = QuantizedTensor(torch.from_numpy(codes), scale, BITS)
        else:
            weight = torch.from_numpy(np.asarray(random.normal(0, TABLE_STD, shape), np.float32))
            if len(shape) == 2 and weight.numel() > SMALL_TENSOR:
                tensors[name] = QuantizedTensor(*quantize_int8_rows(weight), TABLE_BITS)
            else:
                tensors[name] = weight.half()
    return Synthetic(QuantizedState(tensors), oracle_bits)


def _codes(
    random: np.random.Generator, shape: tuple[int, ...], rows: float, columns: float
) -> tuple[NDArray[np.int8], float]:
    """Draw codes int8 (R, C); return them and -log2 of their probability under the rounded Gaussians."""
    by_row, by_column = (
        np.exp(spread * random.standard_normal(size))
        for spread, size in zip((rows, columns), shape, strict=True)
    )
    sigma = SIGMA * by_row[:, None] * by_column
    codes = np.rint(sigma * random.standard_normal(shape)).clip(-CLIP, CLIP)
    above = np.where(codes == CLIP, np.inf, codes + 0.5)
    below = np.where(codes == -CLIP, -np.inf, codes - 0.5)
    # Take both ends on the side where the distribution function is small: near 1 their difference cancels.
    flip = codes > 0
    low, high = np.where(flip, -above, below) / sigma, np.where(flip, -below, above) / sigma
    share = torch.special.ndtr(torch.from_numpy(high)) - torch.special.ndtr(torch.from_numpy(low))
    return codes.astype(np.int8), float(-torch.log2(share).sum())


def synthetic_weights(config: RunConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return a float32 state dict whose bank weights have a standard deviation of `SIGMA` steps of 1/31."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in _meta_state(config.model).items():
        deviation = SIGMA / CLIP if name in BANK_NAMES else TABLE_STD
        state[name] = torch.empty(tensor.shape).normal_(0, deviation, generator=generator)
    return state


def synthetic_hessians(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return Hessians by `hessian_name`."""
    generator = torch.Generator().manual_seed(seed)
    matrices = unbank(state)
    layers = sum(name.endswith("attn.c_q.weight") for name in matrices)
    return {
        hessian_name(layer, which): _hessian(matrices[f"blocks.{layer}.{readers[0]}"].shape[1], generator)
        for layer in range(layers)
        for which, readers in READERS.items()
    }


def synthetic_fishers(state: dict[str, Tensor], seed: int = 0) -> dict[str, Fisher]:
    """Return the factors of every matrix, with rows of log-normal importance; groups share a Hessian."""
    generator = torch.Generator().manual_seed(seed)
    hessians: dict[str, Tensor] = {}
    fishers = {}
    for name, matrix in unbank(state).items():
        if matrix.ndim != 2 or not name.endswith(".weight"):
            continue
        group = group_of(name)
        if group not in hessians:
            hessians[group] = _hessian(matrix.shape[1], generator)
        rows = 1e-5 * torch.exp(torch.randn(len(matrix), generator=generator))
        fishers[name] = Fisher(rows, hessians[group], 0.01 if is_slot(name) else 1e-3)
    return fishers


def _hessian(size: int, generator: torch.Generator) -> Tensor:
    """Return the Hessian of inputs of log-normal strength e^(+-1) whose neighbors correlate with 0.9."""
    channels = torch.arange(size)
    strength = torch.randn(size, generator=generator).exp()
    correlation = 0.9 ** (channels[:, None] - channels).abs().float()
    return strength[:, None] * strength * correlation


def write_artifact(folder: Path, quantized: QuantizedState, config: RunConfig) -> None:
    """Write the three files of an artifact. Integers of b bits have the kind "int<b>" in the layout."""
    values: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for name, tensor in quantized.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            values[f"{name}.q"], values[f"{name}.scale"] = tensor.codes, tensor.scale
            kinds[name] = {"type": f"int{tensor.bits}"}
        else:
            values[name], kinds[name] = tensor, "passthrough"
    write_config(folder, config)
    torch.save({"w": values, "m": kinds}, folder / REFERENCE)
    codes = [matrix.codes.numpy().tobytes() for matrix in quantized.matrices().values()]
    (folder / CODES).write_bytes(b"".join(codes))


def write_config(folder: Path, config: RunConfig) -> None:
    """Write the configuration alone, for a pipeline that makes its own artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(run_config_to_dict(config)), encoding="utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def read_artifact(folder: Path) -> tuple[QuantizedState, dict[str, Any]]:
    """Read the model and the configuration that `write_artifact` wrote."""
    tree = torch.load(folder / REFERENCE, weights_only=True)
    values = tree["w"]
    tensors = {
        name: values[name]
        if kind == "passthrough"
        else QuantizedTensor(values[f"{name}.q"], values[f"{name}.scale"], int(kind["type"][3:]))
        for name, kind in tree["m"].items()
    }
    return QuantizedState(tensors), read_config(folder)
