"""A file or a hub data set's name flows in, a table whose rows are counted and quick to reach flows out.

Local files are read once by the readers of ``distill.data.formats``, which account for every line, into the disk cache
of the ``datasets`` library (``HF_DATASETS_CACHE``), under a key that holds the file's content hash, size and time: an
edited file is never read stale. Hub data sets are used as ``datasets`` stores them.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill.data.formats import RawRow, arrow_rows, reader_of
from distill.errors import DataError, StorageError

_READERS = 2  # raise it when the readers give other rows for the same bytes, so that no older spool is used
_BATCH = 16  # rows in memory together; each may be as long as a line


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTable:
    """Rows in Arrow files on disk: raw fields of a hub data set, or what a reader made of a local file's rows."""

    path: str
    name: str
    sha256: str
    spooled: bool = field(repr=False)
    dataset: Any = field(repr=False)  # datasets.Dataset that gives Arrow tables

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, start: int, stop: int) -> Iterator[RawRow]:
        """Rows at positions ``start`` to ``stop``."""
        for first in range(start, min(stop, len(self)), _BATCH):
            batch = self.dataset[first : min(first + _BATCH, stop, len(self))]
            yield from map(_unspooled, batch.to_pylist()) if self.spooled else arrow_rows(batch, first)


def open_file(path: Path) -> RowTable:
    """The rows of a local file of a known kind.

    Raises DataError when the file cannot be read or has no rows, StorageError when the disk cache cannot be written.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    digest, stamp = _identify(path)
    features = datasets.Features(
        {
            name: datasets.Value(kind)
            for name, kind in (("row", "int64"), ("fields", "large_string"), ("problem", "string"))
        }
    )
    key = {"path": str(path), "sha256": digest, "size": stamp[0], "mtime_ns": stamp[1], "readers": _READERS}
    try:
        if next(_spool(str(path)), None) is None:
            raise DataError(f"{path} has no rows. Check how it was made, or leave it out.")
        dataset = datasets.Dataset.from_generator(_spool, features=features, gen_kwargs=key, writer_batch_size=_BATCH)
    except (OSError, DatasetGenerationError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise StorageError(
            f"cannot copy the rows of {path} into the disk cache {datasets.config.HF_DATASETS_CACHE}: {cause}. Free "
            "space there, or set HF_DATASETS_CACHE to another folder."
        ) from error
    if _stamp(path.stat()) != stamp:
        raise DataError(f"{path} changed while it was read. Wait until it is written, then run again.")
    return RowTable(path=str(path), name=path.name, sha256=digest, spooled=True, dataset=dataset.with_format("arrow"))


def open_hub(given: str) -> RowTable:
    """The rows of ``owner/name`` or ``owner/name:split``. Raises DataError when they cannot be had."""
    import datasets

    datasets.disable_progress_bars()
    name, _, wanted = given.partition(":")
    try:
        builder = datasets.load_dataset_builder(name)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as error:  # the hub, its files and the readers of every format raise what they like
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"cannot load the hub data set {name}: {reason}. Check its name and the connection (HF_HUB_OFFLINE allows "
            "only what the cache holds); a local file needs a path that exists."
        ) from error
    split = wanted or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if split not in splits:
        raise DataError(
            f"the hub data set {name} has no split '{split}'. Name one as {name}:SPLIT: {', '.join(splits)}."
        )
    dataset = splits[split].with_format("arrow")
    return RowTable(path=given, name=given, sha256=f"hub:{builder.hash}", spooled=False, dataset=dataset)


def _spool(path: str, **_key: Any) -> Iterator[dict[str, Any]]:
    reader = reader_of(Path(path))
    assert reader is not None
    for row in reader(Path(path)):
        fields = None if row.fields is None else json.dumps(row.fields, ensure_ascii=False)
        yield {"row": row.row, "fields": fields, "problem": row.problem}


def _unspooled(stored: dict[str, Any]) -> RawRow:
    fields = None if stored["fields"] is None else json.loads(stored["fields"])
    return RawRow(row=stored["row"], fields=fields, problem=stored["problem"])


def _identify(path: Path) -> tuple[str, tuple[int, int]]:
    """The hash of a file's content; its size and time of change as they were before hashing."""
    try:
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            return hashlib.file_digest(file, "sha256").hexdigest(), stamp
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check the file and its permissions.") from error


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
