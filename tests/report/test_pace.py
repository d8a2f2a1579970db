"""Protects the report's throughput: right where files still tell when they were written, absent where they do not."""

import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from distill.cache.reader import CacheReader
from distill.report.cache_page import cache_page
from distill.report.pace import pace_of

TITLE = "Throughput while the cache was made"


def stamped(root: Path, *, begin: float = 1000.0, shard_delay: float = -1.0) -> CacheReader:
    """The cache as if it had committed a unit every ten seconds, each shard so long after its record."""
    reader = CacheReader.open(root)
    for number, commit in enumerate(reader.commits):
        for name, delay in ((f"commits/{commit.unit}.json", 0.0), (commit.shard, shard_delay)):
            os.utime(root / name, (begin, begin + 10 * number + delay))
    return reader


def test_targets_over_time_are_those_of_the_commits(cache: Path) -> None:
    reader = stamped(cache)
    pace = pace_of(reader)
    assert pace is not None
    later = sum(commit.num_targets.total for commit in reader.commits[1:])
    assert pace.num_targets == later
    assert pace.seconds == 10 * (len(reader.commits) - 1)
    width = pace.seconds / len(pace.rates)
    assert float(pace.rates.sum()) * width == pytest.approx(later)
    assert pace.middles == pytest.approx(width * (np.arange(len(pace.rates)) + 0.5))
    assert TITLE in [chart.title for chart in cache_page(cache).charts]


def test_a_copy_whose_times_are_its_own_tells_no_pace(cache: Path) -> None:
    """A copier takes commits/ before shards/."""
    assert pace_of(stamped(cache, shard_delay=100.0)) is None
    assert TITLE not in [chart.title for chart in cache_page(cache).charts]


def test_records_older_than_the_plan_tell_no_pace(cache: Path) -> None:
    reader = stamped(cache)
    recorded = reader.recorded.model_copy(update={"created": datetime.fromtimestamp(1060, UTC).isoformat()})
    reader.recorded = recorded
    assert pace_of(reader) is None
    reader.recorded = recorded.model_copy(update={"created": datetime.fromtimestamp(900, UTC).isoformat()})
    assert pace_of(reader) is not None


def test_too_few_units_and_missing_records_tell_no_pace(cache: Path) -> None:
    reader = stamped(cache)
    commits = reader.commits
    reader.commits = commits[:2]
    assert pace_of(reader) is None
    reader.commits = commits
    (cache / "commits" / f"{commits[0].unit}.json").unlink()
    assert pace_of(reader) is None
