"""A cache's missing units and a loaded teacher flow in, commits flow out.

The teacher reads all units as one stream, so it never idles between two of them. A unit is written, in a thread of
its own, when the last of its sequences has come back; memory holds the units that are open, never the whole job.

Several workers may fill one cache. Each looks at a unit right before it begins it: first at those of its own share,
then at what is left of the others' shares. A unit belongs to whoever commits it first, so a slow or dead worker blocks
nobody.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from distill.cache import generations, storage
from distill.cache.plan import Unit
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What this worker added to the cache: what it captured in vain, because another was first, does not count."""

    num_units: int
    num_targets: int
    seconds: float  # capture alone


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

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self.num_units = self.num_targets = self.num_rejects = 0

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
        self._writer.commit(opened.unit, rows, rejects=opened.rejects, num_input_rows=opened.unit.num_input_rows)
        self.num_units += 1
        self.num_targets += sum(row.prompt.num_targets for row in rows)
        self.num_rejects += len(opened.rejects)

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
    engine: Capturing, *, writer: CacheWriter, worker: Worker, read_unit: ReadUnit, interrupt: Interrupt, quiet: bool
) -> Filled:
    """Captures and commits missing units until there are none, whoever committed them.

    ``read_unit`` gives the sequences or questions, and the rejects, of a unit's input rows, in order, and canaries,
    which are checked and not stored. An error of the engine, the data or the disk ends the run, as a signal does by
    KeyboardInterrupt: units that are complete by then are committed, open ones are dropped.
    """
    stream = _Stream(writer, worker, read_unit)
    num_targets = 0
    started = time.monotonic()
    progress = _Progress(writer, worker, quiet=quiet)
    with progress.ticker, _Writes(writer) as writes:
        for ordinal, targets in engine.capture(stream):
            opened, index, item = stream.places.pop(ordinal)
            if isinstance(item, Canary):
                assert isinstance(targets, Targets)
                writes.add(*stream.take_finished())  # whole by earlier answers, whatever this one shows
                item.check(targets, opened.unit)
            else:
                row = _row(item, targets)
                num_targets += row.prompt.num_targets
                if not opened.lost:
                    opened.rows[index] = row
            opened.num_waiting -= 1
            writes.add(*stream.take_finished())
            writes.check()
            interrupt.check()
            rate = num_targets / (time.monotonic() - started)
            progress.show(writes, num_targets=num_targets, rate=rate)
        writes.add(*stream.take_finished())  # units without a single sequence
    seconds = time.monotonic() - started
    return Filled(num_units=writes.num_units, num_targets=writes.num_targets, seconds=seconds)


def _row(item: Prompt | Question, targets: Targets | SequenceTargets) -> SequenceTargets:
    if isinstance(targets, SequenceTargets):
        return targets
    assert isinstance(item, Prompt), "a question comes back as a whole row"
    return SequenceTargets(prompt=item, targets=targets)


class _Progress:
    """Shows how many of the units that were missing are in, other workers' among them."""

    def __init__(self, writer: CacheWriter, worker: Worker, *, quiet: bool) -> None:
        self._writer, self._worker = writer, worker
        self._num_missing = len(writer.missing_units())
        self._num_done, self._counted = 0, time.monotonic()
        self.ticker = Ticker("cache-teacher", total=self._num_missing, quiet=quiet)

    def show(self, writes: _Writes, *, num_targets: int, rate: float) -> None:
        if self._worker.count == 1:
            self._num_done = writes.num_units
        elif time.monotonic() - self._counted > _COUNT_EVERY_S:
            self._num_done = self._num_missing - len(self._writer.missing_units())
            self._counted = time.monotonic()
        self.ticker.update(self._num_done, tokens=num_targets, tokens_per_s=rate, rejects=writes.num_rejects)


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
