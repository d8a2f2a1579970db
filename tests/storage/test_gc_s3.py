"""Garbage collection in a real bucket: orphaned objects and uploads that were never ended.

What it protects: only what is old by the store's own times goes, and uploads in parts, which no listing shows and
every store charges for, are found.
"""

import time
from pathlib import Path
from typing import Any

from distill.cache.bucket import Bucket
from distill.cache.reader import CacheReader
from distill.report.gc import collect
from tests.cache import conftest as cache_fixtures

WEEK = 7 * 86400.0


def test_orphans_and_open_uploads_go_when_they_are_old(url: str, teacher: Any, plan: Any, tmp_path: Path) -> None:
    cache_fixtures.fill(url, teacher, plan)  # type: ignore[arg-type]
    bucket = Bucket(url.removeprefix("s3://"))
    content = tmp_path / "orphan"
    content.write_bytes(b"orphan")
    bucket.upload("shards/00001-aaaaaaaaaaaaaaaa.parquet", content)
    name, _, key = url.removeprefix("s3://").partition("/")
    for prefix in (key, "elsewhere"):
        where = {"Bucket": name, "Key": f"{prefix}/shards/00002-bbbbbbbbbbbbbbbb.parquet"}
        bucket._store().call_s3("create_multipart_upload", **where)
    young = collect(url, older_than_s=WEEK, delete=True)
    assert (young.garbage, young.num_younger) == ((), 2)
    old = collect(url, older_than_s=WEEK, delete=True, now=time.time() + 2 * WEEK)
    assert sorted((item.kind, item.name) for item in old.garbage) == [
        ("shard", "shards/00001-aaaaaaaaaaaaaaaa.parquet"),
        ("upload", "shards/00002-bbbbbbbbbbbbbbbb.parquet"),
    ]
    assert collect(url, older_than_s=WEEK, delete=True, now=time.time() + 2 * WEEK).garbage == ()
    assert CacheReader.open(url).num_rows() == 16
    reader = CacheReader.open(url)
    assert sum(reader.read_unit(commit).num_rows for commit in reader.commits) == 16
