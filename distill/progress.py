"""How far a long job is: counts flow in, a live bar or a line every 30 seconds flows out on standard error.

A bar is of no use in a log file, and silence under nohup makes people kill healthy jobs; so without a terminal a
plain line appears at a fixed interval.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_INTERVAL_S = 30.0


class Ticker:
    """Shows ``done`` of ``total`` and a few facts; a context manager."""

    def __init__(self, label: str, *, total: int, quiet: bool = False) -> None:
        self._label, self._total, self._quiet = label, total, quiet
        self._started = self._shown = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[facts]}"), console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total, facts="")

    def update(self, done: int, **facts: str | int | float) -> None:
        """Notes that ``done`` units of work are finished; ``facts`` are shown beside it."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in facts.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=text)
            return
        now = time.monotonic()
        if not self._quiet and now - self._shown >= _INTERVAL_S:
            self._shown = now
            left = (now - self._started) / done * (self._total - done) if done else float("nan")
            print(f"{self._label}: {done}/{self._total}  {text}  ETA {left:.0f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _short(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
