"""How far a long job is: counts flow in, a live bar or a line every 30 seconds flows out on standard error.

A bar is of no use in a log file, and silence under nohup makes people kill healthy jobs; so without a terminal a
plain line appears at a fixed interval, also while nothing moves: then it says for how long.
"""

import math
import resource
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

_INTERVAL_S = 30.0


class Ticker:
    """Shows ``done`` of ``total``, a few facts, memory, stalls and the time left; a context manager.

    ``start`` of them were done before, so that the time left follows from those that this process did. A stall is an
    interval in which nothing moved.
    """

    def __init__(
        self, label: str, *, total: int, start: int = 0, quiet: bool = False, interval_s: float = _INTERVAL_S
    ) -> None:
        self._label, self._total, self._start = label, total, start
        self._quiet, self._interval_s = quiet, interval_s
        self._began = self._moved = time.monotonic()
        self._done, self._facts = start, ""
        self._num_stalls = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty() and not quiet:
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
            # On a narrow terminal facts are cut, not the bar and the time left.
            facts = TextColumn("{task.fields[facts]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
            self._bar = Progress(*columns, facts, console=Console(stderr=True), expand=True)
            self._task = self._bar.add_task(label, total=total, completed=start, facts="")

    def update(self, done: int, **facts: str | int | float) -> None:
        """Notes that ``done`` units of work are finished; ``facts`` are shown beside it."""
        text = "  ".join(f"{name} {_short(value)}" for name, value in facts.items())
        if (done, text) != (self._done, self._facts):
            self._moved = time.monotonic()
        self._done, self._facts = done, text
        if self._bar is not None:
            self._bar.update(self._task, completed=done, facts=self._told(self._moved))

    def line(self, now: float) -> str:
        """What a log shows at ``now``, a time of ``time.monotonic``."""
        here = self._done - self._start
        left = (now - self._began) / here * (self._total - self._done) if here else math.nan
        eta = "unknown" if math.isnan(left) else str(timedelta(seconds=round(left)))
        return f"{self._label}: {self._done}/{self._total}  {self._told(now)}  ETA {eta}"

    def show(self, renderable: RenderableType) -> None:
        """Print something between, unless quiet."""
        if not self._quiet:
            (Console(stderr=True) if self._bar is None else self._bar.console).print(renderable)

    def _told(self, now: float) -> str:
        parts = [self._facts, f"memory {_memory()}", f"stalls {self._num_stalls}"]
        still = now - self._moved
        parts += [f"nothing new for {still:.0f} s"] if still >= self._interval_s else []
        return "  ".join(part for part in parts if part)

    def _tick(self) -> None:
        """In a thread of its own, since a job that hangs calls nothing."""
        while not self._ended.wait(self._interval_s):
            now = time.monotonic()
            self._num_stalls += now - self._moved >= self._interval_s
            if self._bar is None:
                print(self.line(now), file=sys.stderr, flush=True)
            else:
                self._bar.update(self._task, facts=self._told(now))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()


def _memory() -> str:
    """The most that this process held, and what is taken of its GPU by all processes where it uses one."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    text = f"{peak / 1e9:.1f} GB"
    torch = sys.modules.get("torch")  # what does not use it need not load it
    if torch is None or not torch.cuda.is_initialized():
        return text
    free, total = torch.cuda.mem_get_info()
    return f"{text}, GPU {(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB"


def _short(value: str | int | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
