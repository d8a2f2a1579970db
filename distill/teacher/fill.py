"""Missing units and a loaded teacher flow in, commits flow out.

The teacher reads all units as one stream, so it never idles between two of them. A unit is written, in a thread of
its own, when the last of its sequences has come back; memory holds the units that are open, never the whole job.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from distill.cache.plan import Unit
from distill.cache.writer import CacheWriter
from distill.data.prompts import PromptMaker, prompts_of
from distill.data.sources import Source
from distill.progress import Ticker
from distill.records import Prompt, Reject, SequenceTargets
from distill.teacher.engine import Engine

_PENDING_WRITES = 2  # units that may wait for the disk before the teacher does


@dataclass(slots=True, kw_only=True)
class _OpenUnit:
    """A unit on its way: its sequences in the order of the input, each with its targets once they are back."""

    unit: Unit
    rows: list[SequenceTargets | None] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    num_waiting: int = 0
    read: bool = False  # all input rows have been looked at

    @property
    def finished(self) -> bool:
        return self.read and not self.num_waiting


class _Stream:
    """Prompts of all missing units, one after the other; remembers which unit and place each came from."""

    def __init__(self, missing: Sequence[Unit], sources: Sequence[Source], maker: PromptMaker) -> None:
        self._missing, self._sources, self._maker = missing, sources, maker
        self.open: list[_OpenUnit] = []
        self.places: dict[int, tuple[_OpenUnit, int, Prompt]] = {}  # ordinal -> unit, index in it, prompt

    def __iter__(self) -> Iterator[Prompt]:
        ordinal = 0
        for unit in self._missing:
            opened, source = _OpenUnit(unit=unit), self._sources[unit.source]
            self.open.append(opened)
            for item in prompts_of(source, start=unit.start, stop=unit.stop, maker=self._maker):
                if isinstance(item, Reject):
                    opened.rejects.append(item)
                    continue
                self.places[ordinal] = (opened, len(opened.rows), item)
                opened.rows.append(None)
                opened.num_waiting += 1
                ordinal += 1
                yield item
            opened.read = True

    def take_finished(self) -> list[_OpenUnit]:
        """Units that are complete since the last call."""
        finished = [opened for opened in self.open if opened.finished]
        self.open = [opened for opened in self.open if not opened.finished]
        return finished


def fill(
    engine: Engine,
    missing: Sequence[Unit],
    *,
    writer: CacheWriter,
    sources: Sequence[Source],
    maker: PromptMaker,
    quiet: bool,
) -> int:
    """Captures and commits the missing units; returns the number of targets.

    An error of the engine, the data or the disk ends the run; what is committed by then stays.
    """
    stream = _Stream(missing, sources, maker)
    num_targets = num_written = num_rejects = 0
    started = time.monotonic()
    writes: list[Future[Any]] = []
    with Ticker("cache-teacher", total=len(missing), quiet=quiet) as ticker, ThreadPoolExecutor(1) as writing:

        def write_finished() -> None:
            nonlocal num_written, num_rejects
            for opened in stream.take_finished():
                while len(writes) >= _PENDING_WRITES:
                    writes.pop(0).result()
                writes.append(writing.submit(_commit, writer, opened))
                num_written += 1
                num_rejects += len(opened.rejects)

        for ordinal, targets in engine.capture(stream):
            opened, index, prompt = stream.places.pop(ordinal)
            opened.rows[index] = SequenceTargets(prompt=prompt, targets=targets)
            opened.num_waiting -= 1
            num_targets += prompt.num_targets
            write_finished()
            rate = num_targets / (time.monotonic() - started)
            ticker.update(num_written, tokens=num_targets, tokens_per_s=rate, rejects=num_rejects)
        write_finished()
        for write in writes:
            write.result()
    return num_targets


def _commit(writer: CacheWriter, opened: _OpenUnit) -> None:
    rows = [row for row in opened.rows if row is not None]
    assert len(rows) == len(opened.rows), "a finished unit has all its targets"
    writer.commit(opened.unit, rows, rejects=opened.rejects, num_input_rows=opened.unit.num_input_rows)
