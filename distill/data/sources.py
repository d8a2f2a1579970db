"""The files and hub data sets that a configuration names flow in, sources with known rows and columns flow out."""

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from distill.config import CacheConfig
from distill.data.columns import Layout, find_layout
from distill.data.formats import RawRow, reader_of
from distill.data.tables import RowTable, open_file, open_hub
from distill.errors import DataError
from distill.records import Split

_LAYOUT_ROWS = 10  # good rows whose columns decide a file's layout
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_KINDS = ".csv, .jsonl and .json (JSON lines), each also with .gz or .zst, and .parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened file or hub data set.

    ``split`` is the side all its rows are on, or None where each row's prompt decides. ``columns`` are those of its
    first good rows, ``layout`` says which of them are tokenised.
    """

    domain: str
    split: Split | None
    columns: tuple[str, ...]
    layout: Layout
    table: RowTable = field(repr=False)

    @property
    def path(self) -> str:
        """The absolute path of the file, or the name of the hub data set."""
        return self.table.path

    @property
    def name(self) -> str:
        """The file's name without its folder, or the name of the hub data set; ``Prompt.source`` starts with it."""
        return self.table.name

    @property
    def sha256(self) -> str:
        """Hash of the file's bytes; for hub data ``hub:`` and the revision that was loaded."""
        return self.table.sha256

    def __len__(self) -> int:
        """Input rows, broken ones included."""
        return len(self.table)

    def rows(self, start: int, stop: int) -> Iterator[RawRow]:
        """The rows at positions ``start`` to ``stop``, counted from 0 (their line numbers are in ``RawRow.row``)."""
        return self.table.rows(start, stop)


def open_sources(config: CacheConfig) -> list[Source]:
    """Every file and data set of ``config.data`` and ``config.eval``: domains sorted, paths as given, data first.

    Loads no model. Raises DataError, with the fix, for a path that is missing, of an unknown kind, listed twice,
    without a readable row or without columns to learn from, and StorageError when the disk cache cannot be written.
    """
    sources: list[Source] = []
    seen: set[tuple[str, str]] = set()
    for domain in sorted({*config.data, *config.eval}):
        data_split: Split | None = "train" if config.eval.get(domain) else None
        for paths, split in ((config.data.get(domain, ()), data_split), (config.eval.get(domain, ()), "eval")):
            for path in (found for given in paths for found in _expand(given)):
                identity = (domain, str(path.resolve() if isinstance(path, Path) else path))
                if identity in seen:
                    raise DataError(f"{path} is listed twice for domain '{domain}'. Name it once, in --data or --eval.")
                seen.add(identity)
                table = open_file(path) if isinstance(path, Path) else open_hub(path)
                sources.append(_source(table, domain=domain, split=split, config=config))
    if not sources:
        raise DataError("there is no data. Name some with --data DOMAIN=PATH.")
    _check_given_columns(sources, config)
    return sources


def _expand(given: str) -> list[Path] | list[str]:
    """The files that a path, glob or folder stands for, or the name of a hub data set as it is."""
    try:
        return _look_up(given)
    except OSError as error:
        raise DataError(f"cannot look up {given}: {error.strerror}. Check the path and its permissions.") from error


def _look_up(given: str) -> list[Path] | list[str]:
    path = Path(given).expanduser().absolute()
    if path.is_dir():
        return _files(path.iterdir(), nothing=f"the folder {given} has no data files")
    if path.exists():
        return _files([path], nothing=f"{given} is not a data file")
    if glob.has_magic(given):
        matches = glob.iglob(str(path), recursive=True)
        return _files((Path(match) for match in matches), nothing=f"no data file matches {given}")
    if _HUB_NAME.fullmatch(given) and reader_of(path) is None:
        return [given]
    raise DataError(
        f"{given} does not exist. Give a file, a glob, a folder, or a hub data set as owner/name or owner/name:split."
    )


def _files(candidates: Iterable[Path], *, nothing: str) -> list[Path]:
    found = sorted(path for path in candidates if path.is_file() and reader_of(path) is not None)
    if not found:
        raise DataError(f"{nothing}. Known extensions are {_KINDS}.")
    return found


def _source(table: RowTable, *, domain: str, split: Split | None, config: CacheConfig) -> Source:
    good: list[RawRow] = []
    broken: RawRow | None = None
    for row in table.rows(0, len(table)):
        if row.fields is not None:
            good.append(row)
        elif broken is None:
            broken = row
        if len(good) == _LAYOUT_ROWS:
            break
    if not good:
        raise DataError(_nothing_readable(table, broken))
    columns = tuple(dict.fromkeys(name for row in good for name in row.fields or ()))
    layout = find_layout(columns, columns=config.columns, where=table.path, answers=config.generate is None)
    return Source(domain=domain, split=split, columns=columns, layout=layout, table=table)


def _nothing_readable(table: RowTable, broken: RawRow | None) -> str:
    if broken is None:
        return f"{table.path} has no rows. Check its name and split, or leave it out."
    hint = " (one JSON object on each line is needed, not one array)" if ".json" in table.name else ""
    return (
        f"{table.path}: none of its {len(table)} rows can be read{hint}. The first problem, at "
        f"{table.name}:{broken.row}: {broken.problem}. Repair the file, or leave it out."
    )


def _check_given_columns(sources: list[Source], config: CacheConfig) -> None:
    used = {name for source in sources for name in source.layout.columns}
    for key, name in config.columns.model_dump().items():
        if name is not None and name not in used:
            found = "; ".join(f"{source.path}: {', '.join(source.columns)}" for source in sources)
            raise DataError(f"no data uses the column of --column {key}={name}. Columns found are, in {found}.")
