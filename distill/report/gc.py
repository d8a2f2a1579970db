"""A cache flows in, the files in it that nobody needs any more flow out, and go where that is asked for.

Killed and late writers leave shards and rejects that no commit record names, half-written files, and in a bucket
uploads that were never ended. A writer at work has such files too, for as long as it takes to write, read back and
commit a unit: only age tells them apart, so what is younger than a given age is left alone.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from distill.cache import document, generations, storage
from distill.cache.bucket import Bucket
from distill.cache.plan import Commit, Plan
from distill.errors import DataError, UsageError

LEAST_AGE_S = 3600.0  # far longer than a writer takes from a shard's first byte to its record
_FOLDERS = ("", "commits", "repairs", "teacher")  # where only half-written files are looked for
_FIX = "Run `distill verify` on the cache, and mend it first; nothing was deleted."
_UNITS = {"h": 3600.0, "d": 86400.0, "w": 604800.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """A file, or an upload that was never ended, that no commit record names."""

    name: str
    kind: Literal["shard", "rejects", "temporary", "upload"]
    num_bytes: int
    age_s: float
    upload_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    """What is garbage, the oldest first, and whether it was deleted; ``num_younger`` files may be at work."""

    path: str
    older_than_s: float
    garbage: tuple[Garbage, ...]
    num_younger: int
    deleted: bool

    @property
    def num_bytes(self) -> int:
        """Size of all garbage; uploads tell none."""
        return sum(item.num_bytes for item in self.garbage)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "num_bytes": self.num_bytes}


def age_of(text: str) -> float:
    """Seconds of an age such as 12h, 7d or 2w. Raises UsageError for others and for less than an hour."""
    match = re.fullmatch(r"(\d+)([hdw])", text)
    age = int(match[1]) * _UNITS[match[2]] if match else 0.0
    if age < LEAST_AGE_S:
        raise UsageError(
            f"--older-than takes hours, days or weeks, for example 12h, 7d or 2w, and at least 1h, got '{text}': a "
            "writer at work has files that no record names yet."
        )
    return age


def collect(path: str | Path, *, older_than_s: float, delete: bool, now: float | None = None) -> GcReport:
    """What no commit record of any generation names and is older than ``older_than_s``; deleted if ``delete``.

    Ages are by the store's times of modification, against ``now`` (this machine's clock). Raises DataError when there
    is no cache, CorruptionError when one of its records is damaged: what that names cannot be known.
    """
    root, now = storage.root_of(path), time.time() if now is None else now
    # Listed before the records are read: what is committed in between was listed, and is named by then.
    listed = list(_listed(root, now))
    named = _named(root)
    unnamed = [item for item in listed if item.name not in named]
    garbage = sorted((item for item in unnamed if item.age_s > older_than_s), key=lambda item: -item.age_s)
    for item in garbage if delete else ():
        if item.upload_id is not None and isinstance(root, Bucket):
            root.abort_upload(item.name, item.upload_id)
        else:
            storage.delete(root, item.name)
    return GcReport(
        path=str(root),
        older_than_s=older_than_s,
        garbage=tuple(garbage),
        num_younger=len(unnamed) - len(garbage),
        deleted=delete,
    )


def render_gc(report: GcReport) -> None:
    """Print what is garbage and what became of it."""
    for item in report.garbage:
        print(f"{item.age_s / 86400:8.1f} days  {item.num_bytes:>14,} bytes  {item.kind:9}  {item.name}")
    what = f"{len(report.garbage)} files that no record names, {report.num_bytes / 1e6:,.1f} MB"
    done = "deleted" if report.deleted else "found; --delete deletes them"
    younger = f"; {report.num_younger} younger ones stay" if report.num_younger else ""
    print(f"{report.path}: {what}, {done}{younger}.")


def _named(root: storage.Root) -> set[str]:
    """Every shard and rejects file that a record names. Records are asked for; the listing adds outdated ones."""
    try:
        plan = document.load(Plan, root, "plan.json", fix=_FIX)
    except FileNotFoundError:
        raise DataError(f"no cache at {root}: it has no plan.json. Correct the path.") from None
    counting = generations.current(root)
    names = {counting.commit_name(unit.unit) for unit in plan.units}
    names |= {name for name in storage.names(root, "commits") if storage.TEMPORARY not in name}
    named: set[str] = set()
    for name in names:
        try:
            commit = document.load(Commit, root, name, fix=_FIX)
        except FileNotFoundError:
            continue
        named |= {commit.shard, commit.rejects or commit.shard}
    return named


def _listed(root: storage.Root, now: float) -> Iterator[Garbage]:
    """All shards, rejects files, half-written files and uploads; which of them are named is seen later."""
    if isinstance(root, Bucket):
        for folder in ("shards", "rejects"):
            for name, (num_bytes, modified) in root.modified(folder).items():
                yield Garbage(name=name, kind=_kind(name), num_bytes=num_bytes, age_s=now - modified)
        for name, upload_id, begun in root.uploads():
            yield Garbage(name=name, kind="upload", num_bytes=0, age_s=now - begun, upload_id=upload_id)
        return
    for folder in (*_FOLDERS, "shards", "rejects"):
        if not (root / folder).is_dir():
            continue
        for path in (root / folder).iterdir():
            name, about = path.relative_to(root).as_posix(), path.lstat()
            if path.is_file() and (folder not in _FOLDERS or _kind(name) == "temporary"):
                yield Garbage(name=name, kind=_kind(name), num_bytes=about.st_size, age_s=now - about.st_mtime)


def _kind(name: str) -> Literal["shard", "rejects", "temporary"]:
    if name.rpartition("/")[2].startswith(".") and name.endswith(storage.TEMPORARY):
        return "temporary"
    return "rejects" if name.startswith("rejects/") else "shard"
