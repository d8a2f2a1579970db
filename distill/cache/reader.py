"""A cache, a folder or in a bucket, flows in, verified Arrow tables and ``SequenceTargets`` flow out.

A shard's SHA-256 is checked once for each reader, the checksum of every page at each read. Nothing is read that a
commit record does not name, nothing outside the folder, and no more than the record declares.
"""

import errno
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill.cache import document, generations, storage
from distill.cache.codec import decode
from distill.cache.identity import file_hash
from distill.cache.manifest import load_manifest
from distill.cache.plan import Commit, Identity, Manifest, Plan, Recorded, Source
from distill.cache.projection import Projection, widths_of
from distill.cache.schema import Layout, row_schema
from distill.cache.shard import bounds_problem, groups_of, open_shard
from distill.errors import CorruptionError, DataError, IdentityError, StorageError
from distill.records import SequenceTargets, Split

_REPAIR = (
    "Restore the file from a copy; or run `distill verify --repair` on the cache and then the same "
    "`distill cache-teacher` command again, which makes this unit anew."
)
_REMAKE = (
    "Restore it from a copy; or run `distill verify --repair` on the cache and then the same `distill cache-teacher` "
    "command again, which seals it anew."
)
_RESTORE = "Restore it from a copy."
_LARGEST = 2**50  # bytes of a shard, folded or not: sums of such sizes fit 64 bits
_LARGEST_FOOTER = 2**18  # bytes; one row group takes a few thousand
_PARQUET_END = 8  # bytes: length of the footer, and four of a mark


class CacheReader:
    """Reads the cache at ``root``; see ``CacheReader.open``. Picklable: a copy checks every shard anew."""

    def __init__(
        self, root: storage.Root, description: Plan | Manifest, commits: tuple[Commit, ...], *, sealed: bool
    ) -> None:
        self.root = root
        self.description = description
        self.identity: Identity = description.identity
        self.recorded: Recorded = description.recorded
        self.sources: tuple[Source, ...] = description.sources
        self.commits = commits
        self.num_units = len(description.units) if isinstance(description, Plan) else len(commits)  # planned
        self.sealed = sealed
        self.files = description.files if isinstance(description, Manifest) else {}  # others', with their SHA-256
        self._footers: dict[str, pq.FileMetaData] = {}  # of shards whose SHA-256 was right
        self._projection: Projection | None = None

    @staticmethod
    def open(path: str | Path, *, allow_incomplete: bool = False) -> "CacheReader":
        """The cache at ``path``; with ``allow_incomplete``, whatever units of it are committed.

        Raises DataError when there is no cache, or an incomplete one that is not allowed; CorruptionError when its
        records are damaged; UsageError for a URL that is not S3's, StorageError or RetryError when S3 refuses.
        """
        root = storage.root_of(path)
        generation = generations.current(root)
        try:
            manifest = load_manifest(root, generation.manifest_name, fix=_REMAKE)
        except FileNotFoundError:
            return _open_unsealed(root, generation, allow_incomplete=allow_incomplete)
        _refuse_impossible(root, manifest.commits)
        return CacheReader(root, manifest, manifest.commits, sealed=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_footers": {}, "_projection": None}

    @property
    def where(self) -> str:
        """What is read, for messages."""
        return str(self.root)

    @property
    def top_k(self) -> int:
        """Log-probabilities kept for each position."""
        return self.identity.top_k

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures that the cache serves, in the order of ``log_z`` and ``log_tail``."""
        return self.identity.temperatures

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a position's projected hidden state; 0: none is kept."""
        return self.identity.hidden_bytes

    @property
    def why_no_hidden(self) -> str:
        """Why ``hidden_bytes`` is 0, as the end of a sentence that begins with ``where``."""
        return "was made with hidden_bytes 0"

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in order of first appearance."""
        return tuple(dict.fromkeys(commit.domain for commit in self.commits))

    @property
    def teacher_dir(self) -> Path:
        """Folder of the teacher's tokenizer and configuration."""
        return storage.folder(self.root, "teacher")

    @property
    def projection(self) -> Projection | None:
        """The fitted projection, read once; None where the cache keeps no hidden states.

        Raises CorruptionError when the file is missing or not the one that the commits name.
        """
        if self._projection is None and self.hidden_bytes:
            self._projection = Projection.from_bytes(self.projection_bytes())
        return self._projection

    def projection_bytes(self) -> bytes:
        """The projection's file. Raises as ``projection`` does."""
        path = storage.inside(self.root, "projection.safetensors")
        try:
            data = storage.read(path)
        except FileNotFoundError as error:
            raise CorruptionError(f"{self.root}/projection.safetensors is missing. {_RESTORE}") from error
        if {commit.projection_sha256 for commit in self.commits} - {hashlib.sha256(data).hexdigest()}:
            raise CorruptionError(
                f"{self.root}/projection.safetensors is not the projection that the units were made with. {_RESTORE}"
            )
        return data

    @cached_property
    def layout(self) -> Layout:
        """Shapes of a row's lists, from the head of the projection file alone. Raises CorruptionError as it does."""
        if not self.hidden_bytes:
            return Layout.of(self.identity, ())
        path = storage.inside(self.root, "projection.safetensors")
        return Layout.of(self.identity, widths_of(path))

    def units(self, domain: str | None = None) -> tuple[Commit, ...]:
        """Commit records in order of units, of one domain or all."""
        return tuple(commit for commit in self.commits if domain in (None, commit.domain))

    def num_rows(self, domain: str | None = None, split: Split | None = None) -> int:
        """Sequences of one domain or all, of one split or both."""
        counts = [commit.num_rows for commit in self.units(domain)]
        return sum(count.total if split is None else count[split] for count in counts)

    def temperature_index(self, temperature: float) -> int:
        """Column of ``log_z`` and ``log_tail``. Raises IdentityError when the cache does not hold the temperature."""
        for index, held in enumerate(self.temperatures):
            if abs(held - temperature) < 1e-9:
                return index
        held_text = ", ".join(f"{value:g}" for value in self.temperatures)
        raise IdentityError(
            f"{self.root} holds targets for the temperatures {held_text}, not {temperature:g}. Train at one of these, "
            f"or make another cache with --temperatures {temperature:g},… ."
        )

    def require_shards(self) -> None:
        """Look whether every shard is there and as long as it was committed; nothing of it is read.

        Raises CorruptionError, with unit and file, when one is not.
        """
        sizes = storage.sizes(self.root, "shards")
        for commit in self.commits:
            found = sizes.get(commit.shard)
            if found != commit.num_bytes:
                problem = "is missing" if found is None else f"has {found} bytes, its record says {commit.num_bytes}"
                raise CorruptionError(f"unit {commit.unit}: {self.root}/{commit.shard} {problem}. {_REPAIR}")

    def read_unit(self, commit: Commit, *, columns: list[str] | None = None) -> pa.Table:
        """The rows of a unit, train rows first; all columns or the named ones.

        Raises CorruptionError, with unit and file, when the shard is missing or not the one that was committed.
        """
        return self._read(commit, columns=columns, split=None)

    def sequences(self, commit: Commit, split: Split) -> list[SequenceTargets]:
        """The rows of one split of a unit, in order. Raises as ``read_unit`` does."""
        return decode(self._read(commit, columns=None, split=split), self.layout)

    def _read(self, commit: Commit, *, columns: list[str] | None, split: Split | None) -> pa.Table:
        path, where = storage.inside(self.root, commit.shard), f"{self.root}/{commit.shard}"
        try:
            footer = self._verified_footer(commit, path)
            groups = groups_of(footer, num_train=commit.num_rows.train, split=split)
            with open_shard(path, footer) as file:
                table = file.read_row_groups(groups, columns=columns, use_threads=False)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the latter: of a column's name
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
                raise StorageError(
                    f"unit {commit.unit}: cannot read {where}: {error.strerror}. Check the disk and your rights there, "
                    "then run again."
                ) from error
            raise CorruptionError(f"unit {commit.unit}: {where} cannot be read: {error}. {_REPAIR}") from error
        problem = _labels_problem(table, commit)
        if problem:
            raise CorruptionError(f"unit {commit.unit}: {where} {problem}. {_REPAIR}")
        return table

    def _verified_footer(self, commit: Commit, path: Path) -> pq.FileMetaData:
        """The shard's footer, after its size, SHA-256, columns and memory bounds proved right: once for each reader."""
        footer = self._footers.get(commit.shard)
        if footer is None:
            footer, problem = self._examine(commit, path)
            if footer is None or problem:
                raise CorruptionError(
                    f"unit {commit.unit}: {self.root}/{commit.shard} is not the file that was committed: {problem}. "
                    f"{_REPAIR}"
                )
            self._footers[commit.shard] = footer
        return footer

    def _examine(self, commit: Commit, path: Path) -> tuple[pq.FileMetaData | None, str | None]:
        num_bytes = path.stat().st_size
        if num_bytes != commit.num_bytes:
            return None, f"it has {num_bytes} bytes, its record says {commit.num_bytes}"
        if file_hash(path) != commit.sha256:
            return None, "its SHA-256 is another"
        footer_bytes = _footer_bytes(path)
        if footer_bytes > commit.num_decoded_bytes + _LARGEST_FOOTER:
            return None, f"its footer has {footer_bytes} bytes, its record says {commit.num_decoded_bytes} for all rows"
        with open_shard(path) as file:
            if not file.schema_arrow.equals(row_schema(self.layout)):
                return None, "its columns are not those of this cache"
            return file.metadata, bounds_problem(path, file.metadata, commit, self.layout)


def _footer_bytes(path: Path) -> int:
    """Length of a Parquet file's footer as the file's end states it."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _PARQUET_END, 0))
        return int.from_bytes(file.read(4), "little")


def _labels_problem(table: pa.Table, commit: Commit) -> str | None:
    """A unit's rows share one domain and two splits: a long text that all rows point to would unfold with every row."""
    for name, allowed in (("domain", {commit.domain}), ("split", {"train", "eval"})):
        if name not in table.column_names:
            continue
        if any(set(chunk.dictionary.to_pylist()) - allowed for chunk in table.column(name).chunks):
            return f"holds rows of another {name} than its record"
    return None


def _refuse_impossible(root: storage.Root, commits: Sequence[Commit]) -> None:
    """Refuse a unit or shard that is named twice, and counts that no shard of such a size can have."""
    for name in ("unit", "shard"):
        if len({getattr(commit, name) for commit in commits}) < len(commits):
            raise CorruptionError(f"{root}: two records name the same {name}, so rows would come twice. {_RESTORE}")
    for commit in commits:
        rows, targets, trained = commit.num_rows, commit.num_targets, commit.num_trained
        if (
            commit.num_bytes > _LARGEST
            or commit.num_decoded_bytes > _LARGEST
            or rows.total > commit.num_bytes
            or targets.total > commit.num_decoded_bytes
            or trained.train > targets.train
            or trained.eval > targets.eval
        ):
            raise CorruptionError(
                f"{root}: the record of unit {commit.unit} claims {rows.total} rows, {targets.total} targets and "
                f"{trained.total} trained ones in {commit.num_bytes} bytes, which no shard can hold. {_REPAIR}"
            )


def _open_unsealed(root: storage.Root, generation: generations.Generations, *, allow_incomplete: bool) -> CacheReader:
    try:
        plan = document.load(Plan, root, "plan.json", fix=_RESTORE)
    except FileNotFoundError:
        if any(storage.inside(root, f"stage{number}").exists() for number in (1, 2, 3)):
            raise DataError(
                f"{root} is a run of `distill train`, no cache. Look at it with `distill report {root}`."
            ) from None
        raise DataError(
            f"no cache at {root}: it has no plan.json. Make one with `distill cache-teacher --out {root} …`, or "
            "correct the path."
        ) from None
    commits = []
    for unit in plan.units:
        try:
            commits.append(document.load(Commit, root, generation.commit_name(unit.unit), fix=_REPAIR))
        except FileNotFoundError:
            continue
    _refuse_impossible(root, commits)
    if not allow_incomplete:
        raise DataError(
            f"{root} is incomplete: {len(commits)} of {len(plan.units)} units are committed"
            f"{f' but {generation.manifest_name} is missing' if len(commits) == len(plan.units) else ''}. Run the same "
            "`distill cache-teacher` command again to finish, or pass --allow-incomplete to use what is there."
        )
    return CacheReader(root, plan, tuple(commits), sealed=False)
