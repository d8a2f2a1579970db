"""Garbage collection: what no record names goes once it is old, and nothing else ever does.

What it protects: shards of the cache, of outdated generations too, files of writers at work, and a damaged cache, from
which nothing may be deleted.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache import generations
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, UsageError
from distill.report.gc import age_of, collect

DAY = 86400.0


def age(path: Path, days: float, now: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (now - days * DAY, now - days * DAY))
    return path


def contents(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def littered(cache: Path) -> tuple[Path, float, set[str]]:
    """A sealed cache all of whose files are old, with old and young garbage; and the names of the old garbage."""
    now = 1_000_000_000.0
    for path in cache.rglob("*"):
        os.utime(path, (now - 30 * DAY, now - 30 * DAY))
    old = {
        "shards/00001-aaaaaaaaaaaaaaaa.parquet",
        "shards/.00002-bbbbbbbbbbbbbbbb.parquet.0123.partial",
        "rejects/00001-aaaaaaaaaaaaaaaa.jsonl",
        "commits/.00003.json.0123.partial",
        ".plan.json.0123.partial",
    }
    for name in old:
        age(cache / name, 8, now)
    for name in ("shards/00004-cccccccccccccccc.parquet", "commits/.00004.json.0123.partial"):
        age(cache / name, 6, now)
    return cache, now, old


def test_old_files_that_no_record_names_go_and_nothing_else(littered: tuple[Path, float, set[str]]) -> None:
    cache, now, old = littered
    before = contents(cache)
    shown = collect(cache, older_than_s=7 * DAY, delete=False, now=now)
    assert {item.name for item in shown.garbage} == old
    assert (shown.num_younger, shown.deleted) == (2, False)
    assert contents(cache) == before
    assert {item.name for item in collect(cache, older_than_s=7 * DAY, delete=True, now=now).garbage} == old
    assert contents(cache) == before - old
    assert collect(cache, older_than_s=7 * DAY, delete=True, now=now).garbage == ()
    assert CacheReader.open(cache).num_rows() == 16


def test_shards_of_outdated_records_stay(cache: Path, filler: Callable[[Path, int | None], Any]) -> None:
    assert generations.request(cache, after=1, units={"00001": "made up"})
    before = contents(cache)
    assert collect(cache, older_than_s=DAY, delete=True, now=4e9).garbage == ()
    assert contents(cache) == before
    filler(cache, 1)
    assert len(CacheReader.open(cache).commits) == 5


def test_a_unit_that_is_being_written_is_left_alone(tmp_path: Path, filler: Callable[[Path, int | None], Any]) -> None:
    filler(tmp_path, 2)
    orphan = next(tmp_path.glob("shards/*"))
    shutil.copy(orphan, tmp_path / "shards" / "00004-dddddddddddddddd.parquet")
    report = collect(tmp_path, older_than_s=3600, delete=True)
    assert (report.garbage, report.num_younger) == ((), 1)


def test_nothing_is_deleted_from_a_damaged_cache(littered: tuple[Path, float, set[str]]) -> None:
    cache, now, _ = littered
    record = cache / "commits" / "00002.json"
    record.write_bytes(record.read_bytes().replace(b"general", b"genera1"))
    before = contents(cache)
    with pytest.raises(CorruptionError, match=r"00002\.json is damaged"):
        collect(cache, older_than_s=7 * DAY, delete=True, now=now)
    assert contents(cache) == before
    with pytest.raises(DataError, match="no cache at"):
        collect(cache / "shards", older_than_s=7 * DAY, delete=True, now=now)


@pytest.mark.parametrize(("text", "seconds"), [("1h", 3600), ("36h", 129600), ("7d", 7 * DAY), ("2w", 14 * DAY)])
def test_ages(text: str, seconds: float) -> None:
    assert age_of(text) == seconds


@pytest.mark.parametrize("text", ["0d", "7", "d", "1.5d", "-1d", "30m", ""])
def test_wrong_ages_are_explained(text: str) -> None:
    with pytest.raises(UsageError, match="12h, 7d or 2w"):
        age_of(text)


def test_the_command_shows_first_and_deletes_when_told(cache: Path) -> None:
    orphan = age(cache / "shards" / "00001-aaaaaaaaaaaaaaaa.parquet", 365 * 40, 2e9)
    shown = CliRunner().invoke(app, ["gc", str(cache)])
    assert shown.exit_code == 0
    assert "--delete deletes them" in shown.output
    assert orphan.exists()
    deleted = json.loads(CliRunner().invoke(app, ["gc", str(cache), "--delete", "--json"]).output)
    assert [item["name"] for item in deleted["garbage"]] == ["shards/00001-aaaaaaaaaaaaaaaa.parquet"]
    assert not orphan.exists()
