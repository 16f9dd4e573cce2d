"""A quantised model to an artifact within its byte budget, and an artifact to a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pgolf_fast.artifact import codecs
from pgolf_fast.artifact.container import (
    SECTIONS,
    ContainerSizes,
    SectionSize,
    TensorRecord,
    read_container,
)
from pgolf_fast.artifact.prune import Pruned, prune_to_fit
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.artifact.writer import container_bytes, write_container
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.schema import PackConfig, RunConfig
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import atomic_path
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.state import (
    TABLE_BITS,
    QuantizedState,
    QuantizedTensor,
    code_bits,
    columns_owner,
    dequantize_state,
    is_slot,
)

CODES, SCALE = ".q", ".scale"  # endings of a quantised tensor's two records
COLUMNS = ".columns"  # ending of the column steps that matrices of one input share
LEFT, RIGHT = ".left", ".right"  # endings of a low-rank correction
TOLERANCE = 128  # bytes under the limit at which pruning is content, besides the margin
HEADER_MARGIN = 64  # bytes by which the header may grow when a section's size and checksum change


@dataclass(frozen=True)
class PackReport:
    """What an artifact costs: `total_bytes` = weights + code.

    `pruned` of the `candidates` (codes of +-1) were zeroed, which took `compressions` in all.
    """

    path: Path
    header_bytes: int
    sections: tuple[SectionSize, ...]
    weights_bytes: int
    code_bytes: int
    limit_bytes: int
    pruned: int
    candidates: int
    compressions: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.code_bytes

    def table(self, title: str = "part") -> Table:
        """Tabulate bytes by part, ending with weights + code = total against the limit."""
        rows = {
            "header": self.header_bytes,
            **{f"section {s.name}": s.stored_bytes for s in self.sections},
            "weights": self.weights_bytes,
            "+ code": self.code_bytes,
            "= total": self.total_bytes,
            "limit": self.limit_bytes,
            "left": self.limit_bytes - self.total_bytes,
            **({f"codes zeroed of {self.candidates:,}": self.pruned} if self.pruned else {}),
        }
        return Table((title, "bytes"), [(part, f"{size:,}") for part, size in rows.items()])


def build_records(quantized: QuantizedState) -> list[TensorRecord]:
    """The records of a quantised model: `X.q` and `X.scale` for a matrix X, `X` for what is float16.

    Column steps are `X.columns`, those of K and V with Q, and corrections `X.left` and `X.right`. Codes of
    bank matrices and of tables lie in different sections, as their statistics differ.
    """
    records = []
    for name, tensor in quantized.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            section = "codes" if is_slot(name) else "embeddings"
            records.append(TensorRecord.of(name + CODES, "codes", tensor.codes.numpy(), section))
            records.append(TensorRecord.of(name + SCALE, "scales", tensor.scale.numpy()))
            if tensor.low_rank is not None:
                for ending, factor in zip((LEFT, RIGHT), tensor.low_rank, strict=True):
                    records.append(TensorRecord.of(name + ending, "scales", factor.numpy()))
            if tensor.column_scale is not None and columns_owner(name) == name:
                records.append(TensorRecord.of(name + COLUMNS, "scales", tensor.column_scale.numpy()))
        else:
            records.append(TensorRecord.of(name, "float16", tensor.numpy()))
    return records


def contents(
    quantized: QuantizedState, run_config: dict[str, Any]
) -> tuple[dict[str, Any], list[TensorRecord]]:
    """What goes into the container: its configuration, with the most bits of a section, and its records."""
    bits = {"codes": 0, "embeddings": 0}
    for name, tensor in quantized.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            section = "codes" if is_slot(name) else "embeddings"
            bits[section] = max(bits[section], tensor.bits)
    return {"run": run_config, "bits": bits}, build_records(quantized)


def artifact_bytes(quantized: QuantizedState, run_config: dict[str, Any], config: PackConfig) -> int:
    """Bytes of the file that `pack` would write without pruning."""
    tree, records = contents(quantized, run_config)
    return container_bytes(tree, records, codecs=section_codecs(records, config), preset=config.lzma_preset)


def pack(
    quantized: QuantizedState, run_config: dict[str, Any], path: Path | str, config: PackConfig
) -> PackReport:
    """Write the artifact and say what it costs, pruning +-1 codes if it is too large and `config.prune`.

    run_config: as from `run_config_to_dict`. Raises PgolfError, and leaves whatever stood at `path`, when
    weights and code do not fit into `config.limit_bytes`.
    """
    code = code_bytes() if config.code_bytes is None else config.code_bytes
    tree, records = contents(quantized, run_config)
    tried = section_codecs(records, config)
    pruned, compressions = None, 1
    with atomic_path(path) as temporary:
        sizes = write_container(temporary, tree, records, codecs=tried, preset=config.lzma_preset)
        if sizes.total_bytes + code > config.limit_bytes:
            if not config.prune:
                raise _too_large(sizes.total_bytes, code, config.limit_bytes, "pack.prune is off; turn it on")
            pruned = _prune(records, sizes, code, config)
            records = _with_codes(records, pruned.codes)
            sizes = write_container(temporary, tree, records, codecs=tried, preset=config.lzma_preset)
            compressions += pruned.compressions + 1
            if sizes.total_bytes + code > config.limit_bytes:  # the header's few bytes are in the margin
                raise _too_large(sizes.total_bytes, code, config.limit_bytes, "pruning missed the limit")
    return PackReport(
        path=Path(path),
        header_bytes=sizes.header_bytes,
        sections=sizes.sections,
        weights_bytes=sizes.total_bytes,
        code_bytes=code,
        limit_bytes=config.limit_bytes,
        pruned=pruned.count if pruned else 0,
        candidates=sum(int((np.abs(t.codes.numpy()) == 1).sum()) for t in quantized.matrices().values()),
        compressions=compressions,
    )


def section_codecs(records: list[TensorRecord], config: PackConfig) -> dict[str, tuple[str, ...]]:
    """The codecs that may compete for each section."""
    size = {name: sum(r.array.nbytes for r in records if r.section == name) for name in SECTIONS}
    quick = tuple(codec for codec in config.codecs if codec != "lzma") or config.codecs
    return {n: config.codecs if size[n] <= config.lzma_limit_bytes else quick for n in SECTIONS}


def _prune(records: list[TensorRecord], sizes: ContainerSizes, code: int, config: PackConfig) -> Pruned:
    """Codes that fit. Raises PgolfError when even pruning all of them is not enough."""
    matrices, scales = _matrix_arrays(records)
    now, codec = next(((s.stored_bytes, s.codec) for s in sizes.sections if s.name == "codes"), (0, "raw"))
    others = sizes.total_bytes - now
    budget = config.limit_bytes - code - others - HEADER_MARGIN
    if not matrices or budget <= 0:
        hint = "even no bank weights at all would not fit; raise pack.limit_bytes or make the tables smaller"
        raise _too_large(sizes.total_bytes, code, config.limit_bytes, hint)

    shapes = [(*array.shape, 1) for array in matrices]

    def coded_size(flat: NDArray[np.int8]) -> int:
        settings = {"preset": config.lzma_preset} if codec == "lzma" else {}
        return min(len(codecs.encode(codec, flat.tobytes(), shapes, **settings)), flat.size)

    pruned = prune_to_fit(list(zip(matrices, scales, strict=True)), budget, now, coded_size, TOLERANCE)
    if not pruned.fits:
        hint = (
            f"zeroing all {pruned.candidates:,} codes of +-1 is not enough; "
            "make the model smaller, quantise to fewer bits, or train with more weight decay"
        )
        raise _too_large(sizes.total_bytes, code, config.limit_bytes, hint)
    return pruned


def _too_large(weights: int, code: int, limit: int, hint: str) -> PgolfError:
    total = weights + code
    return PgolfError(
        f"weights {weights:,} + code {code:,} = {total:,} bytes > {limit:,} bytes "
        f"({total - limit:,} over): {hint}"
    )


def _matrix_arrays(records: list[TensorRecord]) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
    """Codes and scales of the bank matrices, in the order of the file."""
    scales = {r.name: r.array for r in records if r.kind == "scales"}
    in_codes = [r for r in records if r.section == "codes"]
    return [r.array for r in in_codes], [scales[r.name.removesuffix(CODES) + SCALE] for r in in_codes]


def _with_codes(records: list[TensorRecord], codes: list[NDArray[np.int8]]) -> list[TensorRecord]:
    left = iter(codes)
    return [replace(r, array=next(left)) if r.section == "codes" else r for r in records]


def unpack(path: Path | str) -> tuple[dict[str, Any], QuantizedState]:
    """The run's configuration and the quantised model of an artifact.

    Raises PgolfError for a damaged file, one that is no packed model, or codes and scales that do not match.
    """
    tree, records = read_container(path)
    run_config, bits = tree.get("run"), tree.get("bits")
    if not isinstance(run_config, dict) or not isinstance(bits, dict):
        raise PgolfError(f"artifact {path} holds no packed model: its configuration lacks 'run' or 'bits'")
    found = {record.name: record for record in records}
    tensors: dict[str, QuantizedTensor | Tensor] = {}
    owned: set[str] = set()
    for name, record in found.items():
        if record.kind == "codes" and name.endswith(CODES):
            whole = name.removesuffix(CODES)
            owned |= {whole + SCALE, columns_owner(whole) + COLUMNS, whole + LEFT, whole + RIGHT}
            scale = found.get(whole + SCALE)
            if record.array.ndim != 2 or scale is None or scale.array.shape != record.array.shape[:1]:
                raise PgolfError(f"artifact {path}: {whole} has no scale for each of its rows; pack it again")
            codes = torch.from_numpy(record.array)
            columns, low_rank = _columns_and_correction(path, found, whole, codes.shape)
            # grid rd gives every matrix the bits it needs, the others all the same
            width = bits.get(str(record.section), TABLE_BITS) if columns is None else code_bits(codes)
            if not isinstance(width, int) or not 2 <= width <= 8:
                raise PgolfError(f"artifact {path}: codes have 2 to 8 bits, not {width!r}; pack it again")
            tensors[whole] = QuantizedTensor(codes, torch.from_numpy(scale.array), width, columns, low_rank)
        elif record.kind == "float16":
            tensors[name] = torch.from_numpy(record.array)
        elif record.kind != "scales":
            raise PgolfError(f"artifact {path}: {name} of kind {record.kind} is no part of a packed model")
    if stray := [name for name, record in found.items() if record.kind == "scales" and name not in owned]:
        raise PgolfError(f"artifact {path}: {stray[0]} belongs to no matrix of it; pack it again")
    return run_config, QuantizedState(tensors)


def _columns_and_correction(
    path: Path | str, found: dict[str, TensorRecord], name: str, shape: torch.Size
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """Column steps and low-rank factors of a matrix, as far as the artifact has them."""
    columns, left, right = (found.get(n) for n in (columns_owner(name) + COLUMNS, name + LEFT, name + RIGHT))
    rank = None if left is None or not left.shape else left.shape[-1]
    wanted = ((columns, (shape[1],)), (left, (shape[0], rank)), (right, (rank, shape[1])))
    if (left is None) != (right is None) or any(r and r.array.shape != size for r, size in wanted):
        raise PgolfError(
            f"artifact {path}: column steps or correction of {name} do not fit it; pack it again"
        )
    steps = None if columns is None else torch.from_numpy(columns.array)
    if left is None or right is None:
        return steps, None
    return steps, (torch.from_numpy(left.array), torch.from_numpy(right.array))


def load_artifact(path: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The run's configuration and the float32 state dict of an artifact. Raises PgolfError as `unpack`."""
    run_config, quantized = unpack(path)
    try:
        return run_config, dequantize_state(quantized)
    except PgolfError as error:
        raise PgolfError(f"artifact {path}: {error}") from error


class _NoInitialValues(TorchFunctionMode):
    """Modules made under it stay unfilled: to draw values on the meta device imports PyTorch's compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return (
            kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs)
        )


def load_model(
    path: Path | str,
    has_leading_space: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[GPT, RunConfig]:
    """The model of an artifact, on the CPU, and the configuration of its run.

    has_leading_space (vocab,): of the tokenizer; the artifact does not hold it, and scores are wrong without.
    Raises PgolfError for a damaged file, or tensors that are not those of the model it describes.
    """
    values, state = load_artifact(path)
    run_config = run_config_from_dict(values)
    if has_leading_space is None:  # as long as the table that is there: what a file says may be absurd
        table = state.get("tok_emb.weight", torch.zeros(0, 0))
        has_leading_space = torch.zeros(len(table), dtype=torch.bool)
    with torch.device("meta"), _NoInitialValues():
        model = GPT(run_config.model, has_leading_space, compute_dtype=compute_dtype)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is not part of it" for name in state if name not in expected]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise PgolfError(
            f"artifact {path} does not hold the model it describes: {'; '.join(problems[:8])}{more}"
        )
    model.load_state_dict(state, assign=True)
    return model, run_config
