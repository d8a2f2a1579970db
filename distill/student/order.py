"""Units and their row counts flow in, the row at any position of a domain's walk flows out.

The order is a pure function of (units and row counts, seed, domain, epoch, position), the same on every machine and
with every version of every library: units are permuted, then rows are permuted inside each window of units. Any
position is found without walking to it.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRows:
    """A unit and the number of its train rows."""

    unit: str
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Rows that are shuffled together: the positions ``start`` to ``stop``, the latter not included."""

    start: int
    stop: int
    units: tuple[UnitRows, ...]
    order: NDArray[np.int64]  # [stop - start], indices into the units' rows one after the other


class DomainOrder:
    """The endless walk over one domain's train rows, each epoch in an order of its own.

    ``group`` is a metadata key and the value that its rows have, where the walk is over those rows alone.
    """

    def __init__(
        self,
        units: Sequence[UnitRows],
        *,
        domain: str,
        seed: int,
        shard_window: int,
        group: tuple[str, str] | None = None,
    ) -> None:
        filled = [unit for unit in units if unit.num_rows > 0]
        self._units = sorted(filled, key=lambda unit: unit.unit)
        self._walk = domain if group is None else json.dumps([domain, *group])
        self._seed, self._shard_window = seed, shard_window
        self.group = group
        self.num_rows = sum(unit.num_rows for unit in self._units)
        self._known: tuple[int, list[UnitRows], list[int]] | None = None

    def window(self, position: int) -> Window:
        """The window that holds ``position``, counted from 0 over all epochs."""
        epoch, offset = divmod(position, self.num_rows)
        permuted, stops = self._epoch(epoch)
        number = bisect.bisect_right(stops, offset) // self._shard_window
        first, last = number * self._shard_window, min((number + 1) * self._shard_window, len(permuted)) - 1
        start, stop = (stops[first - 1] if first else 0), stops[last]
        return Window(
            start=epoch * self.num_rows + start,
            stop=epoch * self.num_rows + stop,
            units=tuple(permuted[first : last + 1]),
            order=permutation(stop - start, self._seed, self._walk, epoch, number),
        )

    def _epoch(self, epoch: int) -> tuple[list[UnitRows], list[int]]:
        """The epoch's units in order, and where the rows of each stop. Kept: an epoch has a quarter as many windows."""
        if self._known is None or self._known[0] != epoch:
            permuted = [self._units[i] for i in permutation(len(self._units), self._seed, self._walk, epoch, "units")]
            self._known = epoch, permuted, list(itertools.accumulate(unit.num_rows for unit in permuted))
        return self._known[1:]


def permutation(num: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of ``range(num)`` that depends on ``key`` alone.

    Row i is sorted by splitmix64(key + i) (Steele, Lea and Flood 2014). Random generators of libraries promise no
    stable stream between versions, and a resumed run must see the order that it began with.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    mixed = np.arange(1, num + 1, dtype=np.uint64) * _GOLDEN + np.frombuffer(digest, "<u8")
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")
