"""Several caches of one identity flow in, one reader over all of them flows out.

A cache never grows; to learn from more data, another cache is made and both are read together. Units are named after
the data that they came from, so the order of training neither depends on where the caches lie nor on the order in which
they are named.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from distill.cache.identity import differences
from distill.cache.plan import Commit
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import IdentityError, UsageError
from distill.records import Split


def open_caches(paths: Sequence[str | Path], *, allow_incomplete: bool = False) -> CacheReader:
    """The cache at the only path, or one reader over the caches at all of them.

    Raises IdentityError when they differ in what a student learns from, UsageError when two hold the same data, and
    what ``CacheReader.open`` raises.
    """
    readers = [CacheReader.open(path, allow_incomplete=allow_incomplete) for path in paths]
    for reader in readers:
        reader.require_shards()  # before hours of training, not after
    return readers[0] if len(readers) == 1 else JoinedReader(readers)


class JoinedReader(CacheReader):
    """Reads several caches as one; ``root`` is the first one's. A unit is named <data>-<unit>.

    Where the caches were not made with one projection, their hidden states lie in different bases: the joined cache
    then has none (``hidden_bytes`` is 0).
    """

    def __init__(self, readers: Sequence[CacheReader]) -> None:
        first = readers[0]
        _refuse_others(readers)
        keys = _data_keys(readers)
        parts = [(f"{key}-{commit.unit}", reader, commit) for key, reader in keys for commit in reader.commits]
        commits = tuple(_renamed(commit, name) for name, _, commit in parts)
        super().__init__(first.root, first.description, commits, sealed=all(reader.sealed for reader in readers))
        self.sources = tuple(source for _, reader in keys for source in reader.sources)
        self.num_units = sum(reader.num_units for reader in readers)
        self._parts = {name: (reader, commit) for name, reader, commit in parts}
        self._readers = tuple(readers)
        self._roots = tuple(str(reader.root) for reader in readers)
        self._one_basis = len({commit.projection_sha256 for commit in commits}) <= 1

    @property
    def where(self) -> str:
        """The caches' folders, for messages."""
        return " and ".join(self._roots)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a position's projected hidden state; 0: none is kept, or not in one basis."""
        return self.identity.hidden_bytes if self._one_basis else 0

    @property
    def why_no_hidden(self) -> str:
        """Why ``hidden_bytes`` is 0, as the end of a sentence that begins with ``where``."""
        if self._one_basis:
            return super().why_no_hidden
        return (
            "were made with different projections and so have no hidden states in common (`distill cache-teacher "
            f"--projection-from {self._roots[0]}` makes a cache with the projection of another)"
        )

    def require_shards(self) -> None:
        """As of one cache, for each of them."""
        for reader in self._readers:
            reader.require_shards()

    def _read(self, commit: Commit, *, columns: list[str] | None, split: Split | None) -> pa.Table:
        reader, own = self._parts[commit.unit]
        return reader._read(own, columns=columns, split=split)


def adopt_projection(writer: CacheWriter, path: str | Path) -> None:
    """Give a cache that is being begun the projection of the cache at ``path``, so that both can be read as one.

    Raises IdentityError when the caches differ in identity, or when the new one has another projection already.
    """
    donor = CacheReader.open(path, allow_incomplete=True)
    if not writer.plan.identity.hidden_bytes:
        raise UsageError(
            f"--projection-from {path} is of no use with hidden_bytes 0: a cache without hidden states has no "
            "projection. Leave one of the two out."
        )
    lines = differences(donor.identity, writer.plan.identity)
    if lines:
        raise IdentityError(
            f"the projection of {path} does not serve this cache, which is of another identity: {'; '.join(lines)}. "
            "Use that cache's settings, or leave --projection-from out."
        )
    data = donor.projection_bytes()
    if writer.put_once("projection.safetensors", data) != data:
        raise IdentityError(
            f"{writer.root} was begun with another projection than that of {path}. Use another --out, or go on without "
            "--projection-from."
        )


def _renamed(commit: Commit, name: str) -> Commit:
    """The commit under a name that no record has, so it is not validated again."""
    renamed = copy.copy(commit)
    object.__setattr__(renamed, "unit", name)
    return renamed


def _refuse_others(readers: Sequence[CacheReader]) -> None:
    first = readers[0]
    for reader in readers[1:]:
        lines = differences(first.identity, reader.identity)
        if lines:
            raise IdentityError(
                f"{first.root} and {reader.root} are caches of different identities and cannot be trained on together: "
                f"{'; '.join(lines)} (cache: the former, asked: the latter). Make one of them again with the settings "
                "of the other, or leave it out."
            )


def _data_keys(readers: Sequence[CacheReader]) -> list[tuple[str, CacheReader]]:
    """Each reader with a name of its data, in the order of these names."""
    keys: dict[str, CacheReader] = {}
    for reader in readers:
        sources = [[source.domain, source.sha256, source.num_rows, source.split] for source in reader.sources]
        content = json.dumps([sources, reader.description.eval_fraction]).encode()
        key = hashlib.sha256(content).hexdigest()[:12]
        if key in keys:
            raise UsageError(
                f"{keys[key].root} and {reader.root} hold the same data: every row would be trained on twice as often. "
                "Name one of them."
            )
        keys[key] = reader
    return sorted(keys.items())
