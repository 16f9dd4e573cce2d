"""Training: from a configuration to averaged weights in a run folder."""

import re
import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pgolf_fast import console
from pgolf_fast.config.fields import flatten, run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig, TrainConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import Source, open_source
from pgolf_fast.distributed import World, join_world
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import Score, Stream
from pgolf_fast.evaluation.scores import plain_score
from pgolf_fast.io import load_tensors, save_tensors
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.model.weights import load_weights
from pgolf_fast.train.checkpoint import newest_checkpoint, save_checkpoint, write_setup
from pgolf_fast.train.track import Metrics, TrackerName, need_tracker, open_tracker
from pgolf_fast.train.trainer import NonFiniteError, PendingStep, StepResult, Trainer

# Settings that a resumed run may change: its length, reports and rates, and what comes after it.
_MAY_CHANGE = re.compile(
    r"name|(optim|quant|pack|eval|ttt|kernels)\..*|train\.(steps|max_seconds|log_every|val_every|"
    r"checkpoint_minutes|compute_dtype|compile|cuda_graph)"
)
_MUST_STAY = ("quant.bits", "quant.grid")  # the grid of quantization-aware training


@dataclass(frozen=True)
class TrainResult:
    """The run's folder, length and scores: with its weights after the last step, and with their average."""

    folder: RunFolder
    steps: int
    tokens: int
    seconds: float
    raw: Score
    averaged: Score
    is_main: bool
    keeps_raw: bool = False
    """The folder keeps the raw weights, which a Reptile phase made, and not the average it started from."""

    def rows(self) -> list[tuple[str, str]]:
        """Return the name and text of each number."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return [
            ("steps", f"{self.steps:,}"),
            ("tokens", f"{self.tokens:,}"),
            ("tokens/s", f"{rate:,.0f}"),
            ("training time", console.duration(self.seconds)),
            ("bpb, after Reptile" if self.keeps_raw else "bpb, raw weights", f"{self.raw.bpb:.4f}"),
            ("bpb, averaged weights", f"{self.averaged.bpb:.4f}"),
            ("run folder", str(self.folder.path)),
        ]

    def __str__(self) -> str:
        return console.Table(None, self.rows()).text()


def train(
    config: RunConfig, out: Path, *, resume: bool = False, track: TrackerName | None = None
) -> TrainResult:
    """Train `config` into the folder `out`. With `resume`, continue from its newest checkpoint, if any.

    With `track`, send metrics to that tracker too. Raises PgolfError for a folder that holds another run,
    data that does not fit, a tracker that does not start, or a non-finite loss.
    """
    if track is not None:
        need_tracker(track)
    with join_world() as world:
        config = _resolved(config, world)
        folder = RunFolder(out)
        changed = _check_folder(folder, config, resume)
        world.barrier()  # every rank has read the folder before one of them writes
        console.setup_logging(folder.log_file if world.is_main else None, quiet=not world.is_main)
        try:
            return _Run(config, folder, world).run(resume, changed, track)
        finally:
            console.close_logging()


def build_model(config: RunConfig, source: Source, world: World) -> GPT:
    """Return a freshly initialized model on the device, in the dtypes it is trained in."""
    torch.manual_seed(config.train.seed)
    dtype = resolve_dtype(config.train.compute_dtype, world.device)
    model = GPT(config.model, torch.from_numpy(source.table.has_leading_space), compute_dtype=dtype)
    if config.train.table_dtype == "bfloat16":
        for table in model.tables():
            table.data = table.data.bfloat16()
    return model.to(world.device)


def _resolved(config: RunConfig, world: World) -> RunConfig:
    """Return `config` with everything that depends on the machine decided: config.json has what ran."""
    dtype = str(resolve_dtype(config.train.compute_dtype, world.device)).removeprefix("torch.")
    cuda = world.device.type == "cuda"
    micro = min(config.train.micro_batch_tokens, config.train.batch_tokens // world.world_size)
    if config.train.batch_tokens % (micro * world.world_size) or micro % config.train.seq_len:
        raise PgolfError(
            f"train.batch_tokens {config.train.batch_tokens} cannot be split into {world.world_size} "
            f"ranks of whole micro-batches of {micro} tokens (sequences of {config.train.seq_len}): change "
            "train.micro_batch_tokens or the number of processes"
        )
    train = replace(
        config.train,
        compute_dtype=dtype,  # type: ignore[arg-type]  # one of Dtype by construction
        compile=cuda if config.train.compile is None else config.train.compile,
        cuda_graph=bool(config.train.cuda_graph) and cuda,
        micro_batch_tokens=micro,
    )
    return replace(config, train=train)


def _check_folder(folder: RunFolder, config: RunConfig, resume: bool) -> list[str]:
    """Return what differs from the run in the folder. Raises PgolfError if it cannot be continued so."""
    if not folder.config_file.is_file():
        if folder.path.exists() and not folder.path.is_dir():
            raise PgolfError(f"{folder.path} is a file: choose another --out")
        return []
    if not resume:
        raise PgolfError(
            f"{folder.path} already holds a run: pass --resume to continue it, or choose another --out"
        )
    before, now = dict(flatten(folder.read_config())), dict(flatten(config))
    changed = {
        name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    refused = [
        text for name, text in changed.items() if not _MAY_CHANGE.fullmatch(name) or name in _MUST_STAY
    ]
    if refused:
        raise PgolfError(f"{folder.path} cannot be resumed with other settings: {'; '.join(refused)}")
    return list(changed.values())


def _lag(world: World) -> int:
    """Return the number of steps launched before one is read: a GPU has work while its numbers travel."""
    return 1 if world.device.type == "cuda" else 0


class StepLog:
    """The progress line: step, loss, tokens/s, ms/step, time left and memory, every train.log_every steps."""

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world = config, world
        self._since, self._tokens = (0, 0.0), 0

    def start_at(self, step: int, elapsed: float) -> None:
        """Measure from here on: an earlier process made the steps before."""
        self._since = (step, elapsed)

    def after_step(self, result: StepResult, elapsed: float, *, last: bool) -> None:
        """Count a step, and log the line if it is due."""
        step = result.step
        self._tokens += result.tokens
        if not (step == 1 or step % self.config.log_every == 0 or last):
            return
        steps, seconds = step - self._since[0], elapsed - self._since[1]
        pace, rate = seconds / max(steps, 1), self._tokens / max(seconds, 1e-9)
        self._since, self._tokens = (step, elapsed), 0
        phase = "reptile" if result.reptile else f"lr x{result.multiplier:.3f}"
        left = (self.config.steps - step) * pace
        if self.config.max_seconds is not None:
            left = max(0.0, min(left, self.config.max_seconds - elapsed))
        console.logger.info(
            f"step {step}/{self.config.steps}  loss {result.loss:.4f}  {phase}"
            f"{'  int6' if result.qat else ''}  {rate:,.0f} tok/s  {1e3 * pace:.0f} ms/step  "
            f"{console.duration(elapsed)} elapsed, ETA {console.duration(left)}  "
            f"{peak_memory_mib(self.world)} MiB"
        )


def peak_memory_mib(world: World) -> int:
    """Return this process's peak memory in MiB: allocated on its GPU if it has one, else resident."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)  # bytes on macOS, KiB on Linux


class _Run:
    """One training run, from its configuration to its final weights."""

    def __init__(self, config: RunConfig, folder: RunFolder, world: World):
        self.config, self.folder, self.world = config, folder, world
        choose_kernels(config.kernels, world.device)
        self.source = open_source(config.data, config.model.vocab_size)
        self.model = build_model(config, self.source, world)
        tokens = self.source.validation(config.eval_seq_len)
        self.stream = Stream(tokens, self.source.table, world.device, self.source.side_bytes(tokens))
        self.loader = make_loader(
            self.source.train_shards(),
            config,
            rank=world.rank,
            world_size=world.world_size,
            pin=world.device.type == "cuda",
        )
        self.trainer = Trainer(self.model, config, self.loader, world)
        self.metrics = Metrics(console.MetricsWriter(folder.metrics_file if world.is_main else None))
        self.log = StepLog(config.train, world)

    def run(self, resume: bool, changed: list[str], track: TrackerName | None) -> TrainResult:
        try:
            self._start(resume, changed)
            if track is not None and self.world.is_main:
                tracker = open_tracker(track, self.config, self.folder, self.trainer.step + 1)
                self.metrics.track(tracker, self.trainer.elapsed)
            self._steps()
            return self._finish()
        except NonFiniteError as error:
            good = newest_checkpoint(self.folder.checkpoints)
            raise PgolfError(
                f"training stopped: {error}. Last good checkpoint: {good or 'none yet'}. "
                "Resume with lower optim.matrix_lr and optim.embed_lr, or with train.compute_dtype float32"
            ) from error
        finally:
            self.loader.close()
            self.metrics.close()

    def _start(self, resume: bool, changed: list[str]) -> None:
        if self.world.is_main:
            write_setup(self.folder, self.config, self.source)
        c, t = self.config, self.trainer
        console.logger.info(
            f"{c.name}: {c.model.num_parameters():,} parameters, {t.tokens_per_step:,} tokens per step in "
            f"{t.micro_steps} micro-batches, {c.train.compute_dtype} on {self.world.device.type}, "
            f"{self.world.world_size} process(es)"
        )
        if c.train.compile:
            console.logger.info("compiling: %d warm-up steps whose effect is undone", c.train.warmup_steps)
            t.warm_up(c.train.warmup_steps)
        checkpoint = newest_checkpoint(self.folder.checkpoints) if resume else None
        if checkpoint is not None:
            tensors, metadata = load_tensors(checkpoint)
            t.restore(tensors, metadata, str(checkpoint))
            self.log.start_at(t.step, t.elapsed)
            self.metrics.write("resume", step=t.step, checkpoint=checkpoint.name, changed=changed)
            console.logger.info("resumed from %s at step %d", checkpoint, t.step)
            for text in changed:
                console.logger.info("changed: %s", text)

    def _steps(self) -> None:
        t, c = self.trainer, self.config.train
        lag = _lag(self.world)
        unread: deque[tuple[PendingStep, float, float]] = deque()  # a step, the clock before and after it
        last_save, done = t.elapsed, self._done()
        while not done:
            before, start = t.elapsed, time.perf_counter()
            pending = t.launch()
            self._log_reptile()
            for earlier, _, _ in unread:
                earlier.result()  # waits here, so that the wait counts as training time
            # one clock for all ranks: learning rate, switches and checkpoints depend on it
            t.elapsed += self.world.same(time.perf_counter() - start)
            done = self._done()
            unread.append((pending, before, t.elapsed))
            validate = bool(c.val_every) and t.step % (c.val_every or 1) == 0
            save = c.checkpoint_minutes is not None and t.elapsed - last_save >= 60 * c.checkpoint_minutes
            while len(unread) > (0 if done or validate or save else lag):
                self._read(*unread.popleft(), last=done and not unread)
            if t.rates is not None and (done or t.step % c.log_every == 0):
                self.metrics.write("slot_rates", step=t.step, **t.rates.values())
            if validate:
                self._validate(self._raw_name)
            if save:
                self._save()
                last_save = t.elapsed
        self._save()

    def _done(self) -> bool:
        t, c = self.trainer, self.config.train
        return t.step >= c.steps or (c.max_seconds is not None and t.elapsed >= c.max_seconds)

    def _read(self, pending: PendingStep, before: float, after: float, *, last: bool) -> None:
        """Wait for a step's numbers and write them down."""
        result = pending.result()
        triggered = self.trainer.observe(result, before)
        if triggered:
            reason = "training loss has stopped improving; the learning rate decays from here"
            console.logger.info(f"step {result.step}: {reason}")
        self.metrics.write("step", **vars(result), elapsed=after, decay_triggered=triggered)
        self.log.after_step(result, after, last=last)

    def _log_reptile(self) -> None:
        t = self.trainer
        if t.reptile is not None and t.reptile_from == t.step - 1:
            console.logger.info(
                f"step {t.step}: Reptile starts from the averaged weights ({self._average_name}) and moves "
                f"the MLP of blocks {t.reptile.first} to {self.config.model.num_layers - 1}"
            )

    @property
    def _raw_name(self) -> str:
        return "after Reptile" if self.trainer.in_reptile else "raw weights"

    @property
    def _average_name(self) -> str:
        average, ema = self.trainer.average, self.config.average.ema_decay > 0
        if average.final() is average.swa:
            return f"mean of {average.swa_count} {'EMA ' if ema else ''}snapshots"
        return "EMA" if ema else "raw weights, no average"

    def _save(self) -> None:
        if self.world.is_main:
            metadata = {**self.trainer.metadata(), "config": run_config_to_dict(self.config)}
            save_checkpoint(self.folder.checkpoints, self.trainer.step, self.trainer.tensors(), metadata)
        self.world.barrier()

    def _validate(self, weights: str) -> Score:
        score, step = plain_score(self.model, self.stream, self.config, self.world), self.trainer.step
        self.metrics.write("val", step=step, weights=weights, loss=score.loss, bpb=score.bpb)
        console.logger.info("step %d val (%s): loss %.4f, %.4f bpb", step, weights, score.loss, score.bpb)
        return score

    def _finish(self) -> TrainResult:
        """Score raw and averaged weights, and write the final ones."""
        t = self.trainer
        if t.rates is not None:
            console.logger.info("slot rates of the inner step: %s", t.rates.summary())
        if t.reptile is not None and not t.in_reptile:
            console.logger.warning(
                f"the run ended at step {t.step}, {console.duration(t.elapsed)}, before its Reptile phase, "
                f"which train.schedule {self.config.train.schedule} puts later"
            )
        raw = self._validate(self._raw_name)
        weights, name = {n: v.clone() for n, v in self.model.state_dict().items()}, self._raw_name
        average = {name: value.to(self.world.device) for name, value in t.average.final().items()}
        load_weights(self.model, average, "the average")
        averaged = self._validate(self._average_name)
        if t.in_reptile:  # it started from the average, and its weights are the final ones
            load_weights(self.model, weights, "the last step")
        else:
            name = self._average_name
        if self.world.is_main:
            self.folder.retire(*self.folder.products)
            metadata = {"step": t.step, "weights": name, "config": run_config_to_dict(self.config)}
            save_tensors(self.folder.model_file, self.model.state_dict(), metadata)
            console.logger.info("wrote %s", self.folder.model_file)
        self.world.barrier()
        numbers = (t.step, t.tokens, t.elapsed, raw, averaged)
        return TrainResult(self.folder, *numbers, self.world.is_main, t.in_reptile)
