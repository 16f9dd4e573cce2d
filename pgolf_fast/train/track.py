"""Metrics of a run: always metrics.jsonl, and a tracker if one is asked for."""

import contextlib
import importlib
import re
import uuid
from collections.abc import Iterator
from typing import Literal

from pgolf_fast import console
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text

TrackerName = Literal["wandb", "tensorboard"]
Tracking = TrackerName | None


class Tracker:
    """Base class of trackers, which discards what it receives. A resumed run sends some steps again."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class WandbTracker(Tracker):
    """Weights & Biases. The run's id is kept in its folder, so that a resumed run continues the same one."""

    def __init__(self, config: RunConfig, folder: RunFolder, first_step: int):
        import wandb

        known = folder.path / "wandb_id.txt"
        run = known.read_text(encoding="utf-8").strip() if known.is_file() else uuid.uuid4().hex[:8]
        place, settings = {"name": folder.path.name, "dir": str(folder.path)}, dict(flatten(config))
        self._run = wandb.init(project="pgolf", id=run, resume="allow", config=settings, **place)
        # wandb's own step only grows, and it would drop steps that are repeated after an interruption
        self._run.define_metric("*", step_metric="step")
        write_text(known, run + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker(Tracker):
    """TensorBoard event files in the run's folder `tensorboard`; a resumed run replaces what it repeats."""

    def __init__(self, config: RunConfig, folder: RunFolder, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder.path / "tensorboard"), purge_step=first_step)
        settings = "\n".join(f"    {name}: {value}" for name, value in flatten(config))
        self._writer.add_text("config", settings, first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def need_tracker(name: TrackerName) -> None:
    """Raise PgolfError naming what to install if the tracker's package is missing."""
    try:
        importlib.import_module("wandb" if name == "wandb" else "torch.utils.tensorboard")
    except ImportError as error:
        raise PgolfError(
            f"--track {name} cannot be imported ({_first_line(error)}): pip install 'pgolf-fast[{name}]'"
        ) from error


def open_tracker(name: TrackerName, config: RunConfig, folder: RunFolder, first_step: int) -> Tracker:
    """Start the tracker with the run's configuration. Raises PgolfError if it does not start."""
    try:
        made = WandbTracker if name == "wandb" else TensorBoardTracker
        return made(config, folder, first_step)
    except Exception as error:
        raise PgolfError(f"{name} did not start ({_first_line(error)}): fix this or drop --track") from error


class Metrics:
    """Writer of metrics.jsonl that also sends numbers to a tracker, which is dropped if it fails."""

    def __init__(self, lines: console.MetricsWriter):
        self._lines, self._elapsed = lines, 0.0
        self._tracker = Tracker()

    def track(self, tracker: Tracker, elapsed: float) -> None:
        """Use `tracker` from now on, at `elapsed` seconds of the training clock."""
        self._tracker, self._elapsed = tracker, elapsed

    def write(self, kind: str, step: int, **values: object) -> None:
        """Write a line of this kind, and track its numbers once it is on disk."""
        self._lines.write(kind, step=step, **values)
        numbers = dict(self._numbers(kind, values))
        with self._or_dropped():
            if numbers:
                self._tracker.log(step, numbers)

    def close(self) -> None:
        self._lines.close()
        with self._or_dropped():
            self._tracker.close()

    @contextlib.contextmanager
    def _or_dropped(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - no tracker may stop a run or its end
            self._tracker = Tracker()
            reason = f"tracking stopped ({_first_line(error)})"
            console.logger.warning("%s; training continues, and metrics.jsonl has everything", reason)

    def _numbers(self, kind: str, values: dict[str, object]) -> Iterator[tuple[str, float]]:
        """Yield the numbers of a line as (group/name, value), and the throughput of a training step."""
        group = "train" if kind == "step" else kind
        if "weights" in values:  # a validation
            group += "/" + re.sub(r"\W+", "_", str(values["weights"]))
        for name, value in values.items():
            if isinstance(value, (bool, int, float)):
                yield f"{group}/{name}", float(value)
            elif isinstance(value, list) and kind == "slot_rates":
                yield from ((f"{group}/{name}/{slot}", float(rate)) for slot, rate in enumerate(value))
        elapsed, tokens = values.get("elapsed"), values.get("tokens")
        if isinstance(elapsed, float) and isinstance(tokens, int):
            if elapsed > self._elapsed:
                yield "train/tokens_per_second", tokens / (elapsed - self._elapsed)
            self._elapsed = elapsed


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
