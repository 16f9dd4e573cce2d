"""A run's metrics: always lines of metrics.jsonl, and where it is asked for a tracker beside them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from typing import Literal, Protocol

from pgolf_fast import console
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import write_text

TrackerName = Literal["wandb", "tensorboard"]


class Tracker(Protocol):
    """Takes named numbers by step. A step may come again, after an interruption."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases. The run's id stays in its folder, so that a resumed run is the same one there."""

    def __init__(self, config: RunConfig, folder: RunFolder, first_step: int):
        import wandb

        known = folder.path / "wandb_id.txt"
        name = known.read_text(encoding="utf-8").strip() if known.is_file() else uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project="pgolf",
            name=folder.path.name,
            id=name,
            resume="allow",
            dir=str(folder.path),
            config=dict(flatten(config)),
        )
        # its own count only ever grows: steps that are made again after an interruption would be dropped
        self._run.define_metric("*", step_metric="step")
        write_text(known, name + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard's event files, in the run's `tensorboard`; what a resumed run repeats is replaced."""

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


_TRACKERS: dict[TrackerName, type[WandbTracker] | type[TensorBoardTracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}


def need_tracker(name: TrackerName) -> None:
    """Raises PgolfError naming what to install where the tracker's package is missing."""
    try:
        if name == "wandb":
            import wandb  # noqa: F401 - only whether it is there
        else:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise PgolfError(
            f"--track {name} cannot be imported ({_first_line(error)}): pip install 'pgolf-fast[{name}]'"
        ) from error


def open_tracker(name: TrackerName, config: RunConfig, folder: RunFolder, first_step: int) -> Tracker:
    """The tracker, told the configuration; steps from `first_step` on will follow.

    Raises PgolfError where it does not start: nothing is lost yet.
    """
    try:
        return _TRACKERS[name](config, folder, first_step)
    except Exception as error:
        raise PgolfError(
            f"{name} did not start ({_first_line(error)}): put that right, or leave --track out"
        ) from error


class Metrics:
    """`console.MetricsWriter`, and a tracker that gets the numbers of every line after it is on disk.

    A tracker that fails is left out from there on, with one warning: the lines have everything.
    """

    def __init__(self, lines: console.MetricsWriter, batch_tokens: int):
        """`batch_tokens` are those of a step that does not say its own."""
        self._lines, self._batch_tokens = lines, batch_tokens
        self._tracker: Tracker | None = None
        self._elapsed = 0.0

    def track(self, tracker: Tracker, elapsed: float) -> None:
        """From here on, which is `elapsed` seconds into the run."""
        self._tracker, self._elapsed = tracker, elapsed

    def write(self, kind: str, **values: object) -> None:
        self._lines.write(kind, **values)
        if self._tracker is None:
            return
        step, numbers = values["step"], dict(self._numbers(kind, values))
        assert isinstance(step, int)
        try:
            if numbers:
                self._tracker.log(step, numbers)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self._give_up(error)

    def close(self) -> None:
        self._lines.close()
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as error:  # noqa: BLE001 - the run is over, and its files are whole
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._tracker = None
        console.logger.warning(
            "tracking stopped (%s); training goes on, and metrics.jsonl has it all", _first_line(error)
        )

    def _numbers(self, kind: str, values: dict[str, object]) -> Iterator[tuple[str, float]]:
        """What of a line is numbers, by group/name; of training also its throughput."""
        group = "train" if kind == "step" else kind
        if "weights" in values:  # of a validation
            group += "/" + re.sub(r"\W+", "_", str(values["weights"]))
        for name, value in values.items():
            if name != "step" and isinstance(value, (bool, int, float)):
                yield f"{group}/{name}", float(value)
            elif isinstance(value, list):  # of a bank, by slot
                yield from ((f"{group}/{name}/{slot}", float(one)) for slot, one in enumerate(value))
        elapsed = values.get("elapsed")
        if kind == "step" and isinstance(elapsed, float):
            tokens = values.get("tokens", self._batch_tokens)
            if elapsed > self._elapsed and isinstance(tokens, int):
                yield "train/tokens_per_second", tokens / (elapsed - self._elapsed)
            self._elapsed = elapsed


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
