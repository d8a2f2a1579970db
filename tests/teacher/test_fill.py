"""Filling a cache: who takes which unit and when, what is written, and what stops the run.

The teacher is the random one of the cache's tests, which answers at once and always the same: what is tested is the
order of units, the bookkeeping and the ends of a run.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.cache.plan import Unit
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import RetryError, StorageError
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.records import Prompt, Reject, Targets
from distill.teacher.fill import Filled, fill, still_missing, units_to_do
from tests.cache import conftest as fixtures

NUM_UNITS = 8
Hook = Callable[[int], None]


@pytest.fixture(scope="module")
def teacher() -> Any:
    return fixtures.make_teacher()


@pytest.fixture
def writer(tmp_path: Path, teacher: Any) -> CacheWriter:
    plan = fixtures.plan_of(teacher, rows={"general": 4 * NUM_UNITS})
    writer = CacheWriter.open(tmp_path / "cache", plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    return writer


class RandomEngine:
    """Answers ``window`` prompts at a time, last one first; ``hook`` hears the number of answers before each."""

    def __init__(self, teacher: Any, *, window: int = 3, hook: Hook = lambda _: None) -> None:
        self._teacher, self._window, self._hook = teacher, window, hook

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        source, answered = enumerate(prompts), itertools.count()
        while batch := list(itertools.islice(source, self._window)):
            for ordinal, prompt in reversed(batch):
                self._hook(next(answered))
                yield ordinal, self._teacher.sequence(seed_of(prompt), length=len(prompt.input_ids)).targets


def seed_of(prompt: Prompt) -> int:
    return int(prompt.sequence_id.removeprefix("sequence-"))


def run(writer: CacheWriter, teacher: Any, *, worker: Worker | None = None, **more: Any) -> Filled:
    def read_unit(unit: Unit) -> Iterator[Prompt | Reject]:
        yield from (row.prompt for row in fixtures.rows_of(teacher, unit))

    with Interrupt(at_once=True) as interrupt:
        return fill(
            RandomEngine(teacher, hook=more.pop("hook", lambda _: None)),  # type: ignore[arg-type]
            writer=writer,
            worker=worker or Worker(),
            read_unit=more.pop("read_unit", read_unit),
            interrupt=interrupt,
            quiet=True,
        )


def commit(writer: CacheWriter, teacher: Any, unit: Unit) -> None:
    writer.commit(unit, fixtures.rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)


def numbers(units: Iterable[Unit]) -> list[int]:
    return [int(unit.unit) for unit in units]


def test_one_worker_takes_all_units_in_order(writer: CacheWriter) -> None:
    assert numbers(units_to_do(writer, Worker())) == list(range(NUM_UNITS))


def test_a_worker_takes_its_own_share_then_the_end_of_the_others(writer: CacheWriter) -> None:
    first = numbers(units_to_do(writer, Worker(index=0, count=3)))
    assert first[:3] == [0, 3, 6]
    assert first[3] == 7
    assert sorted(first) == list(range(NUM_UNITS))
    second = numbers(units_to_do(writer, Worker(index=1, count=3)))
    assert second[:3] == [1, 4, 7]
    assert second[3] == 5  # not the unit that worker 0 helps with first
    assert sorted(second) == list(range(NUM_UNITS))


def test_a_unit_is_looked_at_right_before_it_is_begun(writer: CacheWriter, teacher: Any) -> None:
    units = writer.plan.units
    todo = units_to_do(writer, Worker(index=0, count=2))
    assert next(todo).unit == "00000"
    for number in (2, 4, 7, 3):
        commit(writer, teacher, units[number])
    assert numbers(itertools.islice(todo, 2)) == [6, 5]
    commit(writer, teacher, units[1])
    assert numbers(todo) == []
    assert numbers(still_missing(writer, units)) == [0, 5, 6]


def test_a_worker_whose_share_is_empty_helps(writer: CacheWriter) -> None:
    assert len(set(numbers(units_to_do(writer, Worker(index=30, count=40))))) == NUM_UNITS


def test_every_worker_alone_finishes_the_cache(writer: CacheWriter, teacher: Any) -> None:
    filled = run(writer, teacher, worker=Worker(index=1, count=3))
    assert filled.num_units == NUM_UNITS
    assert writer.seal() is not None
    found = CacheReader.open(writer.root)
    assert filled.num_targets == sum(commit.num_targets.total for commit in found.commits)
    expected = [row for unit in writer.plan.units for row in fixtures.rows_of(teacher, unit)]
    sources = [
        row.prompt.source
        for item in found.commits
        for split in ("train", "eval")
        for row in found.sequences(item, split)
    ]
    assert sorted(sources) == sorted(row.prompt.source for row in expected)


def test_what_others_commit_meanwhile_is_neither_begun_nor_counted(writer: CacheWriter, teacher: Any) -> None:
    units = writer.plan.units

    def hook(answered: int) -> None:
        if answered == 0:  # the first unit is open, and others finish everything but the last
            for unit in units[:-1]:
                commit(writer, teacher, unit)

    assert run(writer, teacher, hook=hook).num_units == 1
    assert len(list((writer.root / "shards").iterdir())) == NUM_UNITS


def test_a_long_unit_is_dropped_once_another_worker_has_it(tmp_path: Path, teacher: Any) -> None:
    plan = fixtures.plan_of(teacher, rows={"general": 400}, unit_rows=200)
    writer = CacheWriter.open(tmp_path / "long", plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    answers = []

    def hook(answered: int) -> None:
        answers.append(answered)
        if answered == 0:
            commit(writer, teacher, writer.plan.units[0])

    assert run(writer, teacher, hook=hook).num_units == 1
    assert len(answers) == 63 + 200


def test_rows_that_are_all_rejects_make_units_too(writer: CacheWriter, teacher: Any) -> None:
    def read_unit(unit: Unit) -> Iterator[Prompt | Reject]:
        for number in range(unit.num_input_rows):
            yield Reject(domain=unit.domain, source=f"{unit.unit}:{number}", reason="empty")

    filled = run(writer, teacher, read_unit=read_unit)
    assert (filled.num_units, filled.num_targets) == (NUM_UNITS, 0)
    manifest = writer.seal()
    assert manifest is not None
    assert manifest.totals.num_rejects == 4 * NUM_UNITS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_and_complete_units_stay(writer: CacheWriter, teacher: Any, number: int) -> None:
    def hook(answered: int) -> None:
        if answered == 13:  # three units are whole
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(writer, teacher, hook=hook)
    assert signal.getsignal(number) is before
    assert NUM_UNITS - len(writer.missing_units()) == 3
    assert run(writer, teacher).num_units == NUM_UNITS - 3
    assert writer.seal() is not None


def test_a_signal_that_a_callback_swallows_ends_the_run_at_the_next_answer(writer: CacheWriter, teacher: Any) -> None:
    def hook(answered: int) -> None:
        if answered == 13:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert answered < 15

    with pytest.raises(KeyboardInterrupt):
        run(writer, teacher, hook=hook)


def test_a_disk_that_refuses_ends_the_run(writer: CacheWriter, teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()

    def full(*_: object, **__: object) -> None:
        try:
            raise StorageError("the disk is full")
        finally:
            refused.set()

    def hook(answered: int) -> None:
        if answered == 6:  # the first unit has been given to the writer
            assert refused.wait(60)
        assert answered < 4 * NUM_UNITS - 1, "the teacher went on for nothing"

    monkeypatch.setattr(CacheWriter, "commit", full)
    with pytest.raises(StorageError, match="disk is full"):
        run(writer, teacher, hook=hook)
    monkeypatch.undo()
    assert run(writer, teacher).num_units == NUM_UNITS


def test_units_that_are_whole_survive_an_engine_that_dies(writer: CacheWriter, teacher: Any) -> None:
    def hook(answered: int) -> None:
        if answered == 10:
            raise RetryError("the engine died")

    with pytest.raises(RetryError):
        run(writer, teacher, hook=hook)
    assert NUM_UNITS - len(writer.missing_units()) == 2
