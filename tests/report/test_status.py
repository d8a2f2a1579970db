"""status tells how far a cache is from its folder alone, and claims nothing that the folder cannot show."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import DataError
from distill.report.status import StatusReport, render_status, status


def printed(report: StatusReport) -> str:
    file = io.StringIO()
    render_status(report, console=Console(file=file, width=200))
    return file.getvalue()


def at(root: Path, unit: str, seconds: float) -> None:
    """Let the commit of ``unit`` have been made then."""
    os.utime(root / "commits" / f"{unit}.json", (1_800_000_000 + seconds, 1_800_000_000 + seconds))


def test_an_unsealed_cache(tmp_path: Path, filler: Callable[..., Any]) -> None:
    filler(tmp_path, 4)  # 10 general rows in 3 units, 4 of 6 medical ones
    for unit, seconds in (("00000", 30), ("00001", 0), ("00002", 10), ("00003", 50)):
        at(tmp_path, unit, seconds)
    (tmp_path / "shards" / ".00004-0123456789abcdef.parquet.partial").write_bytes(b"half")
    report = status(tmp_path)
    assert (report.num_units, report.num_committed, report.sealed) == (5, 4, False)
    assert (report.num_input_rows, report.num_input_rows_done) == (16, 14)
    assert report.num_unnamed_files == 1
    by_domain = {item.domain: (item.num_units, item.num_rows) for item in report.domains}
    assert by_domain == {"general": (3, 10), "medical": (1, 4)}
    assert report.num_targets == sum(item.num_targets for item in report.domains)
    # All but the earliest commit, 00001 with 4 rows: 10 rows in 50 s, so the last 2 need 10 s.
    assert report.seconds_left == pytest.approx(10.0)
    assert report.tokens_per_s is not None
    assert 0 < report.tokens_per_s * 50 < report.num_targets
    assert report.last_commit == "2027-01-15T08:00:50+00:00"
    text = printed(report)
    for part in ("4 of 5 units", "14 of 16 input rows", "not sealed", "10 s are left", "a worker died: 1", "medical"):
        assert part in text


def test_a_sealed_cache_has_nothing_left(cache: Path) -> None:
    report = status(cache)
    assert report.sealed
    assert report.num_committed == report.num_units == 5
    assert report.seconds_left is None
    assert report.num_unnamed_files == 0
    assert "sealed" in printed(report)


def test_times_that_say_nothing(tmp_path: Path, filler: Callable[..., Any]) -> None:
    filler(tmp_path, 0)
    empty = status(tmp_path)
    assert (empty.tokens_per_s, empty.seconds_left, empty.last_commit) == (None, None, None)
    assert [(d.domain, d.num_planned, d.num_units) for d in empty.domains] == [("general", 3, 0), ("medical", 2, 0)]
    filler(tmp_path, 3)
    for unit in ("00000", "00001", "00002"):
        at(tmp_path, unit, 7)  # as after a copy
    copied = status(tmp_path)
    assert (copied.tokens_per_s, copied.seconds_left) == (None, None)
    assert "tokens/s" not in printed(copied)


def test_units_that_a_repair_asks_for_are_missing(cache: Path) -> None:
    from distill.cache import generations

    assert generations.request(cache, after=1, units={"00001": "damaged"})
    report = status(cache)
    assert (report.sealed, report.num_committed) == (False, 4)


def test_the_command(cache: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["status", str(cache), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["num_committed"] == 5
    assert "5 of 5 units" in CliRunner().invoke(app, ["status", str(cache)]).stdout.replace("\n", " ")
    with pytest.raises(DataError, match="no cache"):
        status(tmp_path / "nothing")
