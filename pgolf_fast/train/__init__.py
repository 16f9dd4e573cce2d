"""Training loop, meta-learning, checkpoints. Calling this module trains, as `train.loop.train` does."""

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgolf_fast.config.schema import RunConfig
    from pgolf_fast.train.loop import TrainResult
    from pgolf_fast.train.track import Tracking


class _Train(ModuleType):
    # `pgolf_fast.train` names both this package and the public function. Python rebinds the attribute to the
    # package whenever a submodule is first imported, so the package itself must be callable.
    def __call__(
        self, config: "RunConfig", out: str | Path, *, resume: bool = False, track: "Tracking" = None
    ) -> "TrainResult":
        """Train a configuration into a run folder; see `pgolf_fast.train.loop.train`."""
        from pgolf_fast.train.loop import train

        return train(config, Path(out), resume=resume, track=track)


sys.modules[__name__].__class__ = _Train
