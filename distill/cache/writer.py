"""A plan and, unit by unit, the teacher's rows flow in; committed shards and, when all are in, a manifest flow out.

    plan.json -> projection.safetensors -> shards/<unit>-<nonce>.parquet -> rejects/<unit>-<nonce>.jsonl
              -> commits/<unit>.json -> manifest.json      (both numbered after a repair, see generations.py)

Any number of writers may work on one cache at the same time, on any machines that share the disk. The commit record is
created once: the first writer of a unit wins, a later one deletes its own files. A unit without a record does not
exist, whatever files lie about.
"""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from distill.cache import document, generations, storage
from distill.cache.card import render_card
from distill.cache.generations import Generations
from distill.cache.identity import data_differences, differences, file_hash
from distill.cache.manifest import load_manifest
from distill.cache.plan import Commit, Counts, Manifest, Plan, Unit, total
from distill.cache.projection import Projection
from distill.cache.sanity import problem
from distill.cache.schema import Layout
from distill.cache.shard import write_rows
from distill.errors import CorruptionError, IdentityError, StorageError, UsageError
from distill.records import Reject, SequenceTargets

_BLOCK = 2**20  # bytes of a file that are read at a time
_BAD_SHARE = 0.001  # of a unit's rows; more insane ones than this, and at least two, stop the job
_RESTORE = "Restore it from a copy, or make the cache anew under another --out."
_REPAIR = (
    "Restore it from a copy; or run `distill verify --repair` on the cache, then the same `distill cache-teacher` "
    "command again."
)


class CacheWriter:
    """Adds units to the cache at ``root``; see ``CacheWriter.open``."""

    def __init__(self, root: storage.Root, plan: Plan) -> None:
        self.root = root
        self.plan = plan
        self._known_projection: _KnownProjection | None = None
        self._nonces: set[str] = set()  # of the files written here

    @staticmethod
    def open(root: str | Path, plan: Plan) -> "CacheWriter":
        """Begin the cache at ``root``, or go on with the one that is there.

        ``recorded`` and the paths of sources may differ from those of the existing plan, which stays. Raises
        IdentityError when identity or data differ, StorageError when the folder cannot be written, UsageError for a
        URL that is not S3's and for a folder that holds something else, RetryError when S3 is unreachable.
        """
        home = storage.root_of(root)
        _refuse_foreign(home)
        if not storage.inside(home, "plan.json").exists() and storage.create(home, "plan.json", document.render(plan)):
            return CacheWriter(home, plan)
        existing = document.load(Plan, home, "plan.json", fix=_RESTORE)
        _refuse_other(home, existing, plan)
        storage.require_writable(home)
        return CacheWriter(home, existing)

    def missing_units(self) -> list[Unit]:
        """Units of the plan that have no commit record yet, or whose record a repair has outdated.

        One listing stands in for asking for each record that is not there, which is what a store is slow at: a unit
        that it does not show counts as missing. A record that it shows is looked at.
        """
        return self._missing(generations.current(self.root))

    def put_once(self, name: str, data: bytes) -> bytes:
        """Keep ``data`` as the file ``name`` unless there is one already; returns what the cache holds now."""
        return data if storage.create(self.root, name, data) else storage.read(storage.inside(self.root, name))

    def commit(
        self, unit: Unit, rows: Sequence[SequenceTargets], *, rejects: Sequence[Reject], num_input_rows: int
    ) -> Commit:
        """Make ``rows`` the content of ``unit`` and return its record; the winner's, when another writer was first.

        Rows with numbers that cannot be right become rejects. Raises CorruptionError when there are many of them, when
        input rows are unaccounted for, or when the disk gives back other bytes than were written; StorageError when it
        refuses. After an error the unit does not exist, and may be committed again.
        """
        sane, insane = self._sort_out(unit, rows)
        all_rejects = [*rejects, *insane]
        self._check_accounts(unit, num_rows=len(sane), num_rejects=len(all_rejects), num_input_rows=num_input_rows)
        ordered = [row for split in ("train", "eval") for row in sane if row.prompt.split == split]
        generation = generations.current(self.root)
        try:
            commit = self._write_files(unit, ordered, all_rejects, generation=generation.of(unit.unit))
        except StorageError:
            # Sealing sweeps files that no commit names. Every unit is in by then, so this one has a winner.
            if self._exists(unit, generation):
                return self._committed(unit, generation)
            raise
        if storage.create(self.root, generation.commit_name(unit.unit), document.render(commit)):
            return commit
        for name in (commit.shard, commit.rejects):
            if name:
                storage.delete(self.root, name)
        return self._committed(unit, generation)

    def is_own(self, commit: Commit) -> bool:
        """Whether ``commit`` is of a unit that this writer made: the record of a lost race is another's."""
        return commit.nonce in self._nonces

    def seal(self) -> Manifest | None:
        """Write the manifest and sweep away files of lost races and killed writers; None while units are missing.

        Raises CorruptionError when there is a manifest already and the commits have changed since.
        """
        generation = generations.current(self.root)
        if any(not self._exists(unit, generation) for unit in self._missing(generation)):
            return None
        commits = tuple(self._committed(unit, generation) for unit in self.plan.units)
        manifest = Manifest(
            identity=self.plan.identity,
            recorded=self.plan.recorded,
            sources=self.plan.sources,
            eval_fraction=self.plan.eval_fraction,
            projection_sha256=self._projection().sha256,
            files=self._other_files(),
            commits=commits,
            totals=total(commits),
        )
        self._sweep(commits, generation)
        card = render_card(manifest).encode()
        storage.put(self.root, "README.md", lambda file: file.write(card), need=len(card))
        name = generation.manifest_name
        if storage.create(self.root, name, document.render(manifest)):
            return manifest
        existing = load_manifest(self.root, name, fix=_REPAIR)
        if existing.commits != commits:
            raise CorruptionError(
                f"{self.root}/{name} does not agree with the commit records: units were made again since it was "
                "written. Run `distill verify --repair` on the cache, then the same command again."
            )
        return existing

    def _missing(self, generation: Generations) -> list[Unit]:
        listed = set(storage.names(self.root, "commits"))
        return [
            unit
            for unit in self.plan.units
            if generation.commit_name(unit.unit) not in listed or not self._exists(unit, generation)
        ]

    def _exists(self, unit: Unit, generation: Generations) -> bool:
        return storage.inside(self.root, generation.commit_name(unit.unit)).exists()

    def _committed(self, unit: Unit, generation: Generations) -> Commit:
        return document.load(Commit, self.root, generation.commit_name(unit.unit), fix=_REPAIR)

    def _projection(self) -> "_KnownProjection":
        """Read once: the projection is created before the first commit and never changes."""
        if self._known_projection is None:
            self._known_projection = _know_projection(self.root, self.plan)
        return self._known_projection

    def _sort_out(self, unit: Unit, rows: Sequence[SequenceTargets]) -> tuple[list[SequenceTargets], list[Reject]]:
        """Rows that may be stored, and rejects of the others."""
        layout = self._projection().layout
        sane, insane = [], []
        for row in rows:
            assert row.prompt.domain == unit.domain, f"a row of {row.prompt.domain} in a unit of {unit.domain}"
            reason = problem(row, identity=self.plan.identity, layout=layout)
            if reason is None:
                sane.append(row)
            else:
                insane.append(Reject(domain=unit.domain, source=row.prompt.source, reason=f"the teacher left {reason}"))
        if len(insane) >= 2 and len(insane) > _BAD_SHARE * len(rows):
            raise CorruptionError(
                f"unit {unit.unit}: {len(insane)} of {len(rows)} rows hold numbers that cannot be right, the first at "
                f"{insane[0].source}: {insane[0].reason}. Nothing of the unit is stored. Check the teacher's weights, "
                "dtype and engine options, then run the same command again."
            )
        return sane, insane

    def _check_accounts(self, unit: Unit, *, num_rows: int, num_rejects: int, num_input_rows: int) -> None:
        """Every input row is a sequence or a reject, or several where a row may give more."""
        accounted = num_rows + num_rejects
        lost = accounted < num_input_rows or (accounted > num_input_rows and not self.plan.identity.gives_more_rows)
        if lost or num_input_rows != unit.num_input_rows:
            raise CorruptionError(
                f"unit {unit.unit} is planned with {unit.num_input_rows} input rows; {num_input_rows} were read, and "
                f"{num_rows} sequences and {num_rejects} rejects came of them. Nothing of the unit is stored. Restore "
                "the data file if it changed since the plan was made, then run the same command again."
            )

    def _write_files(
        self, unit: Unit, rows: Sequence[SequenceTargets], rejects: Sequence[Reject], *, generation: int
    ) -> Commit:
        """The shard and the rejects, on disk and read back, and the record that would make them visible."""
        nonce = secrets.token_hex(8)
        self._nonces.add(nonce)
        stem = generations.shard_stem(unit.unit, generation, nonce)
        shard = f"shards/{stem}.parquet"
        written = self._write_shard(shard, unit, rows)
        rejects_file = rejects_sha256 = None
        if rejects:
            rejects_file = f"rejects/{stem}.jsonl"
            lines = "".join(_reject_line(reject) for reject in rejects).encode("utf-8", "replace")
            storage.put(self.root, rejects_file, lambda file: file.write(lines), need=len(lines))
            rejects_sha256 = hashlib.sha256(lines).hexdigest()
        counts = _counts(rows)
        return Commit(
            unit=unit.unit,
            domain=unit.domain,
            generation=generation,
            nonce=nonce,
            shard=shard,
            sha256=written.sha256,
            num_bytes=written.num_bytes,
            num_decoded_bytes=written.num_decoded_bytes,
            num_rows=counts["rows"],
            num_targets=counts["targets"],
            num_trained=counts["trained"],
            num_input_rows=unit.num_input_rows,
            num_rejects=len(rejects),
            rejects=rejects_file,
            rejects_sha256=rejects_sha256,
            projection_sha256=self._projection().sha256,
        )

    def _write_shard(self, name: str, unit: Unit, rows: Sequence[SequenceTargets]) -> "_Written":
        """Raises CorruptionError when the disk gives back other bytes than it was given."""
        layout = self._projection().layout
        where = f"{self.root}/{name}"
        need = sum(row.prompt.num_targets for row in rows) * 8 * layout.top_k
        num_decoded_bytes = 0

        def fill(file: BinaryIO) -> None:
            nonlocal num_decoded_bytes
            num_decoded_bytes = write_rows(file, rows, layout)

        sent = storage.put(self.root, name, fill, need=need)
        try:
            with storage.read_back(self.root, name) as path:
                came_back, sha256 = _digests(path)
                num_bytes = path.stat().st_size
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(
                f"{where} cannot be read back: {error.strerror}. Check the disk, then run again."
            ) from error
        if came_back != sent:
            raise CorruptionError(
                f"unit {unit.unit}: {where} does not read back as it was written. The unit is not committed. Check the "
                "disk, then run the same command again."
            )
        return _Written(sha256=sha256, num_bytes=num_bytes, num_decoded_bytes=num_decoded_bytes)

    def _other_files(self) -> dict[str, str]:
        names = ["projection.safetensors", "fidelity.safetensors", "canaries.safetensors", "samples.parquet"]
        names += [name for name in storage.names(self.root, "teacher") if storage.TEMPORARY not in name]
        paths = {name: storage.inside(self.root, name) for name in names}
        return {name: file_hash(path) for name, path in paths.items() if path.is_file()}

    def _sweep(self, commits: Sequence[Commit], generation: Generations) -> None:
        """Delete what no commit names, so that ``shards/*.parquet`` is the cache. Its writers have lost already.

        Not so the writers of a repair that was asked for in the meantime: their files stay.
        """
        named = {name for commit in commits for name in (commit.shard, commit.rejects)}
        for name in (name for folder in ("shards", "rejects") for name in storage.names(self.root, folder)):
            outdated = generations.generation_of(name.rpartition("/")[2]) <= generation.number
            if outdated and name not in named:
                storage.delete(self.root, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KnownProjection:
    layout: Layout
    sha256: str | None


def _know_projection(root: storage.Root, plan: Plan) -> _KnownProjection:
    identity = plan.identity
    if identity.hidden_bytes == 0:
        return _KnownProjection(layout=Layout.of(identity, ()), sha256=None)
    path = storage.inside(root, "projection.safetensors")
    if not path.exists():
        raise UsageError(
            f"{root}/projection.safetensors is missing, and hidden_bytes is {identity.hidden_bytes}: put the "
            "projection into the cache before the first unit."
        )
    data = storage.read(path)
    widths = Projection.from_bytes(data).widths
    return _KnownProjection(layout=Layout.of(identity, widths), sha256=hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    sha256: str
    num_bytes: int
    num_decoded_bytes: int


def _digests(path: Path) -> tuple[str, str]:
    """Fingerprint and SHA-256 of a file, read once."""
    fingerprint, sha256 = storage.FINGERPRINT(), hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            fingerprint.update(block)
            sha256.update(block)
    return fingerprint.hexdigest(), sha256.hexdigest()


def _refuse_foreign(home: storage.Root) -> None:
    """Raise UsageError for a local folder of other things, whose README.md a cache's card would replace.

    It is listed before the plan is looked for, since another worker may begin the cache at this moment.
    """
    if not isinstance(home, Path) or not home.is_dir():
        return
    try:
        names = sorted(path.name for path in home.iterdir() if not path.name.startswith("."))
    except PermissionError:  # one may write where one may not list
        return
    if names and not storage.inside(home, "plan.json").exists():
        raise UsageError(
            f"{home} is no cache and not empty: it holds {', '.join(names[:3])}{', …' if len(names) > 3 else ''}. Name "
            "a new folder with --out."
        )


def _refuse_other(root: storage.Root, existing: Plan, plan: Plan) -> None:
    lines = differences(existing.identity, plan.identity)
    if lines:
        raise IdentityError(
            f"{root} is a cache of another identity: {'; '.join(lines)}. Use the cache's own settings to add to it, or "
            "another --out for another cache."
        )
    changed = data_differences(existing, plan)
    if changed:
        raise IdentityError(
            f"{root} is a cache of the same teacher and targets, but the data changed: {'; '.join(changed)}. A cache "
            f"never grows: put other data into another cache (another --out, --projection-from {root}) and train on "
            "both, or restore the data."
        )


def _reject_line(reject: Reject) -> str:
    record = {"domain": reject.domain, "source": reject.source, "reason": reject.reason}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _counts(rows: Sequence[SequenceTargets]) -> dict[str, Counts]:
    numbers = {name: {"train": 0, "eval": 0} for name in ("rows", "targets", "trained")}
    for row in rows:
        split = row.prompt.split
        numbers["rows"][split] += 1
        numbers["targets"][split] += row.prompt.num_targets
        numbers["trained"][split] += int(row.prompt.loss_mask.sum())
    return {name: Counts(**values) for name, values in numbers.items()}
