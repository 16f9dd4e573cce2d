"""A quantised model that nobody trained, with the statistics of PR 1501's artifact, at any size.

Bank codes are a Gaussian of 4.83 steps, rounded and clipped: 4.32 bits a weight and 16 % of +-1, as many as
were counted there. Rows are alike, because nearly all of them have the step 1/31 there, the floor of the
grid. With a `spread`, rows and columns differ, in the variance of the codes and in the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pgolf_fast.config.model import ModelConfig
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.grid import quantize_int8_rows
from pgolf_fast.quant.state import TABLE_BITS, QuantizedState, QuantizedTensor, is_slot, unbank

BITS, CLIP = 6, 31
SIGMA = 4.83  # of the bank codes, in steps
TABLE_STD = 0.15  # of the tables' weights: about 6.3 bits each at steps of 1/127
SMALL_TENSOR = 65_536  # elements up to which a tensor stays float16


@dataclass(frozen=True, eq=False)
class Synthetic:
    """The model and the bits that a coder would need for its bank codes if it knew how they were drawn."""

    quantized: QuantizedState
    oracle_bits: float


def unbanked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its unbanked name, in the order of the state dict."""
    with torch.device("meta"):
        state = GPT(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in unbank(state).items()}


def synthetic(config: ModelConfig, *, spread: float = 0.0, seed: int = 0) -> Synthetic:
    """The same model for the same arguments.

    spread: standard deviation of the log of every row's and every column's scale; also of the rows' steps,
    which are all 1/31 without it.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, QuantizedTensor | Tensor] = {}
    oracle_bits = 0.0
    for name, shape in unbanked_shapes(config).items():
        if is_slot(name):
            codes, bits = _codes(random, shape, spread)
            oracle_bits += bits
            steps = np.exp(spread * random.standard_normal(shape[0])) / CLIP
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
    random: np.random.Generator, shape: tuple[int, ...], spread: float
) -> tuple[NDArray[np.int8], float]:
    """Codes int8 (R, C), and -log2 of their probability under the clipped, rounded Gaussian of each."""
    rows, columns = (np.exp(spread * random.standard_normal(size)) for size in shape)
    sigma = SIGMA * rows[:, None] * columns
    codes = np.rint(sigma * random.standard_normal(shape)).clip(-CLIP, CLIP)
    above, below = (
        np.where(codes == CLIP, np.inf, codes + 0.5),
        np.where(codes == -CLIP, -np.inf, codes - 0.5),
    )
    # both ends on the side where the distribution function is small, so that differences keep their digits
    flip = codes > 0
    low, high = np.where(flip, -above, below) / sigma, np.where(flip, -below, above) / sigma
    share = torch.special.ndtr(torch.from_numpy(high)) - torch.special.ndtr(torch.from_numpy(low))
    return codes.astype(np.int8), float(-torch.log2(share).sum())
