"""A cache's commit records flow in, how fast its targets came flows out, where files still tell.

Records hold no clock, so that the same rows make the same bytes. What is left are the modification times of their
files, which a copy may have made anew. They count only where they can be those of the run: no shard is younger than the
record that names it, as a writer puts the record last, and no record is older than the plan.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distill.cache import generations, storage
from distill.cache.reader import CacheReader

_MOST_BINS = 40
_FEWEST = 3  # commits: of fewer there is no pace to speak of
_SLACK_S = 2.0  # file systems and clocks of several machines round and differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Committed targets in equal spans of time after the first commit."""

    middles: NDArray[np.float64]  # [bins], seconds after the first commit
    rates: NDArray[np.float64]  # [bins], targets in a second
    num_targets: int  # after the first commit
    seconds: float


def pace_of(reader: CacheReader) -> Pace | None:
    """The pace of a cache's making; None where there is no telling: a bucket, a copy, too few units or a repair."""
    times = _times(reader)
    if times is None or len(times) < _FEWEST:
        return None
    order = np.argsort(times)
    seconds = times[order] - times[order[0]]
    targets = np.array([commit.num_targets.total for commit in reader.commits])[order]
    if seconds[-1] <= 0:
        return None
    num_bins = int(np.clip(len(times) // 2, 1, _MOST_BINS))
    counts, edges = np.histogram(seconds[1:], num_bins, range=(0.0, seconds[-1]), weights=targets[1:])
    width = edges[1] - edges[0]
    return Pace(
        middles=edges[:-1] + width / 2,
        rates=counts / width,
        num_targets=int(targets[1:].sum()),
        seconds=float(seconds[-1]),
    )


def _times(reader: CacheReader) -> NDArray[np.float64] | None:
    """Seconds at which each unit was committed, where the files' times can be true."""
    root = reader.root
    if not isinstance(root, Path) or any(commit.generation > 1 for commit in reader.commits):
        return None
    current = generations.current(root)
    try:
        times = [_time(root, current.commit_name(commit.unit)) for commit in reader.commits]
        shards = [_time(root, commit.shard) for commit in reader.commits]
    except FileNotFoundError:
        return None
    begun = _begun(reader)
    untrue = any(shard > time + _SLACK_S for shard, time in zip(shards, times, strict=True))
    if untrue or (begun is not None and min(times, default=begun) < begun - _SLACK_S):
        return None
    return np.array(times)


def _time(root: Path, name: str) -> float:
    return storage.inside(root, name).stat().st_mtime


def _begun(reader: CacheReader) -> float | None:
    try:
        return datetime.fromisoformat(reader.recorded.created).timestamp()
    except ValueError:  # caches of before, and of tests, do not say
        return None
