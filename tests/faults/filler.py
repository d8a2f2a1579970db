"""A plan of small units and a made-up teacher flow in, a filled cache flows out, by one of two kinds of writer.

``fill_cache`` is the program's own way: its filling loop, its ``CacheWriter``, a seal at the end. ``fill_naively`` is
the control: shards are written straight to their final names, and a listing of the folder tells what is done. Both are
meant to be run in forks of a process that has imported everything, so that a kill and a restart cost milliseconds.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill.cache import storage
from distill.cache.codec import decode, encode
from distill.cache.plan import Plan, Unit
from distill.cache.reader import CacheReader
from distill.cache.schema import Layout, parquet_options, row_schema
from distill.cache.shard import open_shard
from distill.cache.writer import CacheWriter
from distill.interrupt import Interrupt
from distill.launch.worker import Worker
from distill.records import Prompt, Reject, SequenceTargets, Targets
from distill.teacher.fill import fill
from tests.cache.conftest import TinyTeacher, make_teacher, plan_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A cache to fill. A row depends on its place alone; every seventh is a reject, every fourth for evaluation."""

    teacher: TinyTeacher
    plan: Plan

    @staticmethod
    def make(*, num_rows: int) -> "Job":
        """``num_rows`` input rows of two domains, in units of four."""
        teacher = make_teacher()
        rows = {"general": num_rows // 2, "medical": num_rows - num_rows // 2}
        return Job(teacher=teacher, plan=plan_of(teacher, rows=rows))

    @property
    def layout(self) -> Layout:
        """Shapes of a row's lists."""
        assert self.teacher.projection is not None
        return Layout.of(self.plan.identity, self.teacher.projection.widths)

    def row(self, unit: Unit, number: int) -> SequenceTargets:
        """The sequence of an input row, with what the teacher leaves for it."""
        split = "eval" if number % 4 == 3 else "train"
        seed = 1000 * unit.source + number
        return self.teacher.sequence(
            seed, length=6 + number % 5, domain=unit.domain, split=split, source=_source(unit, number)
        )

    def read_unit(self, unit: Unit) -> Iterator[Prompt | Reject]:
        """What the input rows of a unit become, in order."""
        for number in range(unit.start, unit.stop):
            if number % 7 == 5:
                yield Reject(domain=unit.domain, source=_source(unit, number), reason="made to be rejected")
            else:
                yield self.row(unit, number).prompt

    def truth(self, *, rejects: bool) -> dict[str, bytes]:
        """Source of each row that must be found, and of each reject if asked for -> fingerprint of its content."""
        found = {}
        for unit in self.plan.units:
            for number in range(unit.start, unit.stop):
                if number % 7 != 5:
                    table = encode([self.row(unit, number)], self.layout)
                    found[_source(unit, number)] = fingerprint(decode(table, self.layout)[0])
                elif rejects:
                    found[_source(unit, number)] = b"made to be rejected"
        return found


class _Engine:
    """Answers each prompt with the targets that its place in the data determines."""

    def __init__(self, teacher: TinyTeacher) -> None:
        self._teacher = teacher

    def capture(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Targets]]:
        source = enumerate(prompts)
        while batch := list(itertools.islice(source, 3)):
            for ordinal, prompt in reversed(batch):
                seed = int(prompt.sequence_id.removeprefix("sequence-"))
                yield ordinal, self._teacher.sequence(seed, length=len(prompt.input_ids)).targets


def fill_cache(root: Path | str, job: Job, worker: Worker) -> None:
    """Begin the cache or go on with it until nothing is missing, and seal it. Raises what the writer raises."""
    writer = CacheWriter.open(root, job.plan)
    assert job.teacher.projection is not None
    writer.put_once("projection.safetensors", job.teacher.projection.to_bytes())
    with Interrupt(at_once=True) as interrupt:
        fill(
            _Engine(job.teacher),  # type: ignore[arg-type]
            writer=writer,
            worker=worker,
            read_unit=job.read_unit,
            interrupt=interrupt,
            quiet=True,
        )
    assert writer.seal() is not None


def fill_naively(root: Path, job: Job, worker: Worker) -> None:
    """The control: a shard grows under its final name while the teacher works, and a shard that is there is done."""
    shards = root / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    units = job.plan.units
    for unit in (*units[worker.index :: worker.count], *reversed(units)):
        path = shards / f"{unit.unit}.parquet"
        if path.name in {item.name for item in shards.iterdir()}:
            continue
        with pq.ParquetWriter(path, row_schema(job.layout), **parquet_options(job.layout)) as file:
            for number in range(unit.start, unit.stop):
                if number % 7 != 5:
                    file.write_table(encode([job.row(unit, number)], job.layout))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of the input rows."""

    rows: int
    lost: int
    doubled: int
    silent: int  # there, but other than the truth
    torn: int  # shards that cannot be read

    @staticmethod
    def of(found: Iterable[tuple[str, bytes]], truth: Mapping[str, bytes], *, torn: int = 0) -> "Account":
        """Hold what was found, as sources and fingerprints, against the truth."""
        seen: dict[str, int] = {}
        silent = 0
        for source, content in found:
            seen[source] = seen.get(source, 0) + 1
            silent += truth.get(source) != content
        return Account(
            rows=len(truth),
            lost=len(truth.keys() - seen.keys()),
            doubled=sum(count - 1 for count in seen.values()),
            silent=silent,
            torn=torn,
        )


def account_of_cache(root: Path | str, job: Job) -> Account:
    """Every row and every reject of a sealed cache. Raises what the reader raises."""
    reader = CacheReader.open(root)
    found = []
    for commit in reader.commits:
        for row in decode(reader.read_unit(commit), reader.layout):
            found.append((row.prompt.source, fingerprint(row)))
        if commit.rejects is not None:
            for line in storage.read(storage.inside(reader.root, commit.rejects)).splitlines():
                reject = json.loads(line)
                found.append((reject["source"], reject["reason"].encode()))
    return Account.of(found, job.truth(rejects=True))


def account_of_naive(root: Path, job: Job) -> Account:
    """Every row of every shard that can be read, the others counted."""
    found, torn = [], 0
    for path in sorted((root / "shards").iterdir()):
        try:
            with open_shard(path) as file:
                rows = decode(file.read(use_threads=False), job.layout)
        except (OSError, pa.ArrowException):
            torn += 1
        else:
            found += [(row.prompt.source, fingerprint(row)) for row in rows]
    return Account.of(found, job.truth(rejects=False), torn=torn)


def fingerprint(row: SequenceTargets) -> bytes:
    """SHA-256 of everything that a row holds."""
    digest = hashlib.sha256()
    for record in (row.prompt, row.targets):
        for item in fields(record):
            digest.update(item.name.encode() + _bytes(getattr(record, item.name)))
    return digest.digest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes()
    if isinstance(value, dict):
        return b"".join(_bytes(key) + _bytes(item) for key, item in sorted(value.items()))
    return repr(value).encode()


def _source(unit: Unit, number: int) -> str:
    return f"{unit.domain}.jsonl:{number}"
