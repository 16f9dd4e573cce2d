"""Training: from a configuration to averaged weights in a run folder."""

import contextlib
import math
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pgolf_fast import console
from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder, absolute
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.data.loader import make_loader
from pgolf_fast.data.source import Source, open_source
from pgolf_fast.distributed import World, fewer_collections, join_world
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import Score, Stream
from pgolf_fast.evaluation.scores import plain_score
from pgolf_fast.io import save_tensors, well_formed
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import choose_kernels, resolve_dtype
from pgolf_fast.model.weights import load_weights
from pgolf_fast.train import checkpoint as saved
from pgolf_fast.train.interrupt import Interrupted, Interrupts
from pgolf_fast.train.progress import StepClock, StepLog
from pgolf_fast.train.track import Metrics, Tracking, need_tracker, open_tracker
from pgolf_fast.train.trainer import NonFiniteError, PendingStep, Trainer


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
    unfinished: tuple[str, ...] = ()  # parts of its schedule that the run did not reach
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
            *(("unfinished", text) for text in self.unfinished),
            ("run folder", str(self.folder.path)),
        ]

    def __str__(self) -> str:
        return console.Table(None, self.rows()).text()


def train(config: RunConfig, out: Path, *, resume: bool = False, track: Tracking = None) -> TrainResult:
    """Train `config` in the folder `out`. With `resume`, continue from the newest intact checkpoint, if any.

    With `track`, send metrics to that tracker too. Raises PgolfError for a folder that holds another run or
    is in use, data that does not fit, a tracker that does not start, or a non-finite loss. After SIGINT,
    SIGTERM or SIGHUP, writes a checkpoint and raises Interrupted, a KeyboardInterrupt.
    """
    if track is not None:
        need_tracker(track)
    with join_world() as world:
        config = _resolved(config, world)
        if out.exists() and not out.is_dir():
            raise PgolfError(f"{out} is a file: choose another --out")
        folder = RunFolder(out)
        with _locked(folder, world):
            changed = saved.check_folder(folder, config, resume)
            world.barrier()  # every rank has read the folder before one of them writes
            console.setup_logging(folder.log_file if world.is_main else None, quiet=not world.is_main)
            try:
                with Interrupts(world.world_size) as interrupts, fewer_collections():
                    result = _Run(config, folder, world, interrupts).run(resume, changed, track)
                    interrupts.allow(at_once=True)
                    return result
            except Interrupted as stop:
                console.logger.warning(str(stop))
                raise
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
    c, ranks, cuda = config.train, world.world_size, world.device.type == "cuda"
    micro = min(c.micro_batch_tokens, c.batch_tokens // ranks)
    if c.batch_tokens % (micro * ranks) or micro % c.seq_len:
        raise PgolfError(
            f"train.batch_tokens {c.batch_tokens} cannot be split into {ranks} ranks of whole micro-batches "
            f"of {micro} tokens (sequences of {c.seq_len}): change train.micro_batch_tokens or the number of "
            "processes"
        )
    dtype: Any = str(resolve_dtype(c.compute_dtype, world.device)).removeprefix("torch.")
    compile, graph = cuda if c.compile is None else c.compile, bool(c.cuda_graph) and cuda
    train = replace(c, compute_dtype=dtype, compile=compile, cuda_graph=graph, micro_batch_tokens=micro)
    return absolute(replace(config, train=train))


@contextlib.contextmanager
def _locked(folder: RunFolder, world: World) -> Iterator[None]:
    """Hold the folder's lock on the main rank. Every rank raises PgolfError if another process holds it."""
    with contextlib.ExitStack() as stack:
        busy = None
        try:
            if world.is_main:
                stack.enter_context(folder.lock())
        except (PgolfError, OSError) as error:
            busy = error
        if world.same(float(busy is not None)):
            raise busy or PgolfError(f"{folder.path} is in use")
        yield


def _lag(world: World) -> int:
    """Return the number of steps launched before one is read: a GPU has work while its numbers travel."""
    return 1 if world.device.type == "cuda" else 0


class _Run:
    """One training run, from its configuration to its final weights."""

    def __init__(self, config: RunConfig, folder: RunFolder, world: World, stop: Interrupts):
        self.config, self.folder, self.world, self.stop = config, folder, world, stop
        choose_kernels(config.kernels, world.device)
        self.source = open_source(config.data, config.model.vocab_size)
        self.model = build_model(config, self.source, world)
        tokens = self.source.validation(config.eval_seq_len)
        self.stream = Stream(tokens, self.source.table, world.device, self.source.side_bytes(tokens))
        self.shards = self.source.train_shards()
        self.loader = make_loader(
            self.shards, config, rank=world.rank, world_size=world.world_size, pin=world.device.type == "cuda"
        )
        self.trainer = Trainer(self.model, config, self.loader, world)
        self.metrics = Metrics(console.MetricsWriter(folder.metrics_file if world.is_main else None))
        self.log, self.clock = StepLog(config.train, world), StepClock()
        self.unsaved = False  # whether the state is between two steps and newer than every checkpoint

    def run(self, resume: bool, changed: list[str], track: Tracking) -> TrainResult:
        try:
            self._start(resume, changed)
            if track is not None and self.world.is_main:
                tracker = open_tracker(track, self.config, self.folder, self.trainer.step + 1)
                self.metrics.track(tracker, self.trainer.elapsed)
            self._steps()
            return self._finish()
        except NonFiniteError as error:
            good = saved.newest_checkpoint(self.folder.checkpoints)
            raise PgolfError(
                f"training stopped: {error}. Last good checkpoint: {good or 'none yet'}. "
                "Resume with lower optim.matrix_lr and optim.embed_lr, or with train.compute_dtype float32: "
                f"`{self.folder.resume_command()}`"
            ) from error
        except Interrupted as stop:
            if self.unsaved:
                self._save()
            stop.args = (f"{stop} after step {self.trainer.step}; {self._kept()}",)
            raise
        except PgolfError as error:  # for example, a full disk or a changed shard
            if self.unsaved:
                with contextlib.suppress(PgolfError, OSError):
                    self._write_checkpoint()
            raise PgolfError(f"{error}; {self._kept()}" if self.trainer.step else str(error)) from error
        finally:
            self.loader.close()
            self.metrics.close()

    def _kept(self) -> str:
        """Return what is kept of the run, and the command that continues it."""
        newest, command = saved.newest_checkpoint(self.folder.checkpoints), self.folder.resume_command()
        if newest is None:
            anew = f": `{command}` starts anew" if self.folder.config_file.is_file() else ""
            return f"there is no checkpoint yet{anew}"
        return f"{newest} is kept: `{command}` continues from it"

    def _start(self, resume: bool, changed: list[str]) -> None:
        c, t = self.config, self.trainer
        shards, targets = sum(shard.num_tokens for shard in self.shards), self.stream.num_targets
        console.logger.info(
            f"data: {c.data.path or 'the built-in corpus'}, {shards:,} training tokens, {targets:,} "
            f"validation tokens, tokenizer {self.source.tokenizer.path.name} of {c.model.vocab_size:,} pieces"
        )
        console.logger.info(
            f"{c.name}: {c.model.num_parameters():,} parameters, {t.tokens_per_step:,} tokens per step in "
            f"{t.micro_steps} micro-batches, {c.train.compute_dtype} on {self.world.device.type}, "
            f"{self.world.world_size} process(es)"
        )
        checkpoint = saved.newest_whole(self.folder, c) if resume else None
        if checkpoint is None and resume:
            console.logger.info(f"{self.folder.path} has no checkpoint to resume from: training starts anew")
        kept, tokenizer = self.folder.tokenizer_file, self.source.tokenizer.path
        if checkpoint is not None and kept.is_file() and kept.read_bytes() != tokenizer.read_bytes():
            raise PgolfError(f"{tokenizer} is not the tokenizer of this run: set data.tokenizer to {kept}")
        self.world.barrier()  # every rank has read the folder before one of them writes
        if checkpoint is None and self.world.is_main:
            self.folder.retire(self.folder.model_file)
            saved.write_setup(self.folder, c, self.source)
        if c.train.compile:
            console.logger.info("compiling: %d warm-up steps whose effect is undone", c.train.warmup_steps)
            t.warm_up(c.train.warmup_steps)
        if checkpoint is None:
            return
        with well_formed(checkpoint.path):
            t.restore(checkpoint.tensors, checkpoint.metadata, str(checkpoint.path))
        if self.world.is_main:  # settings and data have passed all checks
            for path in checkpoint.damaged:  # else new checkpoints would look older than these
                path.replace(path.with_name(f"{path.name}.damaged"))
            saved.write_setup(self.folder, c, self.source)
        self.log.start_at(t.step, t.elapsed)
        self.metrics.write("resume", step=t.step, checkpoint=checkpoint.path.name, changed=changed)
        console.logger.info("resumed from %s at step %d", checkpoint.path, t.step)
        for text in changed:
            console.logger.info("changed: %s", text)

    def _steps(self) -> None:
        t, c = self.trainer, self.config.train
        lag = _lag(self.world)
        unread: deque[tuple[PendingStep, float, float]] = deque()  # a step, the clock before and after it
        last_save, done = t.elapsed, self._done()
        self.stop.allow(at_once=False)
        while not done:
            self.unsaved, before = False, t.elapsed
            self.clock.start()
            pending = t.launch()
            self._log_reptile()
            for earlier, _, _ in unread:
                earlier.result()  # waits here, so that the wait counts as training time
            seconds, stop = self._agree(self.clock.stop())
            t.elapsed += seconds
            self.unsaved, done = True, self._done()
            unread.append((pending, before, t.elapsed))
            validate = bool(c.val_every) and t.step % (c.val_every or 1) == 0
            save = c.checkpoint_minutes is not None and t.elapsed - last_save >= 60 * c.checkpoint_minutes
            while len(unread) > (0 if done or validate or save or stop else lag):
                self._read(*unread.popleft(), last=done and not unread)
            if t.rates is not None and (done or t.step % c.log_every == 0):
                self.metrics.write("slot_rates", step=t.step, **t.rates.values())
            if stop:
                raise Interrupted(stop)
            if validate:
                self._validate(self._raw_name)
            if save:
                self._save()
                last_save = t.elapsed
        self._save()

    def _agree(self, seconds: float) -> tuple[float, int]:
        """Return, on every rank, the main rank's seconds and a signal that any rank received, or 0."""
        stop = self.stop.number
        ours = [seconds if self.world.is_main else 0.0, float(stop > 0)]
        seconds, stopped = self.world.sum_(torch.tensor(ours, dtype=torch.float64)).tolist()
        return seconds, stop or (signal.SIGTERM if stopped else 0)

    def _done(self) -> bool:
        t, c = self.trainer, self.config.train
        return t.step >= c.steps or (c.max_seconds is not None and t.elapsed >= c.max_seconds)

    def _read(self, pending: PendingStep, before: float, after: float, *, last: bool) -> None:
        """Wait for a step's numbers and write them down."""
        result = pending.result()
        if triggered := self.trainer.observe(result, before):
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
        self._write_checkpoint()
        self.unsaved = False
        self.world.barrier()

    def _write_checkpoint(self) -> None:
        if self.world.is_main:
            t = self.trainer
            metadata = {**t.metadata(), "config": run_config_to_dict(self.config)}
            saved.save_checkpoint(self.folder.checkpoints, t.step, t.tensors(), metadata)

    def _validate(self, weights: str) -> Score:
        """Score the model. A signal ends this at once, unless other ranks would wait for this one."""
        step = self.trainer.step
        what = f"step {step} val ({weights})"
        self.stop.allow(at_once=True)
        console.logger.info(f"{what}: scoring {self.stream.num_targets:,} tokens")
        score = plain_score(self.model, self.stream, self.config, self.world, what)
        self.stop.allow(at_once=False)
        if not math.isfinite(score.loss):
            raise NonFiniteError(f"the validation loss ({weights}) at step {step} is {score.loss}")
        self.metrics.write("val", step=step, weights=weights, loss=score.loss, bpb=score.bpb)
        console.logger.info(f"{what}: loss {score.loss:.4f}, {score.bpb:.4f} bpb")
        return score

    def _finish(self) -> TrainResult:
        """Score raw and averaged weights, and write the final ones."""
        t, self.model.looping = self.trainer, True
        if t.rates is not None:
            console.logger.info("slot rates of the inner step: %s", t.rates.summary())
        raw = self._validate(self._raw_name)
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        load_weights(self.model, t.average.final(), "the average")
        averaged = self._validate(self._average_name)
        if t.in_reptile:  # it started from the average, and its weights are the final ones
            load_weights(self.model, weights, "the last step")
        if self.world.is_main:
            self.folder.retire(*self.folder.products)
            name = self._raw_name if t.in_reptile else self._average_name
            metadata = {"step": t.step, "weights": name, "config": run_config_to_dict(self.config)}
            save_tensors(self.folder.model_file, self.model.state_dict(), metadata)
            console.logger.info("wrote %s", self.folder.model_file)
        unfinished = self._unfinished()
        self.metrics.write("end", step=t.step, elapsed=t.elapsed, unfinished=unfinished)
        for text in unfinished:
            console.logger.warning(f"the run ended at step {t.step}, {console.duration(t.elapsed)}, {text}")
        self.world.barrier()
        numbers = (t.step, t.tokens, t.elapsed, raw, averaged, self.world.is_main)
        return TrainResult(self.folder, *numbers, tuple(unfinished), t.in_reptile)

    def _unfinished(self) -> list[str]:
        """Return the parts of the schedule that the step or time limit cut off, as sentence endings."""
        t, c = self.trainer, self.config.train
        texts = []
        if not t.schedule.over(t.step, t.elapsed):
            rate = f"x{t.schedule.multiplier(t.step, t.elapsed):.3f}"
            texts.append(f"before the learning-rate decay of train.schedule {c.schedule} ended, at {rate}")
        if c.qat is not None and not t.qat:
            texts.append("before quantization-aware training (train.qat) began")
        if self.config.model.num_loops and not t.schedule.loops(t.step, t.elapsed):
            texts.append("before its loop (train.loop_from) began, with which it is scored")
        if t.reptile is not None and not t.in_reptile:
            texts.append(f"before its Reptile phase, which train.schedule {c.schedule} puts later")
        return texts
