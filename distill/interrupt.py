"""A scheduler's signal flows in; a name that a loop asks for, or a KeyboardInterrupt, flows out.

Training asks between two steps, saves, and stops. Filling a cache has nothing to save but what is committed anyway, and
a teacher may take minutes to load or to answer, so there the signal also interrupts whatever the main thread is doing.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = ("SIGTERM", "SIGUSR1")  # what Slurm and Kubernetes send before they kill


class Interrupt:
    """Remembers a signal instead of dying from it; a context manager. Only a main thread can listen to signals.

    With ``at_once`` the first signal, Ctrl-C among them, also raises KeyboardInterrupt in the main thread. Later ones
    do not: they would interrupt the cleaning up.
    """

    def __init__(self, *, at_once: bool = False) -> None:
        self.name: str | None = None
        self._at_once = at_once
        self._before: dict[signal.Signals, Any] = {}

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came: one raised in a finaliser or a callback is swallowed there."""
        if self.name:
            raise KeyboardInterrupt(self.name)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for name in (*_SIGNALS, "SIGINT") if self._at_once else _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        first = self.name is None
        self.name = signal.Signals(number).name
        if first and self._at_once:
            raise KeyboardInterrupt(self.name)
