"""A model's state dict as integers: names without banks, what each tensor becomes, and back (PR 1501)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.console import progress
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops.bits import dequantize_bytes
from pgolf_fast.quant.calibration import collect_hessians, hessian_name, self_generate
from pgolf_fast.quant.fake import FixedGrid
from pgolf_fast.quant.gptq import gptq
from pgolf_fast.quant.grid import check_matrix, quantize_int8_rows, quantize_rows

# Slots of each bank, layer by layer, in the order of the stack.
SLOTS = {
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}
# What enters which matrices; those of one row are quantised together.
READERS = {
    "attn_in": ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight"),
    "attn_out": ("attn.proj.weight",),
    "mlp_in": ("mlp.fc.weight",),
    "mlp_hidden": ("mlp.proj.weight",),
}
# Embedding tables, which QuantConfig.tables speaks of; other large matrices are projections.
TABLES = ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")
TABLE_BITS = 8
_SLOT = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+\.weight)")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix as codes int8 (R, C) of `bits` bits, float16: codes * scale * column_scale + left @ right.

    scale (R,); column_scale (C,), None for ones; low_rank: left (R, k) and right (k, C), None for nothing.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    column_scale: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    def step(self) -> Tensor:
        """The step of every row (R, 1), or of every element (R, C), float32."""
        rows = self.scale.float()[:, None]
        return rows if self.column_scale is None else rows * self.column_scale.float()

    def correction(self) -> Tensor | None:
        """left @ right, float32 (R, C)."""
        return None if self.low_rank is None else self.low_rank[0].float() @ self.low_rank[1].float()

    def dequantized(self) -> Tensor:
        """The matrix, float32."""
        return self.finish_(self.codes.float() * self.scale.float()[:, None])

    def finish_(self, by_rows: Tensor) -> Tensor:
        """codes * scale (R, C) float32 made the matrix, in place."""
        if self.column_scale is not None:
            by_rows *= self.column_scale.float()
        return by_rows if (low := self.correction()) is None else by_rows.add_(low)


@dataclass(frozen=True, eq=False)
class QuantizedState:
    """A quantised model: unbanked name -> `QuantizedTensor` or, stored as it is, float16. On the CPU."""

    tensors: dict[str, QuantizedTensor | Tensor]

    def matrices(self) -> dict[str, QuantizedTensor]:
        """The bank matrices alone."""
        return {n: t for n, t in self.tensors.items() if is_slot(n) and isinstance(t, QuantizedTensor)}


def is_slot(name: str) -> bool:
    """Whether an unbanked name is a matrix of a bank."""
    return _SLOT.fullmatch(name) is not None


def group_of(name: str) -> str:
    """What matrices with one input share: the name of their Hessian; of no bank, the matrix alone."""
    if (slot := _SLOT.fullmatch(name)) is None:
        return name
    return hessian_name(int(slot[1]), next(which for which, slots in READERS.items() if slot[2] in slots))


def columns_owner(name: str) -> str:
    """The first of the matrices that share column steps with this one: Q for K and V, else the matrix."""
    return re.sub(r"attn\.c_[kv]", "attn.c_q", name) if is_slot(name) else name


def code_bits(codes: Tensor) -> int:
    """The fewest bits, at least 2, of signed codes that reach as far from zero on both sides."""
    return max(2, 1 + int(codes.abs().amax()).bit_length()) if codes.numel() else 2


def unbank(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with every bank split into its matrices, named as the community names them.

    Raises PgolfError when a bank is missing.
    """
    missing = [name for name in BANK_NAMES if name not in state]
    if missing:
        raise PgolfError(f"the state has no {', '.join(missing)}: it is not a model with weight banks")
    split: dict[str, Tensor] = {}
    for bank in SLOTS:
        split.update(_slots_of(bank, state[bank]))
    return {**split, **{name: tensor for name, tensor in state.items() if name not in BANK_NAMES}}


def _slots_of(name: str, bank: Tensor) -> dict[str, Tensor]:
    """The matrices of a bank, views, by their unbanked names."""
    layers = len(bank) // len(SLOTS[name])
    return {
        f"blocks.{i % layers}.{SLOTS[name][i // layers]}": matrix for i, matrix in enumerate(bank.unbind(0))
    }


def rebank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unbank`. Raises PgolfError when matrices are missing or differ in shape in a bank."""
    layers = 1 + max((int(m[1]) for m in map(_SLOT.fullmatch, tensors) if m), default=-1)
    banks = {}
    for bank, slots in SLOTS.items():
        names = [f"blocks.{layer}.{slot}" for slot in slots for layer in range(layers)]
        missing = [name for name in names if name not in tensors]
        if missing or not layers:
            raise PgolfError(
                f"{bank} cannot be put together: {', '.join(missing) or 'every matrix'} is missing"
            )
        if len({tensors[name].shape for name in names}) > 1:
            raise PgolfError(f"{bank} cannot be put together: its matrices differ in shape")
        banks[bank] = torch.stack([tensors[name] for name in names])
    return {**banks, **{name: tensor for name, tensor in tensors.items() if not is_slot(name)}}


def quantize_state(
    state: Mapping[str, Tensor], config: QuantConfig, hessians: Mapping[str, Tensor] | None = None
) -> QuantizedState:
    """Integers and float16 for a model's state dict: bank matrices, large tables, everything else.

    hessians: as from `collect_hessians`, for method gptq; plain rounding does not look at them.
    Raises PgolfError for values that are not finite, gptq without Hessians, or grid rd, which needs a price
    (see `RateDistortion`).
    """
    if config.grid == "rd":
        raise PgolfError("grid rd needs a byte target: use `pgolf quantize --grid rd`")
    tensors = unbank(state)
    done: dict[str, QuantizedTensor | Tensor] = dict(_quantize_slots(tensors, config, hessians))
    for name, tensor in tensors.items():
        if name in done:
            continue
        # The original makes float16 of whatever has at most 65,536 elements before it looks for bank
        # matrices, none of which is so small in exp101. Here bank matrices come first, so that small models
        # are quantised too; the 66 / 3 / 55 tensors of exp101 come out the same.
        large = name.endswith(".weight") and tensor.ndim == 2 and tensor.numel() > config.small_tensor
        if large and not stays_float(name, config):
            check_matrix(tensor, name)
            codes, scale = quantize_int8_rows(tensor, scale_floor=config.scale_floor)
            done[name] = QuantizedTensor(codes.cpu(), scale.cpu(), TABLE_BITS)
        else:
            done[name] = to_float16(name, tensor)
    return QuantizedState({name: done[name] for name in tensors})


def stays_float(name: str, config: QuantConfig) -> bool:
    """Whether that tensor is an embedding table that the configuration stores as float16."""
    return config.tables == "float16" and name in TABLES


def to_float16(name: str, tensor: Tensor) -> Tensor:
    """A copy in float16, on the CPU. Raises PgolfError for values that it cannot hold."""
    half = tensor.detach().half().cpu()
    if not bool(torch.isfinite(half).all()):
        raise PgolfError(f"{name} has values that are not finite or beyond the 65504 of float16")
    return half.clone()


def _quantize_slots(
    tensors: Mapping[str, Tensor], config: QuantConfig, hessians: Mapping[str, Tensor] | None
) -> dict[str, QuantizedTensor]:
    layers = sum(_SLOT.fullmatch(name) is not None for name in tensors) // 6
    groups = {
        hessian_name(layer, which): {
            name: tensors[name].detach() for name in (f"blocks.{layer}.{slot}" for slot in READERS[which])
        }
        for layer in range(layers)
        for which in READERS
    }
    steps = progress(groups, f"quantise ({config.method})", unit="group")
    done: dict[str, tuple[Tensor, Tensor]] = {}
    if config.method == "gptq":
        done = gptq(
            ((groups[group], _hessian(hessians, group)) for group in steps),
            clip_range=config.clip_range,
            percentiles=config.percentiles,
            scale_floor=config.scale_floor,
            block_size=config.block_size,
            damping=config.damping,
        )
    else:
        for name, weight in (item for group in steps for item in groups[group].items()):
            check_matrix(weight, name)
            done[name] = quantize_rows(
                weight,
                clip_range=config.clip_range,
                percentiles=config.percentiles,
                scale_floor=config.scale_floor,
            )
    return {n: QuantizedTensor(codes.cpu(), scale.cpu(), config.bits) for n, (codes, scale) in done.items()}


def _hessian(hessians: Mapping[str, Tensor] | None, name: str) -> Tensor:
    if hessians is None or name not in hessians:
        raise PgolfError(f"quant.method gptq needs the Hessian {name}: collect it, or use quant.method round")
    return hessians[name]


def dequantize_state(quantized: QuantizedState) -> dict[str, Tensor]:
    """The state dict with banks, all float32, that the integers stand for. Raises PgolfError as `rebank`."""
    matrices = quantized.matrices()
    # banks are put together as bytes, a quarter of what they are as floats
    codes = rebank({name: matrix.codes for name, matrix in matrices.items()})
    scale = rebank({name: matrix.scale for name, matrix in matrices.items()})
    state = {
        name: dequantize_bytes(bank.flatten(0, 1), scale[name].flatten()).view_as(bank)
        for name, bank in codes.items()
    }
    slots = {name: slot for bank in SLOTS for name, slot in _slots_of(bank, state[bank]).items()}
    for name, tensor in quantized.tensors.items():
        if isinstance(tensor, Tensor):
            state[name] = tensor.float()
        else:
            if name not in matrices:
                slots[name] = state[name] = dequantize_bytes(tensor.codes, tensor.scale)
            tensor.finish_(slots[name])
    return state


def bank_grids(quantized: QuantizedState) -> tuple[FixedGrid, ...]:
    """Each bank's own grid, in the order of BANK_NAMES: what its weights are rounded to when they change."""
    matrices = quantized.matrices()
    steps = rebank({name: matrix.step() for name, matrix in matrices.items()})
    offsets: dict[str, Tensor] = {}
    if any(matrix.low_rank is not None for matrix in matrices.values()):
        low = {name: (matrix.correction(), matrix.codes) for name, matrix in matrices.items()}
        offsets = rebank({n: torch.zeros(c.shape) if part is None else part for n, (part, c) in low.items()})
    bits = max(matrix.bits for matrix in matrices.values())
    return tuple(FixedGrid(steps[n], 2 ** (bits - 1) - 1, offsets.get(n)) for n in BANK_NAMES)


@torch.no_grad()
def quantize_model(model: GPT, config: QuantConfig, *, seq_len: int) -> QuantizedState:
    """`quantize_state` of a model, with Hessians of text it writes itself when the method is gptq.

    seq_len: the length the model was trained at; calibration text is no longer. The model is not changed.
    """
    hessians = None
    if config.method == "gptq":
        text = self_generate(model, config, seq_len)
        hessians = collect_hessians(model, text)
    return quantize_state(model.state_dict(), config, hessians)
