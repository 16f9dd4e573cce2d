"""Load a model: an artifact or a run folder in, a `LoadedModel` out."""

import contextlib
import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pgolf_fast import console
from pgolf_fast.artifact.container import read_container, sizes
from pgolf_fast.config.checks import need
from pgolf_fast.config.fields import run_config_from_dict
from pgolf_fast.config.run_folder import RunFolder, RunPath, absolute, copy_files
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.source import open_source
from pgolf_fast.data.tokenizer import Tokenizer, byte_table
from pgolf_fast.distributed import this_process
from pgolf_fast.errors import PgolfError
from pgolf_fast.model import decoding
from pgolf_fast.model.bank import BANK_NAMES, PackedBanks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.model.weights import Tensors, load_weights, need_finite, read_weights
from pgolf_fast.quant.grid import FixedGrid
from pgolf_fast.quant.state import CODES, QuantizedState, bank_grids, dequantize_state, is_part, packed_banks


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model on its device, with what scoring and generating need besides."""

    model: GPT
    config: RunConfig  # settings to score it with
    path: Path  # file of the weights
    tokenizer: Tokenizer | None  # none for an artifact outside a run folder, unless one was given
    quantized: QuantizedState | None = None  # codes of an artifact
    sha256: str | None = None  # digest of an artifact

    @functools.cached_property
    def grid(self) -> tuple[FixedGrid, ...] | None:
        """Grid of each bank, to round updated weights to; None for float weights."""
        return None if self.quantized is None else bank_grids(self.quantized)

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer. Raises PgolfError if it is not known."""
        if self.tokenizer is None:
            hint = "pass tokenizer=FILE.model or --tokenizer FILE"
            raise PgolfError(f"{self.path} has no tokenizer next to it: {hint}")
        return self.tokenizer

    def __str__(self) -> str:
        weights = "float32" if self.quantized is None else f"artifact, {self.path.stat().st_size:,} bytes"
        weights += "" if self.model.packed is None else ", as packed 6-bit codes"
        rows = [
            ("preset", self.config.name),
            ("parameters", f"{self.config.model.num_parameters():,}"),
            ("weights", weights),
            ("computes in", str(self.model.compute_dtype).removeprefix("torch.")),
            ("device", str(self.model.qo_bank.device)),
            ("file", str(self.path)),
        ]
        return console.Table(None, rows).text()

    __repr__ = __str__


def load(
    path: RunPath,
    weights: Literal["auto", "artifact", "float", "packed"] = "auto",
    *,
    config: RunConfig | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    device: torch.device | str | None = None,
    finite: bool = True,
    packed: bool = False,
) -> LoadedModel:
    """Load the model of a run folder or of an artifact file.

    weights: `auto` takes the artifact of a run folder, or its float weights if it is not packed; `packed` is
    the artifact with `packed` set.
    config: settings to score with, by default those stored with the weights. tokenizer: by default that of
    the run folder. device: by default the GPU if there is one. finite: False allows NaN, for an audit.
    packed: keep the banks of an artifact as 6-bit codes, for scoring and generating; where its grid needs
    more, the banks become float and a line says so.
    Raises PgolfError for a missing or damaged file, tensors that do not fit the model, or NaN values.
    """
    path = path.path if isinstance(path, RunFolder) else Path(path)
    need(path.exists(), f"{path} does not exist: give a run folder or an artifact (.pgolf)")
    packed = packed or weights == "packed"
    folder = RunFolder.of(path) if path.is_dir() else RunFolder(path.parent)
    if weights == "auto":
        weights = "float" if path.is_dir() and not folder.artifact_file.is_file() else "artifact"
        if weights == "float":
            console.logger.warning("%s is not packed: using the float weights", path)
    wrong = weights == "float" and path.is_file()
    need(not wrong, f"{path} is a file: float weights are loaded from a run folder")
    file = folder.weights_file(weights) if path.is_dir() else path
    quantized = digest = codes = None
    device = torch.device(device) if device is not None else this_process().device
    if weights != "float":
        stored, quantized = unpack(file, finite=finite)
        stored = _with_data(stored, file)
        config, digest = config or stored, sizes(file).sha256
        codes = packed_banks(quantized, device) if packed else None
        if packed and codes is None:
            console.logger.info("%s has more than 6 bits and a step per row: using float banks", file)
        state = _dequantized(file, quantized, banks=codes is None)
    else:
        stored, state = folder.read_config(), read_weights(file)
        config = config or stored
        if config.ttt.quantize_forward == "banks":  # float weights adapt without rounding
            config = replace(config, ttt=replace(config.ttt, quantize_forward="none"))
    choose_kernels(config.kernels, device)
    if tokenizer is None and folder.tokenizer_file.is_file():
        tokenizer = folder.tokenizer_file
    if isinstance(tokenizer, str | Path):
        tokenizer = Tokenizer.load(tokenizer)
    leading = None if tokenizer is None else torch.from_numpy(byte_table(tokenizer).has_leading_space)
    if leading is None and stored.model.bigram_vocab_size and stored.model.pos_conditional:
        console.logger.warning("%s: without a tokenizer word starts are unknown and logits differ", file)
    dtype = resolve_dtype(config.train.compute_dtype, device)
    model = build_model(stored, state, leading, dtype, str(file), codes).to(device)
    if finite:
        need_finite(state, str(file))
    return LoadedModel(model, config, file, tokenizer, quantized, digest)


def generate(
    model: RunPath | LoadedModel,
    prompt: str = "",
    tokens: int = 200,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Return `prompt`, which opens a document, continued by that many sampled tokens.

    temperature: 0 takes the most likely token. Raises PgolfError if it is negative, or for tokens below 1.
    """
    need(tokens >= 1, f"tokens is {tokens}; it must be at least 1")
    loaded = model if isinstance(model, LoadedModel) else load(model, packed=True)
    tokenizer, device = loaded.need_tokenizer(), loaded.model.qo_bank.device
    start = torch.tensor([tokenizer.encode_document(prompt)], device=device)
    sampler = torch.Generator(device).manual_seed(seed)
    ids = decoding.generate(loaded.model, start, tokens, temperature=temperature, generator=sampler)
    return tokenizer.decode_document([int(i) for i in ids[0, 1:]])


def unpack(path: Path | str, *, finite: bool = True) -> tuple[RunConfig, QuantizedState]:
    """Read the run's configuration and the quantized model of an artifact.

    Raises PgolfError for a damaged file, one that is not a packed model, mismatched codes and scales, or,
    with `finite`, NaN or infinite values.
    """
    tree, records = read_container(path)
    run_config, bits = tree.get("run"), tree.get("bits")
    if not isinstance(run_config, dict) or not isinstance(bits, dict):
        raise PgolfError(f"artifact {path} is not a packed model: its configuration has no 'run' or 'bits'")
    named = {record.name: torch.from_numpy(record.array) for record in records}
    try:
        for name, kind in ((record.name, record.kind) for record in records):
            parts = "scales" if is_part(name, named) else "float16"
            if kind != ("codes" if name.endswith(CODES) else parts):
                raise PgolfError(f"{name} of kind {kind} is not part of a packed model")
        state = QuantizedState.from_named(named, bits)
        return run_config_from_dict(run_config), state.check() if finite else state
    except PgolfError as error:
        raise PgolfError(f"artifact {path}: {error}; pack it again") from error


def load_artifact(path: Path | str) -> tuple[RunConfig, dict[str, Tensor]]:
    """Return the configuration and float32 state dict of an artifact. Raises PgolfError as `unpack` does."""
    config, quantized = unpack(path)
    return _with_data(config, Path(path)), _dequantized(path, quantized)


def stored_config(path: Path, data: Path | None = None) -> RunConfig:
    """Return the configuration of a run folder or an artifact; an artifact uses the data of its run folder.

    Raises PgolfError for an artifact that is not in a run folder, unless `data` is given.
    """
    if path.is_dir():
        return RunFolder(path).read_config()
    stored = unpack(path, finite=False)[0]
    config = _with_data(stored, path)
    if config is stored and data is None and config.data.path is None:
        raise PgolfError(f"{path} does not say where its data is: give a folder of shards with --data DIR")
    return config


def artifact_run(artifact: Path, config: RunConfig, out: Path) -> RunFolder:
    """Make a run folder `out` from an artifact and the tokenizer next to it, or else that of its data."""
    tokenizer = artifact.parent / "tokenizer.model"
    if not tokenizer.is_file():
        tokenizer = open_source(config.data, config.model.vocab_size).tokenizer.path
    return copy_files(absolute(config), {"model.pgolf": artifact, "tokenizer.model": tokenizer}, out)


def _with_data(config: RunConfig, artifact: Path) -> RunConfig:
    """Return the configuration of an artifact with the data of the run folder that contains the file."""
    with contextlib.suppress(PgolfError):  # config.json may be unrelated
        run = RunFolder(artifact.parent).read_config()
        if run.model == config.model:
            return replace(config, data=run.data)
    return config


def _dequantized(path: Path | str, quantized: QuantizedState, banks: bool = True) -> dict[str, Tensor]:
    try:
        return dequantize_state(quantized, banks=banks)
    except PgolfError as error:
        raise PgolfError(f"artifact {path}: {error}") from error


class _NoInitialValues(TorchFunctionMode):
    """Skip `torch.nn.init`: on the meta device it would import PyTorch's compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        skipped = getattr(func, "__module__", "") == "torch.nn.init"
        return kwargs["tensor"] if skipped else func(*args, **(kwargs or {}))


def build_model(
    config: RunConfig,
    state: Tensors,
    has_leading_space: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    origin: str = "the state dict",
    packed: PackedBanks | None = None,
) -> GPT:
    """Make a model that uses the tensors of `state`, without copying them.

    has_leading_space: (vocab,), from the tokenizer; without it, word starts are unknown. packed: the banks,
    which `state` does not hold then.
    Raises PgolfError as `load_weights` does.
    """
    if has_leading_space is None:
        # sized by the stored table: the configuration of a damaged file may be absurd
        table = state.get("tok_emb.weight", torch.zeros(0, 0))
        has_leading_space = torch.zeros(len(table), dtype=torch.bool)
    with torch.device("meta"), _NoInitialValues():
        model = GPT(config.model, has_leading_space, compute_dtype=compute_dtype)
    if packed is not None:
        banks = dict(zip(BANK_NAMES, packed.shapes, strict=True))
        state = {**state, **{name: torch.empty(shape, device="meta") for name, shape in banks.items()}}
    load_weights(model, state, origin, assign=True)
    if packed is not None:
        model.use_packed(packed)
    return model
