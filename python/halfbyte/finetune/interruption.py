"""Ctrl-C and SIGTERM during training: the first lets the step end and be saved, the second acts.

The run asks `pending` after each step. Outside training there is no step to wait for: inside
`at_once()` the first signal raises too.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from halfbyte.finetune import processes
from halfbyte.finetune.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """A context in which signals wait. `announce` is told of the first one.

    Handlers belong to the main thread of a run's only process: elsewhere signals stay as they are
    (a launcher stops its processes itself, and none could save alone).
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.pending: int | None = None
        self._announce = announce
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if processes.count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted, and so does one that came before."""
        self._at_once = True
        try:
            if self.pending is not None:
                raise Interrupted(self.pending)
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.pending = self.pending is None, number
        if self._at_once or not first:
            raise Interrupted(number)
        name = signal.Signals(number).name
        self._announce(f"{name}: finishing this step and saving; once more stops at once")
