"""Signals during training: the first one stops the run after its step, a second one ends the process."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from pgolf_fast import console

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REPEATS = 5.0  # seconds; the terminal and torchrun may both send a process the same signal


class Interrupted(KeyboardInterrupt):
    """A signal stopped a training run; `status` is the exit status that says so."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


class Interrupts:
    """Keeps the number of the first signal in the block, or raises Interrupted where `allow` permits it."""

    def __init__(self, world_size: int):
        self.number = 0
        self._alone, self._at_once, self._since = world_size == 1, True, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python handles no signals in others
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def allow(self, *, at_once: bool) -> None:
        """Choose whether a signal raises Interrupted at once, if no other rank waits for this one."""
        self._at_once = at_once and self._alone
        if self._at_once and self.number:
            raise Interrupted(self.number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            if time.monotonic() - self._since > _REPEATS:
                os._exit(128 + number)
            return
        self.number, self._since = number, time.monotonic()
        if self._alone:  # the system ends the process at a second signal, even in a long operation
            for known in self._before:
                signal.signal(known, signal.SIG_DFL)
        if self._at_once:
            raise Interrupted(number)
        console.logger.info("stopping after this step; a second signal stops at once, without a checkpoint")
