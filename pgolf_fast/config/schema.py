"""Every setting of a run, as frozen dataclasses. Presets build them; nothing else holds a setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pgolf_fast.config.meta import MetaConfig, ReptileConfig
from pgolf_fast.config.model import ModelConfig, need
from pgolf_fast.config.ttt import TTTConfig

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where tokens come from."""

    path: str | None = None
    """Folder with *_train_*.bin and *_val_*.bin shards; None builds the zero-download corpus."""
    tokenizer: str | None = None
    """SentencePiece .model file; None looks in and beside `path`."""
    loader: Literal["sequential", "shuffled"] = "sequential"
    """sequential: the challenge's stream, wrapping at its end; shuffled: documents reordered every epoch."""
    seed: int = 1337
    """Seed of the shuffled document order."""
    val_tokens: int | None = None
    """Use only this many validation tokens (for quick looks); None uses all."""

    def __post_init__(self) -> None:
        need(self.seed >= 0, f"data.seed is {self.seed}; it must not be negative")
        need(
            self.val_tokens is None or self.val_tokens > 0,
            "data.val_tokens must be positive, or None for all",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon on the banks, AdamW on everything else (PR 1501)."""

    matrix_lr: float = 0.025
    """Muon learning rate (banks)."""
    embed_lr: float = 0.035
    """AdamW learning rate of the three tables."""
    scalar_lr: float = 0.025
    """AdamW learning rate of gains, scales and the two small projections."""
    muon_momentum: float = 0.99
    """Muon momentum after its warm-up."""
    muon_momentum_start: float = 0.92
    """Muon momentum at step 0."""
    muon_momentum_warmup_steps: int = 1500
    """Steps over which Muon's momentum rises linearly."""
    muon_newton_schulz_steps: int = 5
    """Newton-Schulz iterations."""
    adam_beta1: float = 0.9
    """AdamW first moment decay."""
    adam_beta2: float = 0.95
    """AdamW second moment decay."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.04
    """Decoupled weight decay of both optimisers."""
    grad_clip: float | None = 0.3
    """Global gradient-norm limit over all parameters; None is off."""

    def __post_init__(self) -> None:
        for name in ("matrix_lr", "embed_lr", "scalar_lr", "weight_decay"):
            need(getattr(self, name) >= 0, f"optim.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("muon_momentum", "muon_momentum_start", "adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            need(0 <= value < 1, f"optim.{name} is {value}; it must be in [0, 1)")
        need(
            self.grad_clip is None or self.grad_clip > 0, "optim.grad_clip must be positive, or None for off"
        )


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Weight averaging (PR 1501)."""

    ema_decay: float = 0.998
    """Decay per step of the exponential average."""
    ema_every: int = 10
    """Steps between updates of the average; each uses ema_decay ** ema_every."""
    swa_every: int | None = 50
    """Steps between snapshots of stochastic weight averaging; None is off."""
    swa_below: float = 0.2
    """Collect snapshots while the learning-rate multiplier is below this."""
    swa_apply: bool = True
    """The final weights are the mean of the EMA snapshots; False collects and does not use them (as run)."""

    def __post_init__(self) -> None:
        need(0 <= self.ema_decay < 1, f"average.ema_decay is {self.ema_decay}; it must be in [0, 1)")
        need(self.ema_every > 0, "average.ema_every must be positive")
        need(
            self.swa_every is None or self.swa_every > 0,
            "average.swa_every must be positive, or None for off",
        )


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """Late quantisation-aware training: fake int6 with straight-through gradients."""

    below: float | None = 0.25
    """Switch on once the learning-rate multiplier is below this."""
    from_share: float | None = None
    """Switch on after this share of the schedule, in what train.schedule is measured in, instead of below."""
    banks: bool = True
    """Quantise the four banks; False flips the flag with no effect on them, as the original did."""

    def __post_init__(self) -> None:
        need(
            (self.below is None) != (self.from_share is None),
            f"train.qat.below is {self.below} and train.qat.from_share is {self.from_share}; give one and "
            "set the other to None",
        )
        need(
            self.from_share is None or 0 <= self.from_share < 1,
            f"train.qat.from_share is {self.from_share}; it must be at least 0 and below 1, or None",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    seed: int = 42
    """Seed of the initial weights."""
    steps: int = 7500
    """Optimiser steps at most."""
    max_seconds: float | None = 4800.0
    """Training clock at most (validation and warm-up not counted); None for steps only."""
    batch_tokens: int = 786_432
    """Tokens of one optimiser step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 98_304
    """Tokens of one forward and backward on one rank; changes memory, not mathematics, unless train.meta is
    on: a meta step is over one micro-batch, and its dilution is by their number."""
    seq_len: int = 2048
    """Training sequence length."""
    compute_dtype: Dtype = "auto"
    """Activations and matmuls; auto is bfloat16 where the hardware has it."""
    table_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Storage of the embedding tables during training."""
    compile: bool | None = None
    """torch.compile the loss; None compiles on CUDA only."""
    cuda_graph: bool | None = None
    """Replay forward and backward of a micro-batch from a CUDA graph; None is off until it has been timed."""
    warmup_steps: int = 20
    """Untimed steps before training whose effect is undone; they run only where compiling."""
    schedule: Literal["time", "steps"] = "time"
    """What the learning-rate decay is measured in; time needs max_seconds."""
    warmdown_steps: int | None = 2500
    """Length of the decay, in steps (converted to time by the measured pace)."""
    warmdown_fraction: float | None = None
    """Length of the decay as a share of the run, instead of warmdown_steps."""
    warmdown_shape: Literal["cosine", "linear"] = "cosine"
    """How the multiplier falls to 0. A linear decay that is longer than the run begins below 1."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition function, added to the training loss (PR 301); no score has
    it."""
    lr_hold_steps: int = 25
    """Steps at the start during which the multiplier is 1 whatever the clock says."""
    adaptive_warmdown: bool = True
    """Start the decay when the training loss stops improving (PR 1501)."""
    adaptive_min_step: int = 2000
    """First step at which the adaptive trigger looks."""
    adaptive_every: int = 100
    """Steps between looks."""
    adaptive_ema: float = 0.99
    """Smoothing of the watched training loss."""
    adaptive_threshold: float = 5e-4
    """Improvement of the smoothed loss below which the decay starts."""
    val_every: int | None = 3000
    """Steps between validations; None validates at the end only."""
    log_every: int = 500
    """Steps between progress lines (the first step and the last are always printed)."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints; None writes only the final one."""
    meta: MetaConfig | None = field(default_factory=MetaConfig)
    """Meta-learning step; None is off."""
    reptile: ReptileConfig | None = None
    """Meta-learning phase at the end; None is off."""
    qat: QATConfig | None = field(default_factory=QATConfig)
    """Late quantisation-aware training; None is off."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_tokens", "micro_batch_tokens", "seq_len", "log_every", "adaptive_every"):
            need(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}; it must be positive")
        need(
            self.micro_batch_tokens % self.seq_len == 0,
            f"train.micro_batch_tokens {self.micro_batch_tokens} is not a multiple of "
            f"train.seq_len {self.seq_len}",
        )
        need(
            self.batch_tokens % self.micro_batch_tokens == 0,
            f"train.batch_tokens {self.batch_tokens} is not a multiple of "
            f"train.micro_batch_tokens {self.micro_batch_tokens}",
        )
        need(
            not (self.schedule == "time" and self.max_seconds is None),
            "train.schedule 'time' needs train.max_seconds; set it, or use train.schedule steps",
        )
        need(self.val_every is None or self.val_every > 0, "train.val_every must be positive, or None")
        need(self.z_loss >= 0, f"train.z_loss is {self.z_loss}; it must not be negative")
        need(self.seed >= 0, f"train.seed is {self.seed}; it must not be negative")
        need(
            (self.warmdown_steps is None) != (self.warmdown_fraction is None),
            f"train.warmdown_steps is {self.warmdown_steps} and train.warmdown_fraction is "
            f"{self.warmdown_fraction}; give one and set the other to None",
        )
        need(
            self.warmdown_fraction is None or 0 < self.warmdown_fraction <= 1,
            f"train.warmdown_fraction is {self.warmdown_fraction}; it must be above 0 and at most 1, or None",
        )
        need(self.max_seconds is None or self.max_seconds > 0, "train.max_seconds must be positive, or None")
        need(
            self.meta is None or self.seq_len % 2 == 0,
            f"train.meta splits sequences in halves: train.seq_len {self.seq_len} must be even",
        )
        need(
            self.reptile is None
            or self.schedule == "time"
            or 0 < self.reptile.steps(self.steps) < self.steps,
            f"train.reptile needs a step, and one before it: train.reptile.share of train.steps {self.steps} "
            "leaves none; change one of them",
        )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Weights to integers (PR 1501)."""

    grid: Literal["reference", "percentile", "rd"] = "reference"
    """Steps: reference never goes below 1/clip_range for a row (1/31 at 6 bits); percentile follows each row;
    rd gives every row and column the step at which its errors cost what its bits are worth."""
    target_bytes: int | None = None
    """Bytes of the artifact that grid rd lands at; None is what pack.limit_bytes leaves beside the code."""
    rank: int = 0
    """Grid rd corrects its errors by matrices up to this rank where that is worth the bytes (LQER)."""
    method: Literal["gptq", "round"] = "gptq"
    """gptq uses Hessians of self-generated text; round is plain rounding to nearest."""
    bits: int = 6
    """Bits of bank weights; codes run from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
    Grid rd takes what each matrix needs."""
    percentiles: tuple[float, ...] = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    """Row-clip candidates, as quantiles of |row|."""
    block_size: int = 128
    """GPTQ column block."""
    damping: float = 0.01
    """Added to the Hessian's diagonal, as a part of its mean, before factoring."""
    calibration_sequences: int = 64
    """Sequences the model writes for its own calibration."""
    calibration_length: int = 2048
    """Tokens of each."""
    calibration_batch: int = 64
    """Sequences written at once; memory for keys and values grows with it (exp101: 46 MB each in float32)."""
    temperature: float = 0.8
    """Sampling temperature of calibration text."""
    seed: int = 42
    """Seed of calibration text."""
    tables: Literal["int8", "float16"] = "int8"
    """How embedding tables are stored (PR 301: float16); those of at most small_tensor elements are float16
    anyway, but for grid rd."""
    small_tensor: int = 65_536
    """Tensors with at most this many elements are stored as float16."""

    def __post_init__(self) -> None:
        need(
            self.target_bytes is None or self.target_bytes > 0,
            f"quant.target_bytes is {self.target_bytes}; it must be positive, or None for what is left",
        )
        need(0 <= self.rank <= 8, f"quant.rank is {self.rank}; it must be 0 to 8")
        need(2 <= self.bits <= 8, f"quant.bits is {self.bits}; it must be 2 to 8")
        need(len(self.percentiles) > 0, "quant.percentiles is empty")
        need(
            all(0 < p <= 1 for p in self.percentiles),
            f"quant.percentiles {self.percentiles} must be in (0, 1]",
        )
        for name in ("block_size", "calibration_sequences", "calibration_length", "calibration_batch"):
            need(getattr(self, name) > 0, f"quant.{name} is {getattr(self, name)}; it must be positive")
        need(self.temperature > 0, "quant.temperature must be positive")

    @property
    def clip_range(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def scale_floor(self) -> bool:
        """Whether a row's step stays at 1 / clip_range or above, as the original's does."""
        return self.grid == "reference"


Codec = Literal["raw", "rans", "lzma", "zstd", "brotli"]


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The artifact and its byte budget."""

    limit_bytes: int = 16_000_000
    """Weights plus code may not exceed this (decimal megabytes)."""
    code_bytes: int | None = None
    """Bytes counted for code; None counts the evaluation script that `pgolf submit` writes."""
    codecs: tuple[Codec, ...] = ("rans", "lzma")
    """Codecs tried on every section, of which the smallest stays; LZMA stands in for rans where the C++
    extension is missing."""
    lzma_limit_bytes: int = 1_048_576
    """Larger sections, raw, are left to the other codecs: LZMA takes a second or two for each megabyte, and
    has been smaller than rans on embedding tables only."""
    lzma_preset: int = 9
    """xz preset of sections that LZMA codes."""
    prune: bool = True
    """Zero +-1 codes of the finest rows, as many as needed and no more, when the artifact is too large."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring (PR 1501)."""

    seq_len: int | None = None
    """Window length; None uses train.seq_len."""
    stride: int = 64
    """Tokens between sliding windows."""
    batch_seqs: int | None = None
    """Windows scored at once; None takes what suits a CPU's cache, or half of a GPU's free memory."""
    repeat_tail: bool = False
    """Score the last targets many times, as the original does (for parity only)."""
    compile: bool | None = None
    """torch.compile scoring and test-time training; None compiles on CUDA only."""
    cuda_graph: bool | None = None
    """Replay test-time training updates from a CUDA graph; None does on CUDA."""
    checkpoint_minutes: float | None = 2.0
    """Minutes between states that an interrupted `pgolf eval` goes on from; None leaves none."""

    def __post_init__(self) -> None:
        need(self.stride > 0, "eval.stride must be positive")
        need(self.batch_seqs is None or self.batch_seqs > 0, "eval.batch_seqs must be positive, or None")
        need(
            self.seq_len is None or self.seq_len > 0,
            "eval.seq_len must be positive, or None for train.seq_len",
        )
        need(
            self.seq_len is None or self.stride <= self.seq_len,
            f"eval.stride {self.stride} is longer than the window eval.seq_len {self.seq_len}",
        )


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What ops run on a CUDA GPU; a CPU has one implementation of each."""

    implementation: Literal["auto", "triton", "torch"] = "auto"
    """Triton kernels or PyTorch for every op; auto goes by the table of `pgolf doctor`."""
    attention: Literal["auto", "triton", "flash", "cudnn", "fa3", "fa4", "plain"] = "auto"
    """Inner attention wherever it fits; auto goes by GPU and shape."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, from data to scores."""

    name: str = "exp101"
    """Preset this came from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tokens."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimisers."""
    average: AverageConfig = field(default_factory=AverageConfig)
    """EMA and SWA."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation."""
    pack: PackConfig = field(default_factory=PackConfig)
    """Artifact."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Scores."""
    ttt: TTTConfig = field(default_factory=TTTConfig)
    """Test-time training."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    """Implementations."""

    @property
    def eval_seq_len(self) -> int:
        return self.eval.seq_len or self.train.seq_len

    def __post_init__(self) -> None:
        need(
            self.eval.stride <= self.eval_seq_len,
            f"eval.stride {self.eval.stride} is longer than the window of {self.eval_seq_len} tokens",
        )
        need(
            self.ttt.frozen_slots < self.model.num_layers,
            f"ttt.freeze_blocks {self.ttt.freeze_blocks} leaves nothing to adapt: the model has "
            f"{self.model.num_layers} layers",
        )
        meta = self.train.meta
        need(
            meta is None or meta.freeze_blocks <= self.model.num_layers,
            f"train.meta.freeze_blocks exceeds the model's {self.model.num_layers} layers",
        )
        for name in ("delta_weight", "slot_rates"):
            need(
                meta is None or meta.freeze_blocks < self.model.num_layers or not getattr(meta, name),
                f"train.meta.freeze_blocks freezes all {self.model.num_layers} layers, so nothing adapts: "
                f"train.meta.{name} needs one that does",
            )
