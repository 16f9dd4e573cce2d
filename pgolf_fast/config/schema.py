"""Every setting of a run, as frozen dataclasses."""

from dataclasses import dataclass, field
from typing import Literal

from pgolf_fast.config import checks
from pgolf_fast.config.checks import need
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.ttt import TTTConfig

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of tokens."""

    path: str | None = None
    """Folder of *_train_*.bin and *_val_*.bin shards; None uses the built-in corpus."""
    tokenizer: str | None = None
    """SentencePiece .model file; None looks in `path` and next to it."""
    loader: Literal["sequential", "shuffled"] = "sequential"
    """Order of training tokens: as in the shards, or documents in a new order every epoch."""
    seed: int = 1337
    """Seed of the shuffled order."""
    val_tokens: int | None = None
    """Number of validation tokens to score; None scores all."""

    def __post_init__(self) -> None:
        checks.need_not_negative("data", self, "seed")
        checks.need_positive("data", self, "val_tokens")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon on the banks, AdamW on everything else (PR 1501)."""

    matrix_lr: float = 0.025
    """Muon learning rate, for the banks."""
    embed_lr: float = 0.035
    """AdamW learning rate of the embedding tables."""
    scalar_lr: float = 0.025
    """AdamW learning rate of gains, scales and small projections."""
    muon_momentum: float = 0.99
    """Muon momentum after the warm-up."""
    muon_momentum_start: float = 0.92
    """Muon momentum at step 0."""
    muon_momentum_warmup_steps: int = 1500
    """Steps over which Muon momentum rises linearly."""
    muon_newton_schulz_steps: int = 5
    """Newton-Schulz iterations per Muon update."""
    muon_polar_express: bool = False
    """Use the coefficients of Polar Express (Amsel et al. 2025), which change from step to step (PR 1855)."""
    muon_row_norm: bool = False
    """Divide every row of an update by its norm before Newton-Schulz (MuonEq-R, PR 1394)."""
    adam_beta1: float = 0.9
    """AdamW decay of the first moment."""
    adam_beta2: float = 0.95
    """AdamW decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.04
    """Decoupled weight decay of both optimizers."""
    embed_weight_decay: float | None = None
    """The same of the embedding tables; None is weight_decay."""
    scalar_weight_decay: float | None = None
    """The same of gains, scales and small projections; None is weight_decay."""
    grad_clip: float | None = 0.3
    """Limit on the global gradient norm over all parameters; None disables clipping."""
    grad_clip_per_rank: bool = False
    """Clip each rank's own gradients before they are averaged, as PR 1855 did."""

    def __post_init__(self) -> None:
        decays = ("weight_decay", "embed_weight_decay", "scalar_weight_decay")
        checks.need_not_negative("optim", self, "matrix_lr", "embed_lr", "scalar_lr", *decays)
        steps = (
            f"optim.muon_newton_schulz_steps is {self.muon_newton_schulz_steps}; Polar Express has 5 steps"
        )
        need(not self.muon_polar_express or self.muon_newton_schulz_steps == 5, steps)
        checks.need_decay("optim", self, "muon_momentum", "muon_momentum_start", "adam_beta1", "adam_beta2")
        checks.need_positive("optim", self, "grad_clip")

    @property
    def adam_decays(self) -> tuple[float | None, float | None]:
        """Own weight decays of the embedding tables and of everything small."""
        return self.embed_weight_decay, self.scalar_weight_decay


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Weight averaging (PR 1501)."""

    ema_decay: float = 0.998
    """Decay of the exponential average per step."""
    ema_every: int = 10
    """Steps between EMA updates; each uses ema_decay ** ema_every."""
    swa_every: int | None = 50
    """Steps between snapshots of the EMA for stochastic weight averaging; None disables it."""
    swa_below: float = 0.2
    """Learning-rate multiplier below which snapshots are taken."""
    swa_apply: bool = True
    """Use the mean of the snapshots as the final weights; False ignores them, as PR 1501 did."""

    def __post_init__(self) -> None:
        checks.need_decay("average", self, "ema_decay")
        checks.need_positive("average", self, "ema_every", "swa_every")


@dataclass(frozen=True, kw_only=True)
class QATConfig:
    """Late quantization-aware training: fake int6 with straight-through gradients."""

    below: float | None = 0.25
    """Learning-rate multiplier below which quantization-aware training starts."""
    from_share: float | None = None
    """Share of the schedule, in the unit of train.schedule, after which it starts; replaces below."""
    banks: bool = True
    """Quantize the banks; False starts it without any effect, as PR 1501 did."""

    def __post_init__(self) -> None:
        checks.need_either("train.qat", self, "below", "from_share")
        checks.need_decay("train.qat", self, "from_share")


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """An extra first-order meta-learning step on the last micro-batch (docs/meta.md)."""

    method: Literal["fomaml", "cross_chunk", "sam"] = "fomaml"
    """Split into inner and outer halves: fomaml splits each sequence in time (PR 1501), cross_chunk the batch
    (PR 1502); sam is cross_chunk with the inner gradient of sharpness-aware minimization (PR 1601)."""
    every: int = 4
    """Optimizer steps between meta steps."""
    inner_lr: float = 0.002
    """Learning rate of the inner SGD step on the banks."""
    weight: float = 0.5
    """Weight of the loss after the inner step in the objective."""
    dilute: bool = True
    """Divide the objective by the number of micro-batches, as the originals did."""
    freeze_blocks: int = 2
    """Number of leading blocks that the inner step does not change."""
    above: float = 0.5
    """Learning-rate multiplier at or below which meta steps stop."""
    delta_weight: float = 0.0
    """Weight of (loss after the inner step - loss before it) in the objective (PR 1502)."""
    slot_rates: bool = False
    """Learn a multiplier of inner_lr for every bank slot (MetaSGD, PR 1502)."""
    sam_radius: float = 0.05
    """Norm of SAM's ascent step over all banks."""

    def __post_init__(self) -> None:
        checks.need_positive("train.meta", self, "every", "sam_radius")
        checks.need_not_negative("train.meta", self, "inner_lr", "weight", "freeze_blocks", "delta_weight")
        idle = "train.meta.weight and train.meta.delta_weight are both 0, so a meta step would change nothing"
        need(self.weight + self.delta_weight > 0, f"{idle}: raise one, or pass --train.meta none")
        for name in ("delta_weight", "slot_rates"):
            why = f"train.meta.inner_lr is 0, so nothing adapts: train.meta.{name} needs it positive"
            need(self.inner_lr > 0 or not getattr(self, name), why)


@dataclass(frozen=True, kw_only=True)
class ReptileConfig:
    """A last phase of training that interpolates MLP weights toward inner SGD (PR 296; Nichol 2018)."""

    share: float = 0.2
    """Share of the run, at its end, that the phase takes, in the unit of train.schedule. The learning-rate
    decay ends where the phase begins."""
    inner_steps: int = 3
    """Inner SGD steps per outer step, each on its own segment."""
    inner_lr: float = 0.1
    """Learning rate of the inner steps."""
    outer_lr: float = 0.01
    """Interpolation factor toward the result of the inner steps."""
    batch_seqs: int = 1
    """Sequences of train.seq_len tokens in one inner step."""
    block_share: float = 0.25
    """Share of the blocks, counted from the last, whose MLPs are trained (at least one block)."""

    def __post_init__(self) -> None:
        need(0 < self.share < 1, f"train.reptile.share is {self.share}; it must be between 0 and 1")
        checks.need_positive("train.reptile", self, "inner_steps", "batch_seqs")
        checks.need_not_negative("train.reptile", self, "inner_lr", "outer_lr")
        checks.need_share("train.reptile", self, "block_share")

    def blocks(self, layers: int) -> int:
        """Return the number of trained blocks of a model with that many layers."""
        return checks.share_of(self.block_share, layers)

    def steps(self, steps: int) -> int:
        """Return the number of steps that the phase takes of a run of `steps`."""
        return round(self.share * steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    seed: int = 42
    """Seed of the initial weights."""
    steps: int = 7500
    """Maximum number of optimizer steps."""
    max_seconds: float | None = 4800.0
    """Maximum training time in seconds, not counting validation and warm-up; None means no limit."""
    batch_tokens: int = 786_432
    """Tokens in one optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 98_304
    """Tokens in a forward and backward pass on one rank. Affects only memory, unless train.meta is on: a meta
    step uses one micro-batch."""
    seq_len: int = 2048
    """Tokens in a training sequence."""
    max_document: int | None = None
    """Train on one packed row for a micro-batch: its documents do not see each other, and are cut at every so
    many tokens (PR 1530). None trains on rows of seq_len, across documents."""
    cpu_shares: int = 2
    """CPU threads train up to this many equal parts of a micro-batch side by side. One thread, a GPU,
    train.compile and train.max_document use the whole."""
    compute_dtype: Dtype = "auto"
    """Dtype of activations and matmuls; auto is bfloat16 if the hardware supports it."""
    table_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the embedding tables during training."""
    compile: bool | None = None
    """Run the loss under torch.compile; None compiles on CUDA only."""
    cuda_graph: bool | None = None
    """Replay forward and backward from a CUDA graph; None leaves it off until it has been timed."""
    warmup_steps: int = 20
    """Untimed steps before training that trigger compilation and are then undone; only with train.compile."""
    schedule: Literal["time", "steps"] = "time"
    """Unit of the learning-rate decay; time needs max_seconds."""
    warmdown_steps: int | None = 2500
    """Length of the decay in steps, converted to time at the measured pace."""
    warmdown_fraction: float | None = None
    """Length of the decay as a share of the run, instead of warmdown_steps."""
    warmdown_shape: Literal["cosine", "linear"] = "cosine"
    """Shape of the decay. A linear decay that is longer than the run starts below 1."""
    min_lr: float = 0.0
    """Least learning-rate multiplier: the decay ends there (PR 1787)."""
    z_loss: float = 0.0
    """Weight of the mean squared log-partition function in the training loss (PR 301)."""
    loop_from: float = 0.0
    """Share of the run, in the unit of train.schedule, after which the loop of model.num_loops is on."""
    lr_hold_steps: int = 25
    """Number of initial steps that use the full learning rate regardless of the schedule."""
    adaptive_warmdown: bool = True
    """Start the decay when the training loss stops improving (PR 1501)."""
    adaptive_min_step: int = 2000
    """First step at which adaptive_warmdown checks the loss."""
    adaptive_every: int = 100
    """Steps between adaptive_warmdown checks."""
    adaptive_ema: float = 0.99
    """EMA decay of the loss that adaptive_warmdown checks."""
    adaptive_threshold: float = 5e-4
    """Improvement of the smoothed loss, in nats, below which the decay starts."""
    val_every: int | None = 3000
    """Steps between validations; None validates only at the end."""
    log_every: int = 500
    """Steps between progress lines."""
    checkpoint_minutes: float | None = 10.0
    """Minutes between checkpoints; None writes only the final one."""
    meta: MetaConfig | None = field(default_factory=MetaConfig)
    """Meta-learning step; None disables it."""
    reptile: ReptileConfig | None = None
    """Reptile phase at the end; None disables it."""
    qat: QATConfig | None = field(default_factory=QATConfig)
    """Late quantization-aware training; None disables it."""

    def __post_init__(self) -> None:
        sizes = ("steps", "batch_tokens", "micro_batch_tokens", "seq_len", "log_every", "adaptive_every")
        checks.need_positive("train", self, *sizes, "cpu_shares", "max_document", "val_every", "max_seconds")
        checks.need_not_negative("train", self, "z_loss", "seed")
        checks.need_share("train", self, "warmdown_fraction")
        checks.need_decay("train", self, "loop_from", "min_lr")
        checks.need_multiple("train", self, "micro_batch_tokens", "seq_len")
        checks.need_multiple("train", self, "batch_tokens", "micro_batch_tokens")
        checks.need_either("train", self, "warmdown_steps", "warmdown_fraction")
        endless = "train.schedule 'time' needs train.max_seconds; set it, or use train.schedule steps"
        need(self.schedule != "time" or self.max_seconds is not None, endless)
        for name in ("meta", "reptile"):
            whole = f"train.{name} needs rows of seq_len: set it or train.max_document to None"
            need(self.max_document is None or getattr(self, name) is None, whole)
        odd = f"train.meta splits sequences in halves: train.seq_len {self.seq_len} must be even"
        need(self.meta is None or self.seq_len % 2 == 0, odd)
        if self.reptile is not None and self.schedule != "time":
            none_left = f"train.reptile.share of train.steps {self.steps} leaves none; change one of them"
            fits = 0 < self.reptile.steps(self.steps) < self.steps
            need(fits, f"train.reptile needs a step, and one before it: {none_left}")


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Quantization of the weights (PR 1501)."""

    grid: Literal["reference", "percentile", "sdclip", "rd"] = "reference"
    """Choice of quantization steps: reference never goes below 1/31 (6 bits) for a row; percentile fits each
    row; sdclip clips at a multiple of a row's standard deviation, the token table's too (PR 1394); rd trades
    error against bits for every row and column."""
    target_bytes: int | None = None
    """Artifact size in bytes that grid rd aims for; None is pack.limit_bytes minus the code."""
    rank: int = 0
    """Maximum rank of grid rd's low-rank error corrections (LQER), and rank of those of grid sdclip."""
    lqer_tensors: int = 3
    """Matrices that grid sdclip corrects: those with the largest error norms (PR 1797)."""
    lqer_group: int = 64
    """Elements of a correction's right factor that share a scale, on grid sdclip."""
    mlp_sigmas: float = 11.5
    """Standard deviations of a row at which grid sdclip clips MLP matrices."""
    attention_sigmas: float = 13.0
    """The same for attention matrices."""
    table_sigmas: float = 14.0
    """The same for the token table."""
    table_bits: int = 7
    """Bits per weight of the token table on grid sdclip."""
    protect_group: bool = False
    """Keep 8 bits in the 64 columns whose inputs and weights are largest, on grid sdclip (AWQ, PR 1908)."""
    method: Literal["gptq", "round"] = "gptq"
    """Rounding: gptq uses Hessians from calibration text; round rounds to nearest."""
    bits: int = 6
    """Bits per bank weight, with codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1. Grid rd chooses its own."""
    percentiles: tuple[float, ...] = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    """Candidates for the clipping threshold of a row, as quantiles of |row|."""
    block_size: int = 128
    """Columns in a GPTQ block."""
    damping: float = 0.01
    """Damping of the Hessian, as a fraction of its mean diagonal."""
    calibration: Literal["generated", "shards"] = "generated"
    """Calibration text: what the model writes, or windows of training shards at random phases (PR 1394)."""
    calibration_sequences: int = 64
    """Sequences of calibration text."""
    calibration_length: int = 2048
    """Tokens in a calibration sequence."""
    calibration_batch: int = 64
    """Sequences generated at once; each needs memory for keys and values (exp101: 46 MB in float32)."""
    temperature: float = 0.8
    """Sampling temperature of calibration text."""
    seed: int = 42
    """Seed of calibration text."""
    tables: Literal["int8", "float16"] = "int8"
    """Storage of embedding tables with more than small_tensor elements (PR 301: float16)."""
    small_tensor: int = 65_536
    """Tensors with up to this many elements are stored as float16, except with grid rd."""

    def __post_init__(self) -> None:
        need(0 <= self.rank <= 8, f"quant.rank is {self.rank}; it must be 0 to 8")
        for name in ("bits", "table_bits"):
            bits = getattr(self, name)
            need(2 <= bits <= 8, f"quant.{name} is {bits}; it must be 2 to 8")
        need(len(self.percentiles) > 0, "quant.percentiles is empty")
        shares = all(0 < share <= 1 for share in self.percentiles)
        need(shares, f"quant.percentiles {self.percentiles} must be above 0 and at most 1")
        sizes = ("block_size", "calibration_sequences", "calibration_length", "calibration_batch")
        sigmas = ("mlp_sigmas", "attention_sigmas", "table_sigmas")
        checks.need_positive("quant", self, *sizes, *sigmas, "temperature", "target_bytes", "lqer_group")
        checks.need_not_negative("quant", self, "lqer_tensors")

    @property
    def clip_range(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def scale_floor(self) -> bool:
        """True if a row's step is never below 1 / clip_range, as in the original."""
        return self.grid == "reference"


Codec = Literal["raw", "rans", "lzma", "zstd", "brotli"]


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """The artifact and its byte budget."""

    limit_bytes: int = 16_000_000
    """Limit on weights plus code, in bytes."""
    code_bytes: int | None = None
    """Bytes of code; None counts the evaluation script that `pgolf submit` writes."""
    codecs: tuple[Codec, ...] = ("rans", "lzma")
    """Codecs to try on every section, keeping the smallest; without the C++ extension, LZMA replaces rans."""
    lzma_limit_bytes: int = 1_048_576
    """Largest section, in raw bytes, on which LZMA is tried; it takes 1 to 2 s per megabyte."""
    lzma_preset: int = 9
    """xz preset of LZMA, 0 to 9."""
    prune: bool = True
    """If the artifact is too large, zero just enough +-1 codes of the finest rows."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring (PR 1501)."""

    seq_len: int | None = None
    """Tokens in a window; None uses train.seq_len."""
    stride: int = 64
    """Tokens between the starts of sliding windows."""
    batch_seqs: int | None = None
    """Windows scored at once; None chooses what fits a CPU's cache or half of a GPU's free memory."""
    repeat_tail: bool = False
    """Score the last targets many times as the original did, for parity only."""
    compile: bool | None = None
    """Run scoring and test-time training under torch.compile; None compiles on CUDA only."""
    cuda_graph: bool | None = None
    """Replay test-time training updates from a CUDA graph; None does so on CUDA."""
    checkpoint_minutes: float | None = 2.0
    """Minutes between saved states that an interrupted `pgolf eval` resumes from; None disables saving."""

    def __post_init__(self) -> None:
        checks.need_positive("eval", self, "stride", "batch_seqs", "seq_len")


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """Implementations of ops."""

    implementation: Literal["auto", "triton", "torch"] = "auto"
    """Triton kernels or PyTorch, without C++ passes, for every op; auto is what `pgolf doctor` shows."""
    attention: Literal["auto", "triton", "flash", "cudnn", "fa3", "fa4", "plain"] = "auto"
    """Inner attention; auto chooses by GPU and shape."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, from data to scores."""

    name: str = "exp101"
    """Name of the preset."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)

    @property
    def eval_seq_len(self) -> int:
        return self.eval.seq_len or self.train.seq_len

    def __post_init__(self) -> None:
        stride, layers, meta = self.eval.stride, self.model.num_layers, self.train.meta
        window = self.eval_seq_len
        need(stride <= window, f"eval.stride {stride} is longer than the window of {window} tokens")
        frozen = f"ttt.freeze_blocks {self.ttt.freeze_blocks}"
        none_left = f"{frozen} leaves nothing to adapt: the model has {layers} layers"
        need(self.ttt.frozen_slots < layers, none_left)
        floor, average = self.train.min_lr, self.average
        qat = None if self.train.qat is None else self.train.qat.below
        swa = None if average.swa_every is None else average.swa_below
        for name, below in (("train.qat.below", qat), ("average.swa_below", swa)):
            never = (
                f"{name} is {below}, which the rate never falls below: train.min_lr is {floor}; raise {name}"
            )
            need(not floor or below is None or below > floor, never)
        if meta is None:
            return
        need(meta.freeze_blocks <= layers, f"train.meta.freeze_blocks exceeds the model's {layers} layers")
        all_frozen = f"train.meta.freeze_blocks freezes all {layers} layers, so nothing adapts"
        for name in ("delta_weight", "slot_rates"):
            adapts = meta.freeze_blocks < layers or not getattr(meta, name)
            need(adapts, f"{all_frozen}: train.meta.{name} needs one that does")
