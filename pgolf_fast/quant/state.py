"""A model's state dict as integers: unbanked names, quantization, dequantization, and the file (PR 1501)."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pgolf_fast.config.checks import need
from pgolf_fast.config.fields import from_dict
from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.console import progress
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors, save_tensors
from pgolf_fast.model.bank import BANK_NAMES, PackedBanks, PackedMatrices
from pgolf_fast.model.weights import Tensors, not_finite
from pgolf_fast.ops.bits import dequantize_bytes
from pgolf_fast.ops.int6 import int6_pack
from pgolf_fast.quant.gptq import gptq
from pgolf_fast.quant.grid import Coded, FixedGrid, dequantize, quantize_int8_rows, quantize_rows

# Matrices of each bank, layer by layer, in the order of the stack.
SLOTS = {
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}
# Matrices that read each input. Those of one input share a Hessian and are quantized together.
READERS = {
    "attn_in": ("attn.c_q.weight", "attn.c_k.weight", "attn.c_v.weight"),
    "attn_out": ("attn.proj.weight",),
    "mlp_in": ("mlp.fc.weight",),
    "mlp_hidden": ("mlp.proj.weight",),
}
# Embedding tables, to which QuantConfig.tables applies; other large matrices are projections.
TOKEN_TABLE = "tok_emb.weight"
TABLES = (TOKEN_TABLE, "bigram.embed.weight", "ve_shared.embed.weight")
TABLE_BITS = 8
# Suffixes of a quantized matrix's tensors in a file.
CODES, SCALE, COLUMNS, LEFT, RIGHT = ".q", ".scale", ".columns", ".left", ".right"
WIDE, FIRST = ".wide", ".first"
GROUP = 64  # columns of a protected group
_SLOT = re.compile(r"blocks\.(\d+)\.((?:attn|mlp)\.\w+\.weight)")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix as int8 codes: codes * scale * column_scale + left @ right.

    codes (R, C), signed, of `bits` bits. All else is float16: scale (R,); column_scale (C,), None for ones;
    low_rank: left (R, k) and right (k, C), None for no correction. On grid sdclip these are quantized, their
    elements in order but in another shape; and the GROUP columns from `protected[0]` on may have row scales
    of their own, `protected[1]` (R,).
    """

    codes: Tensor
    scale: Tensor
    bits: int
    column_scale: Tensor | None = None
    low_rank: tuple[Any, Any] | None = None
    protected: tuple[int, Tensor] | None = None

    def step(self) -> Tensor:
        """Step of every row (R, 1), or of every element (R, C), float32."""
        rows = self.scale.float()[:, None]
        if self.protected is not None:
            rows = rows.repeat(1, self.codes.shape[1])
            rows[:, self.group] = self.protected[1].float()[:, None]
        return rows if self.column_scale is None else rows * self.column_scale.float()

    def correction(self) -> Tensor | None:
        """left @ right, float32 (R, C)."""
        if self.low_rank is None:
            return None
        left, right = (t.float() if isinstance(t, Tensor) else t.dequantized() for t in self.low_rank)
        return left.reshape(len(self.codes), -1) @ right.reshape(-1, self.codes.shape[1])

    @property
    def group(self) -> slice:
        """Columns of the protected group, or none."""
        return slice(0, 0) if self.protected is None else slice(self.protected[0], self.protected[0] + GROUP)

    def dequantized(self) -> Tensor:
        """The float32 matrix (R, C)."""
        return self.finish_(dequantize(self.codes, self.scale))

    def finish_(self, scaled: Tensor) -> Tensor:
        """Turn `scaled` = codes * scale, float32 (R, C), into the matrix, in place."""
        if self.column_scale is not None:
            scaled *= self.column_scale.float()
        if self.protected is not None:
            scaled[:, self.group] = dequantize(self.codes[:, self.group], self.protected[1])
        return scaled if (low := self.correction()) is None else scaled.add_(low)


Stored = QuantizedTensor | Tensor
Matrices = dict[str, QuantizedTensor]


@dataclass(frozen=True, eq=False)
class QuantizedState:
    """A quantized model on the CPU: unbanked name -> `QuantizedTensor`, or the tensor in float16."""

    tensors: dict[str, Stored]

    def matrices(self) -> Matrices:
        """Bank matrices alone."""
        return {n: t for n, t in self.tensors.items() if is_slot(n) and isinstance(t, QuantizedTensor)}

    def bits(self) -> dict[str, int]:
        """Most bits of a code by section: `codes` for bank matrices, `embeddings` for the rest."""
        bits = {"codes": 0, "embeddings": 0}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, QuantizedTensor):
                bits[section_of(name)] = max(bits[section_of(name)], tensor.bits)
        return bits

    def to_named(self) -> dict[str, Tensor]:
        """Plain tensors for a file, in the order of `tensors`; `from_named` is the inverse.

        A matrix X becomes `X.q`, `X.scale`, `X.left` and `X.right`; if quantized, the last two have `.q` and
        `.scale` in turn. A protected group is `X.first` and `X.wide`. Column steps are `X.columns`, stored
        once for matrices that share them: K and V use those of Q.
        """
        named: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, Tensor):
                named[name] = tensor
                continue
            named[name + CODES], named[name + SCALE] = tensor.codes, tensor.scale
            if tensor.low_rank is not None:
                factors = dict(zip((name + LEFT, name + RIGHT), tensor.low_rank, strict=True))
                named |= QuantizedState(factors).to_named()
            if tensor.protected is not None:
                named[name + FIRST] = torch.tensor(tensor.protected[0]).half()
                named[name + WIDE] = tensor.protected[1]
            if tensor.column_scale is not None and columns_owner(name) == name:
                named[name + COLUMNS] = tensor.column_scale
        return named

    @classmethod
    def from_named(cls, named: Tensors, bits: Mapping[str, Any]) -> QuantizedState:
        """Rebuild the state from `to_named()` and `bits()`.

        Raises PgolfError for missing parts, wrong shapes, parts of no known matrix, or bits outside 2 to 8.
        """
        tensors: dict[str, Stored] = {}
        for name, tensor in named.items():
            matrix = name.removesuffix(CODES)
            if name.endswith(CODES) and not is_part(matrix, named):
                tensors[matrix] = _matrix(named, matrix, tensor, bits)
            elif not is_part(matrix, named):
                tensors[name] = tensor
        return cls(tensors)

    def check(self) -> QuantizedState:
        """Return the state. Raises PgolfError naming a tensor with NaN, infinite values or steps below 0."""
        named = self.to_named()
        for name, tensor in named.items():
            steps = name.endswith((SCALE, COLUMNS, WIDE)) and is_part(name, named)
            problem = "a step is 0 or less" if steps and not bool((tensor > 0).all()) else None
            if problem := not_finite(tensor) or problem:
                raise PgolfError(f"{name}: {problem}")
        return self

    def save(self, path: Path, quant: QuantConfig) -> None:
        """Write the state to a safetensors file, with the settings that made it."""
        # safetensors sorts tensors by size and name, so the order is metadata
        named = self.to_named()
        save_tensors(path, named, {"order": list(named), "bits": self.bits(), "quant": asdict(quant)})

    @classmethod
    def load(cls, path: Path) -> tuple[QuantizedState, QuantConfig]:
        """Read what `save` wrote. Raises PgolfError for another or a damaged file, or as `check` does."""
        named, metadata = load_tensors(path)
        try:
            state = cls.from_named({name: named[name] for name in metadata["order"]}, metadata["bits"])
            return state.check(), from_dict(QuantConfig, metadata["quant"], "quant")
        except (KeyError, TypeError, PgolfError) as error:
            raise PgolfError(f"{path} holds no quantized model ({error}): quantize the run again") from error


def is_part(name: str, named: Container[str]) -> bool:
    """Return whether a tensor of `named` is a scale, a step or a correction of a matrix stored there.

    The suffix alone does not decide: the model has plain tensors such as `bigram.scale`.
    """
    matrix, dot, suffix = name.rpartition(".")
    suffixes = (SCALE, LEFT, RIGHT, WIDE, FIRST, *((COLUMNS,) if columns_owner(matrix) == matrix else ()))
    if matrix.endswith((LEFT, RIGHT)):  # a quantized factor
        suffixes = (SCALE,)
    return matrix + CODES in named and dot + suffix in suffixes


def _matrix(named: Tensors, name: str, codes: Tensor, bits: Mapping[str, Any]) -> QuantizedTensor:
    scale, columns = named.get(name + SCALE), named.get(columns_owner(name) + COLUMNS)
    if codes.ndim != 2 or scale is None or scale.shape != codes.shape[:1]:
        raise PgolfError(f"{name} has no scale for each of its rows")
    low_rank, protected = _low_rank(named, name, codes.shape), _protected(named, name, codes.shape)
    if low_rank is False or protected is False or (columns is not None and columns.shape != codes.shape[1:]):
        raise PgolfError(f"column steps or correction of {name} do not fit it")
    # Grid rd gives every matrix the bits it needs; the other grids use one width for all.
    width = bits.get(section_of(name), TABLE_BITS) if columns is None else code_bits(codes)
    if not isinstance(width, int) or not 2 <= width <= 8:
        raise PgolfError(f"codes have 2 to 8 bits, not {width!r}")
    return QuantizedTensor(codes, scale, width, columns, low_rank, protected)


def _low_rank(named: Tensors, name: str, shape: torch.Size) -> tuple[Any, Any] | Literal[False] | None:
    """Return the factors of a matrix's correction; None if it has none, False if they do not fit it."""
    pair = _factor(named, name + LEFT), _factor(named, name + RIGHT)
    if pair[0] is None and pair[1] is None:
        return None
    sizes = [0 if f is None else (f if isinstance(f, Tensor) else f.codes).numel() for f in pair]
    rank = sizes[0] // max(shape[0], 1)
    wanted = (shape[0], rank), (rank, shape[1])
    fits = rank > 0 and sizes == [math.prod(size) for size in wanted]
    plain = [f.shape == size for f, size in zip(pair, wanted, strict=True) if isinstance(f, Tensor)]
    return pair if fits and all(plain) else False


def _factor(named: Tensors, name: str) -> Stored | None:
    codes, scale = named.get(name + CODES), named.get(name + SCALE)
    if codes is None or codes.ndim != 2 or scale is None or scale.shape != codes.shape[:1]:
        return named.get(name)
    return QuantizedTensor(codes, scale, code_bits(codes))


def _protected(named: Tensors, name: str, shape: torch.Size) -> tuple[int, Tensor] | Literal[False] | None:
    """Return the protected group of a matrix; None if it has none, False if it does not fit it."""
    first, wide = named.get(name + FIRST), named.get(name + WIDE)
    if first is None or wide is None:
        return None if first is wide else False
    fits = first.ndim == 0 and wide.shape == shape[:1] and 0 <= float(first) <= shape[1] - GROUP
    return (int(first), wide) if fits else False


def section_of(name: str) -> str:
    """Section of the artifact for a matrix's codes: bank matrices and tables differ in statistics."""
    return "codes" if is_slot(name) else "embeddings"


def is_slot(name: str) -> bool:
    """Return whether an unbanked name is that of a bank matrix."""
    return _SLOT.fullmatch(name) is not None


def hessian_name(layer: int, which: str) -> str:
    """Name a Hessian: `attn_in` is the input of Q, K and V, `attn_out` of the output projection."""
    return f"blocks.{layer}.{which}"


def group_of(name: str) -> str:
    """Return the Hessian name that matrices of one input share; a matrix of no bank is its own group."""
    if (slot := _SLOT.fullmatch(name)) is None:
        return name
    return hessian_name(int(slot[1]), next(which for which, slots in READERS.items() if slot[2] in slots))


def columns_owner(name: str) -> str:
    """Return the matrix whose column steps this one uses: Q for K and V, else the matrix itself."""
    return re.sub(r"attn\.c_[kv]", "attn.c_q", name) if is_slot(name) else name


def code_bits(codes: Tensor) -> int:
    """Fewest bits, at least 2, of a symmetric range that holds these codes."""
    return max(2, 1 + int(codes.abs().amax()).bit_length()) if codes.numel() else 2


def unbank(state: Tensors) -> dict[str, Tensor]:
    """Split banks into matrices under the community's names. Raises PgolfError if a bank is missing."""
    if missing := [name for name in BANK_NAMES if name not in state]:
        raise PgolfError(f"the state has no {', '.join(missing)}: it is not a model with weight banks")
    split: dict[str, Tensor] = {}
    for bank in SLOTS:
        split.update(_slots_of(bank, state[bank]))
    return {**split, **{name: tensor for name, tensor in state.items() if name not in BANK_NAMES}}


def _slots_of(name: str, bank: Tensor) -> dict[str, Tensor]:
    slots, layers = SLOTS[name], len(bank) // len(SLOTS[name])
    return {f"blocks.{i % layers}.{slots[i // layers]}": matrix for i, matrix in enumerate(bank.unbind(0))}


def rebank(tensors: Tensors) -> dict[str, Tensor]:
    """Undo `unbank`. Raises PgolfError when matrices of a bank are missing or differ in shape."""
    layers = 1 + max((int(m[1]) for m in map(_SLOT.fullmatch, tensors) if m), default=-1)
    banks = {}
    for bank, slots in SLOTS.items():
        names = [f"blocks.{layer}.{slot}" for slot in slots for layer in range(layers)]
        missing = ", ".join(name for name in names if name not in tensors)
        problem = f"{bank} cannot be put together"
        need(layers and not missing, f"{problem}: {missing or 'every matrix'} is missing")
        need(len({tensors[n].shape for n in names}) == 1, f"{problem}: its matrices differ in shape")
        banks[bank] = torch.stack([tensors[name] for name in names])
    return {**banks, **{name: tensor for name, tensor in tensors.items() if not is_slot(name)}}


def quantize_state(
    state: Tensors, config: QuantConfig, hessians: Tensors | None = None, matrices: Matrices | None = None
) -> QuantizedState:
    """Quantize bank matrices and large tables of a state dict; store the rest as float16.

    hessians: from `collect_hessians`; used by method gptq only. matrices: those that are quantized already.
    Raises PgolfError for non-finite values, gptq without Hessians, or grid rd (see `RateDistortion`).
    """
    need(config.grid != "rd", "grid rd needs a byte target: use `pgolf quantize --grid rd`")
    need(config.grid != "sdclip" or matrices, "grid sdclip makes its own matrices: use `quantize_sdclip`")
    tensors = unbank(state)
    done: dict[str, Stored] = dict(matrices or _quantize_slots(tensors, config, hessians))
    for name, tensor in tensors.items():
        if name in done:
            continue
        # The original stores whatever has at most 65,536 elements as float16 before it looks for bank
        # matrices, none of which is that small in exp101. Here bank matrices come first, so that small
        # models are quantized too; exp101 still gets its 66 int6, 3 int8 and 55 float16 tensors.
        large = name.endswith(".weight") and tensor.ndim == 2 and tensor.numel() > config.small_tensor
        if large and not stays_float(name, config):
            codes, scale = quantize_int8_rows(tensor, scale_floor=config.scale_floor, name=name)
            done[name] = QuantizedTensor(codes.cpu(), scale.cpu(), TABLE_BITS)
        else:
            done[name] = to_float16(name, tensor)
    return QuantizedState({name: done[name] for name in tensors})


def stays_float(name: str, config: QuantConfig) -> bool:
    """Return whether the configuration stores this embedding table as float16."""
    return config.tables == "float16" and name in TABLES


def to_float16(name: str, tensor: Tensor) -> Tensor:
    """Return a float16 copy on the CPU. Raises PgolfError for values that float16 cannot hold."""
    half = tensor.detach().half().cpu()
    if problem := not_finite(half):
        raise PgolfError(f"{name}: {problem.replace('float32', 'float16')}: quantize an earlier checkpoint")
    return half.clone()


def _quantize_slots(tensors: Tensors, config: QuantConfig, hessians: Tensors | None) -> Matrices:
    groups: dict[str, dict[str, Tensor]] = {}
    for name in filter(is_slot, tensors):
        groups.setdefault(group_of(name), {})[name] = tensors[name].detach()
    steps = progress(groups, f"quantize ({config.method})", unit="group")
    rule: dict[str, Any] = {"clip_range": config.clip_range, "percentiles": config.percentiles}
    rule["scale_floor"] = config.scale_floor
    done: dict[str, Coded] = {}
    if config.method == "gptq":
        if missing := [group for group in groups if group not in (hessians or {})]:
            problem = f"quant.method gptq needs the Hessian {missing[0]}"
            raise PgolfError(f"{problem}: collect it, or use quant.method round")
        pairs = ((groups[group], hessians[group]) for group in steps if hessians)
        done = gptq(pairs, **rule, block_size=config.block_size, damping=config.damping)
    else:
        for name, weight in (item for group in steps for item in groups[group].items()):
            done[name] = quantize_rows(weight, **rule, name=name)
    return {n: QuantizedTensor(codes.cpu(), scale.cpu(), config.bits) for n, (codes, scale) in done.items()}


# Rows of a layer's packed attention matrix, as `PackedBanks` stacks them, and the MLP's two.
_PACKED = (("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj"), ("mlp.fc",), ("mlp.proj",))


def packed_banks(quantized: QuantizedState, device: torch.device | None = None) -> PackedBanks | None:
    """Return the bank matrices as packed 6-bit codes, on `device`, with the values of `dequantize_state`.

    None if a matrix has codes of more bits, column steps or a low-rank correction (of the presets: int8
    ones, and those of grid rd). Raises PgolfError as `rebank` does.
    """
    matrices = quantized.matrices()
    if any(m.bits > 6 or m.column_scale is not None or m.low_rank is not None for m in matrices.values()):
        return None
    layers = len(rebank({name: matrix.codes for name, matrix in matrices.items()})["mlp_up_bank"])
    parts = []
    for slots in _PACKED:
        stacks = [[matrices[f"blocks.{i}.{slot}.weight"] for slot in slots] for i in range(layers)]
        codes = torch.stack([int6_pack(torch.cat([m.codes for m in stack])) for stack in stacks])
        scale = torch.stack([torch.cat([m.scale.float() for m in stack]) for stack in stacks])
        parts.append(PackedMatrices(codes.to(device), scale.to(device), stacks[0][0].codes.shape[1]))
    return PackedBanks(*parts)


def dequantize_state(quantized: QuantizedState, *, banks: bool = True) -> dict[str, Tensor]:
    """Return the float32 state dict, with or without banks. Raises PgolfError as `rebank` does."""
    matrices = quantized.matrices()
    if not banks:
        rest = {n: t for n, t in quantized.tensors.items() if n not in matrices}
        return {n: t.float() if isinstance(t, Tensor) else t.dequantized() for n, t in rest.items()}
    # stack banks as int8: a quarter of the bytes to copy
    codes = rebank({name: matrix.codes for name, matrix in matrices.items()})
    scale = rebank({name: matrix.scale for name, matrix in matrices.items()})
    state: dict[str, Tensor] = {}
    for name, bank in codes.items():
        state[name] = dequantize_bytes(bank.flatten(0, 1), scale[name].flatten()).view_as(bank)
    slots = {name: slot for bank in SLOTS for name, slot in _slots_of(bank, state[bank]).items()}
    for name, tensor in quantized.tensors.items():
        if isinstance(tensor, Tensor):
            state[name] = tensor.float()
            continue
        if name not in matrices:
            slots[name] = state[name] = dequantize_bytes(tensor.codes, tensor.scale)
        tensor.finish_(slots[name])
    return state


def bank_grids(quantized: QuantizedState) -> tuple[FixedGrid, ...]:
    """Return the grid of each bank, in the order of BANK_NAMES, to round updated weights to."""
    matrices = quantized.matrices()
    steps = {name: matrix.step() for name, matrix in matrices.items()}
    if any(matrix.protected is not None for matrix in matrices.values()):
        steps = {name: step.expand(matrices[name].codes.shape) for name, step in steps.items()}
    steps = rebank(steps)
    offsets: dict[str, Tensor] = {}
    if any(matrix.low_rank is not None for matrix in matrices.values()):
        low = {name: matrix.correction() for name, matrix in matrices.items()}
        full = {n: torch.zeros(matrices[n].codes.shape) if x is None else x for n, x in low.items()}
        offsets = rebank(full)
    bits = max(matrix.bits for matrix in matrices.values())
    return tuple(FixedGrid(steps[n], 2 ** (bits - 1) - 1, offsets.get(n)) for n in BANK_NAMES)
