"""The clock of training: seconds of steps, without pauses of the process."""

import statistics
import time
from collections import deque

from pgolf_fast import console

_PAUSE = 2.0  # seconds; a shorter step is never taken for a pause


class StepClock:
    """Measures steps. One in which the process was stopped, or its machine asleep, counts as a usual one."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=20)

    def start(self) -> None:
        """Begin a step."""
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def stop(self) -> float:
        """Return the seconds of the step that count as training time."""
        wall, busy = time.perf_counter() - self._wall, time.process_time() - self._busy
        usual = statistics.median(self._recent) if self._recent else wall
        # a step that takes long because something compiles keeps a processor busy; a pause does not
        if wall > max(10 * usual, _PAUSE) and busy < wall / 2:
            console.logger.warning(
                f"the process was paused for {console.duration(wall - usual)}, which is no training time"
            )
            return usual
        self._recent.append(wall)
        return wall
