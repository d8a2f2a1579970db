"""A cache and a position flow in, the training examples from there on flow out, one list for each optimizer step.

For each domain one window of shards is in memory and the next one is read by a background thread meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distill.cache.reader import CacheReader
from distill.student.batch import Example, example_of, group_of
from distill.student.order import DomainOrder, Window

_Load = Callable[[DomainOrder, Window], list[Example]]


class TrainStream:
    """Examples of a stage in their order, from any position; a context manager that owns the reading thread.

    ``assigned[n]`` says which of ``orders`` supplies sequence n; it is looked at when step by step its turn comes.
    """

    def __init__(
        self, reader: CacheReader, orders: Sequence[DomainOrder], assigned: NDArray[np.uint16], *, max_length: int
    ) -> None:
        self._reader = reader
        self._orders = orders
        self._assigned = assigned
        self._max_length = max_length
        self._commits = {commit.unit: commit for commit in reader.commits}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def steps(self, position: int, batch_size: int) -> Iterator[list[Example]]:
        """The sequences from ``position`` on, ``batch_size`` at a time, up to the end of the stage."""
        taken = np.bincount(self._assigned[:position], minlength=len(self._orders))
        walks = [
            _Walk(order, position=int(count), load=self._load, pool=self._pool)
            for order, count in zip(self._orders, taken, strict=True)
        ]
        for start in range(position, len(self._assigned), batch_size):
            yield [next(walks[domain]) for domain in self._assigned[start : start + batch_size]]

    def _load(self, order: DomainOrder, window: Window) -> list[Example]:
        examples: list[Example] = []
        for unit in window.units:
            rows = self._reader.sequences(self._commits[unit.unit], "train")
            if order.group is not None:
                key, value = order.group
                rows = [row for row in rows if group_of(row.prompt.metadata, key) == value]
            examples += [example_of(row, self._max_length) for row in rows]
        return [examples[index] for index in window.order]


class _Walk:
    """One domain's examples in order; reads the next window while this one is walked."""

    def __init__(self, order: DomainOrder, *, position: int, load: _Load, pool: ThreadPoolExecutor) -> None:
        self._order, self._load, self._pool = order, load, pool
        self._position = position
        self._examples: list[Example] = []
        self._window: Window | None = None
        self._ahead: tuple[Window, Future[list[Example]]] | None = None

    def __next__(self) -> Example:
        if self._window is None or self._position >= self._window.stop:
            self._enter_window()
        assert self._window is not None
        example = self._examples[self._position - self._window.start]
        self._position += 1
        return example

    def _enter_window(self) -> None:
        window, examples = self._ahead or self._submit(self._position)
        self._window, self._examples = window, examples.result()
        self._ahead = self._submit(window.stop)

    def _submit(self, position: int) -> tuple[Window, Future[list[Example]]]:
        window = self._order.window(position)
        return window, self._pool.submit(self._load, self._order, window)
