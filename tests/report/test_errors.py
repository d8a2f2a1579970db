"""Caches and machines that a report cannot be made of.

What it protects: whoever looks at a damaged cache is told which file, and which extra is missing.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache import tensors
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, UsageError
from distill.records import Reject
from distill.report.extras import read_rejects
from distill.report.html import write_report
from distill.report.inspect import inspect
from tests.cache import conftest as cache_fixtures


def test_without_matplotlib_the_extra_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="draws its charts with matplotlib, which is not installed"):
        write_report(cache, tmp_path / "report.html")


def test_rejects_that_are_no_json_are_named_with_their_unit(tmp_path: Path, teacher: Any, plan: Any) -> None:
    writer = cache_fixtures.CacheWriter.open(tmp_path / "cache", plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    unit = plan.units[0]
    reject = Reject(domain=unit.domain, source="general.jsonl:0", reason="no answer")
    rows = cache_fixtures.rows_of(teacher, unit)[1:]
    commit = writer.commit(unit, rows, rejects=[reject], num_input_rows=unit.num_input_rows)
    (tmp_path / "cache" / str(commit.rejects)).write_text("not json\n")
    with pytest.raises(CorruptionError, match=r"unit 00000: .*rejects.* cannot be read: .*Run `distill verify"):
        read_rejects(CacheReader.open(tmp_path / "cache", allow_incomplete=True))


def test_fidelity_positions_that_are_not_all_there_are_refused(cache: Path) -> None:
    path = cache / "fidelity.safetensors"
    arrays, _ = tensors.load(path.read_bytes(), name="fidelity")
    path.write_bytes(tensors.dump({**arrays, "log_z": np.array(arrays["log_z"][1:])}, {}))
    with pytest.raises(CorruptionError, match="does not hold 'log_z' for every position"):
        inspect(cache)


def test_a_shard_without_a_footer_is_named_with_its_unit(tmp_path: Path, teacher: Any, plan_of: Any) -> None:
    """Sizes are told by footers, of units too whose rows are not among those that are read."""
    plan = plan_of(teacher, rows={"general": 4 * 17})
    cache_fixtures.fill(tmp_path / "cache", teacher, plan)
    read = {int(i) for i in np.linspace(0, 16, 16).astype(int)}
    (left,) = set(range(17)) - read
    (shard,) = (tmp_path / "cache" / "shards").glob(f"{left:05}-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CorruptionError, match=rf"unit {left:05}: .* cannot be read: .*Run `distill verify"):
        inspect(tmp_path / "cache")
