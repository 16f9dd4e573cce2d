"""Session part `step`: the whole training step, ours against the same model in plain PyTorch.

T1: milliseconds of a step at the preset's micro-batch: each contender in a process of its own, written at
once; then in one process, in turn, as far as time goes. T3: their losses on the same tokens from the same
weights. T2: the fastest of ours and of the peers again with larger micro-batches. Every step is complete
(forward, backward, clipping, optimizer); the tokens are a random Markov chain, which can be learned.
"""

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_session.plain import PlainTrainer, variant
from benchmarks.gpu_session.session import (
    PartFile,
    Session,
    each_alone,
    measure_way,
    prepared,
    synchronize,
    take_turns,
    timed,
)
from pgolf_fast.bench.aot import kernels_in_source
from pgolf_fast.bench.peers import compile_settings, forced_attention
from pgolf_fast.bench.roofline import roof
from pgolf_fast.bench.run import attempt
from pgolf_fast.bench.timer import gpu_state
from pgolf_fast.config.model import ModelConfig
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.distributed import World
from pgolf_fast.evaluation.estimate import forward_flops
from pgolf_fast.model.compiled import tag_compile_cache
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.ops.tuned import load_tuned
from pgolf_fast.train.trainer import Trainer

POOL_TOKENS = 128 * 98_304  # tokens on the device, which are repeated
LARGER = (2, 4)  # micro-batch sizes of T2 over the preset's; they must divide its eight micro-batches


@dataclass(frozen=True)
class Contender:
    """One implementation of the training step."""

    name: str
    ours: bool
    compile: str | None = None  # a setting of torch.compile, as in `bench.peers`; None runs eagerly
    backend: str = "any"  # attention backend of plain PyTorch
    attention: str = "auto"  # our attention, as in `ops.attention_backend`
    graph: bool = False  # replay our micro-steps from a CUDA graph
    fused: bool = False  # q, k and v of plain PyTorch by one product
    dry: bool = False  # also run in a rehearsal


# Most important first: when time is short, the last are left out. The first needs no compiler.
CONTENDERS = (
    Contender("ours, eager", True, dry=True),
    Contender("plain, compile, cudnn", False, "compile", "cudnn", dry=True),
    Contender("ours, compile", True, "compile", dry=True),
    Contender("plain, compile, fa3", False, "compile", "fa3"),
    Contender("ours, compile, cudnn attention", True, "compile", attention="cudnn"),
    Contender("plain, compile-mix-off, cudnn", False, "compile-mix-off", "cudnn"),
    Contender("plain, compile, cudnn, one product for q, k, v", False, "compile", "cudnn", fused=True),
    Contender("plain, compile, flash", False, "compile", "flash"),
    Contender("ours, CUDA graph", True, graph=True),
    Contender("ours, compile, triton attention", True, "compile", attention="triton"),
    Contender("ours, compile and CUDA graph", True, "compile", graph=True),
    Contender("plain, compile-max-autotune, cudnn", False, "compile-max-autotune", "cudnn"),
    Contender("plain, compile-persistent-tma, cudnn", False, "compile-persistent-tma", "cudnn"),
    Contender("plain, eager, cudnn", False, None, "cudnn", dry=True),
)
REFERENCE = "plain, compile, cudnn"  # the baseline of the losses
STEPS_ALONE = 5


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Return FLOPs of forward and backward: three times forward, with half of the attention matrix."""
    return 3 * forward_flops(model, length, length) / length


class Pool:
    """A loader that cycles through micro-batches already on the device."""

    def __init__(self, tokens: Tensor, targets: Tensor, sequences: int):
        self.tokens, self.targets, self.sequences, self.position = tokens, targets, sequences, 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        start = self.position
        self.position = (start + self.sequences) % len(self.tokens)
        return self.tokens[start : start + self.sequences], self.targets[start : start + self.sequences]

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def markov_tokens(vocab: int, sequences: int, length: int, seed: int = 0) -> np.ndarray:
    """Return ids (sequences, length): each token has four successors; one token in ten is random."""
    generator = np.random.default_rng(seed)
    followers = generator.integers(0, vocab, (vocab, 4))
    tokens = np.empty((sequences, length), np.int64)
    tokens[:, 0] = generator.integers(0, vocab, sequences)
    for t in range(1, length):
        next_tokens = followers[tokens[:, t - 1], generator.integers(0, 4, sequences)]
        anything = generator.random(sequences) < 0.1
        tokens[:, t] = np.where(anything, generator.integers(0, vocab, sequences), next_tokens)
    return tokens


@dataclass
class Runner:
    """A contender that is compiled and ready."""

    contender: Contender
    trainer: Trainer | PlainTrainer | None  # none if another process measured it
    prepare_seconds: float
    peak_bytes: int | None
    ms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Time one step, from a synchronized GPU until its loss is on the host."""

        def advance() -> float:
            assert self.trainer is not None
            with forced_attention(self.contender.attention):
                result = self.trainer.advance()
            return float(result) if isinstance(result, Tensor) else result.loss

        loss, ms = timed(advance)
        self.ms.append(ms)
        self.losses.append(loss)


def run_config(session: Session, micro: int = 1) -> RunConfig:
    """Return the preset at a constant learning rate, without features that act only every few steps."""
    config = preset(session.preset)
    if session.dry:
        train = replace(config.train, micro_batch_tokens=64, batch_tokens=256, seq_len=32)
        config = replace(config, model=dry_model(config), train=train, eval=replace(config.eval, stride=32))
    train = replace(
        config.train,
        schedule="steps",
        max_seconds=None,
        steps=100_000,
        adaptive_warmdown=False,
        meta=None,
        qat=None,
        micro_batch_tokens=micro * config.train.micro_batch_tokens,
    )
    return replace(config, train=train)


def dry_model(config: RunConfig) -> ModelConfig:
    """Return the model of a rehearsal: two layers, with every feature in one of them."""
    return replace(config.model, num_layers=2, ve_layers=(1,), xsa_last_n=2, frozen_skips=0)


def make_model(config: RunConfig, device: torch.device) -> GPT:
    """Return the same random model for the same configuration."""
    torch.manual_seed(config.train.seed)
    return GPT(config.model, compute_dtype=resolve_dtype(config.train.compute_dtype, device)).to(device)


def make_pool(config: RunConfig, device: torch.device, micro_batches: int) -> tuple[Tensor, Tensor]:
    length = config.train.seq_len
    sequences = micro_batches * config.train.micro_batch_tokens // length
    tokens = torch.from_numpy(markov_tokens(config.model.vocab_size, sequences, length + 1)).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def prepare(contender: Contender, config: RunConfig, pool: tuple[Tensor, Tensor], session: Session) -> Runner:
    """Return a contender's trainer after one step, which compiles everything and is undone."""
    start, device, train = time.monotonic(), session.device, config.train
    settings = None
    if contender.compile is not None:
        settings = {"backend": "aot_eager"} if session.dry else compile_settings(contender.compile)
    before = _memory(device)
    model = make_model(config, device)
    loader = Pool(*pool, train.micro_batch_tokens // train.seq_len)
    trainer: Trainer | PlainTrainer
    if contender.ours:
        ours = Trainer(
            model,
            replace(config, train=replace(train, cuda_graph=contender.graph and not session.dry)),
            loader,
            World(0, 1, device),
        )
        if settings is not None:
            tag_compile_cache()
            ours.loss_function = torch.compile(model.loss, dynamic=False, fullgraph=True, **settings)
        with forced_attention(contender.attention):
            ours.warm_up(1)
        trainer = ours
    else:
        backend = "any" if session.dry else contender.backend
        functions = variant(backend, contender.fused)
        plain = PlainTrainer(
            model, config, loader.next_batch, backend=backend, compile=settings, functions=functions
        )
        plain.warm_up()
        loader.load_state({"position": 0})
        trainer = plain
    peak = None if device.type == "cpu" else torch.cuda.max_memory_allocated(device) - before
    return Runner(contender, trainer, time.monotonic() - start, peak)


def _memory(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def pool_of(config: RunConfig, session: Session) -> tuple[Tensor, Tensor]:
    batches = 8 if session.dry else max(8, POOL_TOKENS // config.train.micro_batch_tokens)
    return make_pool(config, session.device, batches)


def measure_alone(
    contenders: Sequence[Contender],
    session: Session,
    deadline: float,
    note: Callable[[Runner], None],
    *words: str,
) -> dict[str, str]:
    """Give `note` each contender as another process measured it; return the failures with reasons."""
    by_name = {one.name: one for one in contenders}

    def found(name: str, values: dict[str, Any]) -> None:
        note(Runner(by_name[name], None, **values))

    compiles = {name: one.compile is not None for name, one in by_name.items()}
    return each_alone(compiles, session, deadline, found, *words)


def run_way(session: Session) -> bool:
    """Measure one contender, for `measure_alone` in another process."""
    (contender,) = (one for one in CONTENDERS if one.name == session.way)
    config = run_config(session, session.micro)

    def measure() -> dict[str, Any]:
        runner = prepare(contender, config, pool_of(config, session), session)
        for _ in range(2 if session.dry else STEPS_ALONE):
            runner.step()
        names = ("prepare_seconds", "peak_bytes", "ms", "losses")
        return {name: getattr(runner, name) for name in names}

    return measure_way(session, measure)


def rows(runners: Sequence[Runner], config: RunConfig, device: torch.device) -> list[dict[str, object]]:
    """Return one record per contender, with the ratio to the fastest plain one."""
    tokens = config.train.batch_tokens
    flops = tokens * flops_per_token(config.model, config.train.seq_len)
    measured = [(runner, statistics.median(runner.ms)) for runner in runners if runner.ms]
    plain = [median for runner, median in measured if not runner.contender.ours]
    peak = roof(device, resolve_dtype(config.train.compute_dtype, device)).flops
    found = []
    for runner, median in measured:
        found.append(
            {
                "contender": runner.contender.name,
                "median_ms": median,
                "min_ms": min(runner.ms),
                "max_ms": max(runner.ms),
                "steps": len(runner.ms),
                "tokens_per_second": tokens / median * 1e3,
                "mfu_percent": 100 * flops / (median / 1e3) / peak,
                "peak_gib": None if runner.peak_bytes is None else runner.peak_bytes / 2**30,
                "best_plain_over_this": min(plain) / median if plain else None,
                "micro_batch_tokens": config.train.micro_batch_tokens,
                "prepare_seconds": runner.prepare_seconds,
                "in_turn": runner.trainer is not None,
                "ms": [round(ms, 3) for ms in runner.ms],
                "losses": runner.losses,
            }
        )
    return found


def loss_differences(runners: Sequence[Runner]) -> dict[str, dict[str, float]]:
    """T3: return each contender's loss differences from the reference: largest, and mean of the last 50."""
    curves = {r.contender.name: r.losses for r in runners}
    if REFERENCE not in curves:
        return {}
    found = {}
    for name, losses in curves.items():
        pairs = list(zip(losses, curves[REFERENCE], strict=False))
        if name == REFERENCE or not pairs:
            continue
        gaps = [a - b for a, b in pairs]
        found[name] = {
            "steps": len(gaps),
            "largest": max(map(abs, gaps)),
            "mean_of_last_50": statistics.fmean(gaps[-50:]),
            "last_loss": losses[-1],
        }
    return found


# The first match wins. Names are of CUDA kernels, on a CPU of operators.
CLASSES = {
    "attention, library": ("flash", "fmha", "cudnn_generated", "sdpa", "scaled_dot_product"),
    "gemm, library": ("gemm", "cutlass", "nvjet", "cublas", "splitk", "aten::mm", "addmm", "linear", "bmm"),
    "fused by Inductor": ("triton_",),
    "scatter and gather": ("index", "scatter", "gather", "embedding", "sort"),
    "copies and fills": ("memcpy", "memset", "copy", "fill"),
    "optimizer": ("multi_tensor", "fused_adam", "adam"),
}


def time_by_class(runner: Runner, device: torch.device) -> dict[str, object]:
    """Return milliseconds of one step by kernel class, and the twenty longest kernels."""
    cuda = device.type == "cuda"
    ours = set(kernels_in_source())
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    assert runner.trainer is not None
    with forced_attention(runner.contender.attention), profile(activities=[activity]) as trace:
        runner.trainer.advance()
        synchronize()
    totals: dict[str, float] = defaultdict(float)
    kernels = []
    for event in trace.key_averages():
        ms = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        totals[_class_of(event.key, ours)] += ms
        kernels.append((ms, event.count, event.key[:120]))
    ordered = dict(sorted(totals.items(), key=lambda item: -item[1]))
    return {"ms_by_class": ordered, "longest": sorted(kernels, reverse=True)[:20]}


def _class_of(kernel: str, ours: set[str]) -> str:
    if kernel in ours:
        return f"ours: {kernel}"
    pairs = ((name, word) for name, words in CLASSES.items() for word in words)
    return next((name for name, word in pairs if word in kernel.lower()), "elementwise and other")


def run(session: Session) -> bool:
    """Write step.json; return whether our step and a plain one were measured."""
    torch._dynamo.config.recompile_limit = 64  # every contender compiles the same functions
    load_tuned()
    if session.way:
        return run_way(session)
    file = PartFile(session, "step")
    best = compare_contenders(session, file)
    larger_micro_batches(session, file, best)
    ok = {contender.ours for contender in best} == {True, False}
    file.finish(ok)
    return ok


def compare_contenders(session: Session, file: PartFile) -> list[Contender]:
    """Measure T1, T3 and the profiles; return our fastest contender and the fastest plain one."""
    contenders = [c for c in CONTENDERS if (c.dry or not session.dry) and session.wants(c.name)]
    config, device = run_config(session), session.device
    measured: dict[str, Runner] = {}
    failed: dict[str, str] = {}

    def write() -> None:
        found = list(measured.values())
        file.write(T1=rows(found, config, device), T3=loss_differences(found), failed=failed)

    def note(runner: Runner) -> None:
        measured[runner.contender.name] = runner
        write()

    failed |= measure_alone(contenders, session, session.deadline(0.5), note)
    write()
    before = gpu_state(device)
    in_turn(measured, session, file, write)
    file.write(clocks=[before, gpu_state(device)])
    slowest_first = sorted(measured.values(), key=lambda r: -statistics.median(r.ms))
    return list({r.contender.ours: r.contender for r in slowest_first}.values())


def in_turn(measured: dict[str, Runner], session: Session, file: PartFile, write: Callable[[], None]) -> None:
    """Measure again, in one process and in turn, whatever there is time for; then profile it."""
    config, device = run_config(session), session.device
    pool, deadline = pool_of(config, session), session.deadline(0.4)
    makers = {name: partial(prepare, r.contender, config, pool, session) for name, r in measured.items()}
    before = {name: runner.prepare_seconds for name, runner in measured.items()}
    runners, failed = prepared(makers, file, deadline, before)

    def note() -> None:
        measured.update({runner.contender.name: runner for runner in runners if runner.ms})
        write()

    take_turns(runners, Runner.step, session.steps, session.deadline(0.5), failed, note)
    file.write(failed_in_turn=failed)
    profiles: dict[str, object] = {}
    for runner in runners:
        if session.left > 20 or session.dry:
            profiles[runner.contender.name] = attempt(lambda runner=runner: time_by_class(runner, device))
            file.write(profiles=profiles)


def larger_micro_batches(session: Session, file: PartFile, contenders: Sequence[Contender]) -> None:
    """T2: measure the fastest contender of each side with fewer, larger micro-batches."""
    release(session.device)
    found: list[dict[str, object]] = []
    for factor in LARGER[:1] if session.dry else LARGER:
        if session.left < 60 and not session.dry:
            break
        runners: list[Runner] = []
        words = ("--micro", str(factor))
        failed = measure_alone(contenders, session, session.deadline(0.8), runners.append, *words)
        found += rows(runners, run_config(session, factor), session.device)
        file.write(T2=found, T2_failed=failed)


def release(device: torch.device) -> None:
    """Free the memory of deleted trainers."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
