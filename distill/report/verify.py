"""A cache folder flows in, a list of everything that is wrong with it flows out: every byte is read back.

Nothing is repaired here (see ``repair.py``), and nothing stops at the first problem: the report names each unit and
file once.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache import document, generations, storage
from distill.cache.codec import decode
from distill.cache.generations import Generations
from distill.cache.identity import file_hash
from distill.cache.plan import Commit, Manifest, Plan, Unit, total
from distill.cache.reader import CacheReader
from distill.cache.sanity import problem
from distill.errors import DataError, DistillError, RetryError, StorageError
from distill.records import SequenceTargets

_PROJECTION_ARRAYS = ("mean_D", "down_RD", "basis_VR", "bias_V", "variance_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong. ``unit`` is None where the whole cache is concerned."""

    unit: str | None
    file: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was read, and what was wrong."""

    path: str
    generation: int  # 1 and the number of repairs
    sealed: bool
    num_units: int
    num_committed: int
    num_rows: int
    num_rejects: int
    num_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong. An incomplete cache may be ok as far as it goes."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "path": self.path,
            "ok": self.ok,
            "generation": self.generation,
            "sealed": self.sealed,
            "num_units": self.num_units,
            "num_committed": self.num_committed,
            "num_rows": self.num_rows,
            "num_rejects": self.num_rejects,
            "num_bytes": self.num_bytes,
            "problems": [{"unit": item.unit, "file": item.file, "text": item.text} for item in self.problems],
        }


@dataclass(slots=True)
class _Findings:
    """Problems so far."""

    root: storage.Root
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, text: str, *, unit: str | None = None) -> None:
        self.problems.append(Problem(unit=unit, file=file, text=text.strip()))

    def add_error(self, file: str, error: Exception, *, unit: str | None = None) -> None:
        """What the disk does not hand over may be whole. It is no problem of the unit, which a repair would outdate."""
        if isinstance(error, RetryError):
            raise error
        self.add(file, str(error), unit=None if isinstance(error, StorageError) else unit)


def verify(path: str | Path) -> VerifyReport:
    """Read a whole cache back: records, hashes, counts, every row's numbers.

    Raises DataError when there is no cache at ``path``, UsageError for a URL that is not S3's, RetryError when S3 is
    unreachable. Everything else is in the report.
    """
    root = storage.root_of(path)
    if not any(storage.inside(root, name).exists() for name in ("plan.json", "manifest.json")):
        raise DataError(f"no cache at {root}: it has no plan.json. Correct the path.")
    findings = _Findings(root)
    generation = _generation(findings)
    plan = _record(findings, Plan, "plan.json", required=True)
    manifest = _record(findings, Manifest, generation.manifest_name, required=False)
    sealed = storage.inside(root, generation.manifest_name).exists()
    commits = list(manifest.commits if manifest else ())
    if plan:
        commits = list(_commits(findings, plan, generation, sealed=sealed))
    if plan and manifest:
        _check_manifest(findings, plan, manifest, commits, name=generation.manifest_name)
    if manifest:
        _check_files(findings, manifest, name=generation.manifest_name)
    description = plan or manifest
    if description:
        reader = CacheReader(root, description, tuple(commits), sealed=sealed)
        _check_projection(findings, reader)
        for commit in commits:
            _check_shard(findings, reader, commit)
            _check_rejects(findings, commit, record=generation.commit_name(commit.unit))
    totals = total(commits)
    return VerifyReport(
        path=str(root),
        generation=generation.number,
        sealed=sealed,
        num_units=len(plan.units) if plan else len(commits),
        num_committed=len(commits),
        num_rows=totals.num_rows.total,
        num_rejects=totals.num_rejects,
        num_bytes=totals.num_bytes,
        problems=tuple(findings.problems),
    )


def _generation(findings: _Findings) -> Generations:
    """What the repairs ask for; generation 1 where one of them cannot be read, which is a problem of its own."""
    try:
        return generations.current(findings.root)
    except DistillError as error:
        findings.add("repairs", str(error))
        return Generations(number=1, units={})


def _record(
    findings: _Findings, model: type[document.Model], name: str, *, required: bool, unit: str | None = None
) -> document.Model | None:
    try:
        return document.load(model, findings.root, name, fix="")
    except FileNotFoundError:
        if required:
            findings.add(name, "is missing", unit=unit)
    except DistillError as error:
        findings.add_error(name, error, unit=unit)
    return None


def _commits(findings: _Findings, plan: Plan, generation: Generations, *, sealed: bool) -> Iterator[Commit]:
    for unit in plan.units:
        name = generation.commit_name(unit.unit)
        commit = _record(findings, Commit, name, required=sealed, unit=unit.unit)
        if commit:
            _check_record(findings, plan, unit, commit, name=name)
            if commit.generation != generation.of(unit.unit):
                findings.add(name, f"is a record of generation {commit.generation}", unit=unit.unit)
            yield commit


def _check_record(findings: _Findings, plan: Plan, unit: Unit, commit: Commit, *, name: str) -> None:
    if (commit.unit, commit.domain) != (unit.unit, unit.domain):
        findings.add(name, f"is the record of unit {commit.unit} of {commit.domain}", unit=unit.unit)
    accounted = commit.num_rows.total + commit.num_rejects
    more_allowed = plan.identity.gives_more_rows
    if commit.num_input_rows != unit.num_input_rows or accounted < commit.num_input_rows:
        findings.add(name, f"accounts for {accounted} of {unit.num_input_rows} input rows", unit=unit.unit)
    elif accounted > commit.num_input_rows and not more_allowed:
        findings.add(name, f"has {accounted} rows and rejects for {unit.num_input_rows} input rows", unit=unit.unit)


def _check_manifest(findings: _Findings, plan: Plan, manifest: Manifest, commits: list[Commit], *, name: str) -> None:
    for field_name in ("identity", "recorded", "sources", "eval_fraction"):
        if getattr(plan, field_name) != getattr(manifest, field_name):
            findings.add(name, f"has another {field_name} than plan.json")
    if list(manifest.commits) != commits:
        findings.add(name, "does not agree with the commit records")
    if manifest.totals != total(manifest.commits):
        findings.add(name, "has totals that are not the sums of its commits")


def _check_files(findings: _Findings, manifest: Manifest, *, name: str) -> None:
    for file, wanted in manifest.files.items():
        try:
            path = storage.inside(findings.root, file)
            storage.refuse_huge(path)
            actual = file_hash(path)
        except FileNotFoundError:
            findings.add(file, "is missing")
        except (DistillError, OSError) as error:
            findings.add_error(file, error)
        else:
            if actual != wanted:
                findings.add(file, "is not the file that was sealed: its SHA-256 is another")
    if manifest.projection_sha256 != manifest.files.get("projection.safetensors"):
        findings.add(name, "names two projections")


def _check_projection(findings: _Findings, reader: CacheReader) -> None:
    try:
        projection = reader.projection
    except DistillError as error:
        findings.add("projection.safetensors", str(error))
        return
    if projection and not all(np.isfinite(getattr(projection, name)).all() for name in _PROJECTION_ARRAYS):
        findings.add("projection.safetensors", "holds NaN or infinity")


def _check_shard(findings: _Findings, reader: CacheReader, commit: Commit) -> None:
    try:
        rows = decode(reader.read_unit(commit), reader.layout)
    except DistillError as error:
        findings.add_error(commit.shard, error, unit=commit.unit)
        return
    _check_rows(findings, reader, commit, rows)


def _check_rows(findings: _Findings, reader: CacheReader, commit: Commit, rows: list[SequenceTargets]) -> None:
    splits = [row.prompt.split for row in rows]
    if splits != ["train"] * commit.num_rows.train + ["eval"] * commit.num_rows.eval:
        findings.add(commit.shard, "does not hold its train rows, then its eval rows", unit=commit.unit)
    for name, wanted in (("num_targets", commit.num_targets), ("num_trained", commit.num_trained)):
        for split in ("train", "eval"):
            masks = [row.prompt.loss_mask for row in rows if row.prompt.split == split]
            actual = sum(len(mask) if name == "num_targets" else int(mask.sum()) for mask in masks)
            if actual != wanted[split]:
                findings.add(commit.shard, f"has {actual} {split} {name}, not {wanted[split]}", unit=commit.unit)
    sources = [row.prompt.source for row in rows]
    if len(set(sources)) != len(sources):
        findings.add(commit.shard, "holds an input row twice", unit=commit.unit)
    for number, row in enumerate(rows):
        reason = problem(row, identity=reader.identity, layout=reader.layout)
        if reason is None and row.prompt.domain != commit.domain:
            reason = f"the domain {row.prompt.domain}"
        if reason:
            findings.add(commit.shard, f"row {number} ({row.prompt.source}) holds {reason}", unit=commit.unit)
            return


def _check_rejects(findings: _Findings, commit: Commit, *, record: str) -> None:
    if commit.rejects is None:
        if commit.num_rejects:
            findings.add(record, "counts rejects but names no file", unit=commit.unit)
        return
    try:
        data = storage.read(storage.inside(findings.root, commit.rejects))
        num_lines = len([json.loads(line) for line in data.splitlines()])
    except (StorageError, RetryError) as error:
        findings.add_error(commit.rejects, error)
        return
    except (DistillError, OSError, ValueError, RecursionError) as error:
        findings.add(commit.rejects, f"cannot be read: {error}", unit=commit.unit)
        return
    if hashlib.sha256(data).hexdigest() != commit.rejects_sha256 or num_lines != commit.num_rejects:
        findings.add(commit.rejects, "is not the file that was committed", unit=commit.unit)
