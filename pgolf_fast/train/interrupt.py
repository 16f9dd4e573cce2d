"""Signals during training: the first one stops the run after its step, a second one ends the process."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from pgolf_fast import console

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPEATS = 5.0
"""Seconds in which processes of torchrun may get the same signal from the terminal and from torchrun."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a training run; `status` is the exit status that says so."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Interrupts:
    """Notes the number of the first signal in the block; with `at_once`, raises Interrupted right there.

    Outside the main thread, where Python handles no signals, it does nothing.
    """

    def __init__(self, world_size: int):
        self.number, self.at_once = 0, True
        self._alone, self._since = world_size == 1, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if time.monotonic() - self._since > _REPEATS:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self._since = number, time.monotonic()
        if self._alone:  # the system ends the process at the second signal, even inside a long operation
            for known in self._before:
                signal.signal(known, signal.SIG_DFL)
        if self.at_once:
            raise Interrupted(number)
        console.logger.info("stopping after this step; a second signal stops at once, without a checkpoint")
