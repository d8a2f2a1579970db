"""A cache's missing units and a loaded teacher flow in, commits flow out.

The teacher reads all units as one stream, so it never idles between two of them. A unit is written, in a thread of
its own, when the last of its sequences has come back; memory holds the units that are open, never the whole job.

Several workers may fill one cache. Each looks at a unit right before it begins it: first at those of its own share,
then at what is left of the others' shares. A unit belongs to whoever commits it first, so a slow or dead worker blocks
nobody.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from distill.cache import generations, storage
from distill.cache.plan import Commit, Unit
from distill.cache.writer import CacheWriter
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.progress import Ticker
from distill.records import Prompt, Question, Reject, SequenceTargets, Targets
from distill.teacher.canary import Canary

_PENDING_WRITES = 2  # units that may wait for the disk before the teacher does
_LAST_WRITES_S = 20.0  # that complete units may take once the run has to end; schedulers kill after 30 s
_LOOK_EVERY = 64  # sequences of a unit between two looks whether another worker has committed it
_COUNT_EVERY_S = 30.0  # between two counts of what other workers did
Item = Prompt | Question | Canary
ReadUnit = Callable[[Unit], Iterator[Item | Reject]]


class Capturing(Protocol):
    """A teacher, as far as filling a cache needs it."""

    def capture(self, prompts: Iterable[Any]) -> Iterator[tuple[int, Targets | SequenceTargets]]:
        """(ordinal, targets of a prompt, or a question's whole row), in any order."""


@dataclass(slots=True, kw_only=True)
class Filled:
    """What this worker added to the cache, with however many engines: what another was first with does not count."""

    num_units: int = 0
    num_targets: int = 0
    num_rejects: int = 0
    seconds: float = 0.0  # capture alone

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the seconds of what happens meanwhile."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - started

    def add(self, commit: Commit) -> None:
        """Counts a unit."""
        self.num_units += 1
        self.num_targets += commit.num_targets.total
        self.num_rejects += commit.num_rejects


@dataclass(slots=True, kw_only=True)
class _OpenUnit:
    """A unit on its way: its sequences in the order of the input, each with its targets once they are back."""

    unit: Unit
    rows: list[SequenceTargets | None] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    num_waiting: int = 0
    read: bool = False  # all input rows have been looked at
    lost: bool = False  # another worker committed it in the meantime

    @property
    def finished(self) -> bool:
        return self.read and not self.num_waiting


class _Stream:
    """What the teacher reads of all units to do, one after the other; remembers which unit and place it came from."""

    def __init__(self, writer: CacheWriter, worker: Worker, read_unit: ReadUnit) -> None:
        self._writer, self._worker, self._read_unit = writer, worker, read_unit
        self.open: list[_OpenUnit] = []
        self.places: dict[int, tuple[_OpenUnit, int, Item]] = {}  # ordinal -> unit, index in it, what was read

    def __iter__(self) -> Iterator[Prompt | Question]:
        ordinal = 0
        for unit in units_to_do(self._writer, self._worker):
            opened = _OpenUnit(unit=unit)
            self.open.append(opened)
            for item in self._read_unit(unit):
                if isinstance(item, Reject):
                    opened.rejects.append(item)
                    continue
                if len(opened.rows) % _LOOK_EVERY == _LOOK_EVERY - 1 and not still_missing(self._writer, [unit]):
                    opened.lost = True
                    break
                self.places[ordinal] = (opened, len(opened.rows), item)
                if not isinstance(item, Canary):
                    opened.rows.append(None)
                opened.num_waiting += 1
                ordinal += 1
                yield item.prompt if isinstance(item, Canary) else item
            opened.read = True

    def take_finished(self) -> list[_OpenUnit]:
        """Units that are complete since the last call; lost ones are forgotten."""
        finished = [opened for opened in self.open if opened.finished and not opened.lost]
        self.open = [opened for opened in self.open if not (opened.finished or opened.lost)]
        return finished


class _Writes:
    """Commits units in a thread of its own, few at a time; a context manager that ends with all of them written."""

    def __init__(self, writer: CacheWriter, filled: Filled) -> None:
        self._writer, self._filled = writer, filled
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()

    def add(self, *finished: _OpenUnit) -> None:
        """Commits finished units soon. Raises what an earlier commit raised."""
        for opened in finished:
            while len(self._pending) >= _PENDING_WRITES:
                self._pending.popleft().result()
            self._pending.append(self._thread.submit(self._commit, opened))

    def check(self) -> None:
        """Raises what a commit raised, so that a full disk stops the teacher at once."""
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def _commit(self, opened: _OpenUnit) -> None:
        if not still_missing(self._writer, [opened.unit]):
            return
        rows = [row for row in opened.rows if row is not None]
        assert len(rows) == len(opened.rows), "a finished unit has all its targets"
        unit, rejects = opened.unit, opened.rejects
        commit = self._writer.commit(unit, rows, rejects=rejects, num_input_rows=unit.num_input_rows)
        if self._writer.is_own(commit):
            self._filled.add(commit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                while self._pending:
                    self._pending.popleft().result()
            else:
                # These units are complete; whatever ended the run, they are worth their seconds.
                wait(self._pending, timeout=_LAST_WRITES_S)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)


def fill(
    engine: Capturing,
    *,
    writer: CacheWriter,
    worker: Worker,
    read_unit: ReadUnit,
    interrupt: Interrupt,
    quiet: bool,
    filled: Filled | None = None,
) -> Filled:
    """Captures and commits missing units until there are none, whoever committed them.

    ``read_unit`` gives the sequences or questions, and the rejects, of a unit's input rows, in order, and canaries,
    which are checked and not stored. An error of the engine, the data or the disk ends the run, as a signal does by
    KeyboardInterrupt: units that are complete by then are committed, open ones are dropped. What is committed is added
    to ``filled``, also when the run ends so.
    """
    filled = filled or Filled()
    stream = _Stream(writer, worker, read_unit)
    progress = _Progress(writer, worker, filled, quiet=quiet)
    with filled.timed(), progress.ticker, _Writes(writer, filled) as writes:
        for ordinal, targets in engine.capture(stream):
            opened, index, item = stream.places.pop(ordinal)
            if isinstance(item, Canary):
                assert isinstance(targets, Targets)
                writes.add(*stream.take_finished())  # whole by earlier answers, whatever this one shows
                item.check(targets, opened.unit)
            else:
                row = _row(item, targets)
                progress.num_targets += row.prompt.num_targets
                if not opened.lost:
                    opened.rows[index] = row
            opened.num_waiting -= 1
            writes.add(*stream.take_finished())
            writes.check()
            interrupt.check()
            progress.show()
        writes.add(*stream.take_finished())  # units without a single sequence
    return filled


def _row(item: Prompt | Question, targets: Targets | SequenceTargets) -> SequenceTargets:
    if isinstance(targets, SequenceTargets):
        return targets
    assert isinstance(item, Prompt), "a question comes back as a whole row"
    return SequenceTargets(prompt=item, targets=targets)


class _Progress:
    """Shows how many of the units that were missing are in, other workers' among them."""

    def __init__(self, writer: CacheWriter, worker: Worker, filled: Filled, *, quiet: bool) -> None:
        self._writer, self._worker, self._filled = writer, worker, filled
        self._num_missing, self._num_before = len(writer.missing_units()), filled.num_units
        self._num_done, self._counted = 0, time.monotonic()
        self._started = time.monotonic()
        self.num_targets = 0  # captured, whether they are committed yet or not
        self.ticker = Ticker("cache-teacher", total=self._num_missing, quiet=quiet)

    def show(self) -> None:
        now = time.monotonic()
        if self._worker.count == 1:
            self._num_done = self._filled.num_units - self._num_before
        elif now - self._counted > _COUNT_EVERY_S:
            self._num_done = self._num_missing - len(self._writer.missing_units())
            self._counted = now
        rate = self.num_targets / (now - self._started)
        rejects = self._filled.num_rejects
        self.ticker.update(self._num_done, tokens=self.num_targets, tokens_per_s=rate, rejects=rejects)


def units_to_do(writer: CacheWriter, worker: Worker) -> Iterator[Unit]:
    """Units to begin, each without a commit when it is given out: the worker's own share, then what others left.

    The share is every ``count``-th unit of the plan, in the plan's order. What is left then, by one look at the cache,
    is shared out anew in the same way from its end, since those who are still there work from the front; and at last
    each takes what the others have not begun of that.
    """
    units, index, count = writer.plan.units, worker.index, worker.count
    for unit in units[index::count]:
        yield from still_missing(writer, [unit])
    own = {unit.unit for unit in units[index::count]}
    left = [unit for unit in reversed(writer.missing_units()) if unit.unit not in own]
    for share in range(index, index + count):
        for unit in left[share % count :: count]:
            yield from still_missing(writer, [unit])


def still_missing(writer: CacheWriter, units: Sequence[Unit]) -> list[Unit]:
    """Those of ``units`` that nobody has committed."""
    if not units:
        return []
    names = generations.current(writer.root)
    return [unit for unit in units if not storage.inside(writer.root, names.commit_name(unit.unit)).exists()]
