"""A CSV, JSON-lines or Parquet file flows in, raw rows flow out: a dictionary of fields, or the reason for none.

Every row of the file yields exactly one ``RawRow``. Empty lines are no rows.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from distill.data.lines import COMPRESSIONS, LINE_LIMIT, Line, read_lines

_BLANKS = " \t\r"  # str.strip() alone would also drop a line of U+2028
_PARQUET_BATCH = 64  # rows in memory together; each may be as long as a line


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRow:
    """A row as the file has it. Exactly one of ``fields`` and ``problem`` is set.

    ``row`` is the 1-based line on which the row starts, or the 0-based index of a row of Parquet and hub data.
    Values are what JSON can hold, and their text is valid Unicode without NUL.
    """

    row: int
    fields: dict[str, Any] | None = None
    problem: str | None = None


def reader_of(path: Path) -> Callable[[Path], Iterator[RawRow]] | None:
    """The function that reads this kind of file, told by its extension; None for an unknown one."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return parquet_rows
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    if name.endswith(".csv"):
        return csv_rows
    return jsonl_rows if name.endswith((".jsonl", ".json")) else None


def checked(row: int, fields: dict[str, Any]) -> RawRow:
    """The row with its values in JSON's types, or a problem where text is not storable (surrogates, NUL, bytes)."""
    try:
        encoded = json.dumps(fields, ensure_ascii=False, default=_plain)
        encoded.encode("utf-8")
    except UnicodeEncodeError as error:
        return RawRow(row=row, problem=f"a lone surrogate (U+{ord(error.object[error.start]):04X})")
    except UnicodeDecodeError:
        return RawRow(row=row, problem="a binary value that is not UTF-8 text")
    except RecursionError:
        return RawRow(row=row, problem="nested too deeply")
    # The cheap test also fires on the six characters "\u0000" in a text, hence the careful one.
    if "\\u0000" in encoded and _has_nul(json.loads(encoded)):
        return RawRow(row=row, problem="a NUL character")
    return RawRow(row=row, fields=json.loads(encoded))


def _plain(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _has_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_nul(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(_has_nul(part) for part in value)
    return isinstance(value, str) and "\0" in value


def jsonl_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a JSON-lines file: one object per line."""
    for line in read_lines(path):
        if line.problem is not None:
            yield RawRow(row=line.number, problem=line.problem)
        elif line.text is not None and line.text.strip(_BLANKS):
            yield _json_row(line.text, line.number)


def _json_row(text: str, number: int) -> RawRow:
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        return RawRow(row=number, problem="nested too deeply")
    except ValueError as error:  # also an integer with too many digits
        return RawRow(row=number, problem=f"not JSON: {error}")
    if not isinstance(fields, dict):
        return RawRow(row=number, problem=f"a JSON {type(fields).__name__}, not an object with columns")
    return checked(number, fields)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class _CsvError(ValueError):
    pass


class _Record:
    """A CSV record that grows line by line (RFC 4180; a quote inside an unquoted field is a plain character).

    Written out because ``csv.reader`` cannot be asked, in the middle of a record, how many fields it has: a stray
    quote would then swallow megabytes of the rows that follow before anything looks wrong.
    """

    def __init__(self, width: int | None) -> None:
        self.fields: list[str] = []
        self._width = width
        self._quoted: list[str] | None = None  # pieces of a quoted field that is still open

    def feed(self, text: str, end: str) -> bool:
        """Add a line; True when it completes the record. Raises _CsvError."""
        position = 0
        while True:
            if self._quoted is None and text.startswith('"', position):
                self._quoted = []
                position += 1
            if self._quoted is not None:
                next_field = self._feed_quoted(text, end, position)
                if next_field is None:
                    return False
                position = next_field
            else:
                comma = text.find(",", position)
                stop = len(text) if comma < 0 else comma
                self._add(text[position:stop])
                position = stop + 1
            if position > len(text):
                return True

    def _feed_quoted(self, text: str, end: str, position: int) -> int | None:
        """Where the next field starts (past the text: there is none), or None while the quote stays open."""
        assert self._quoted is not None
        while (quote := text.find('"', position)) >= 0:
            self._quoted.append(text[position:quote])
            if not text.startswith('"', quote + 1):
                self._add("".join(self._quoted))
                self._quoted = None
                if quote + 1 < len(text) and text[quote + 1] != ",":
                    raise _CsvError("text after a closing quote")
                return quote + 2
            self._quoted.append('"')
            position = quote + 2
        self._quoted.append(text[position:] + end)
        return None

    def _add(self, field: str) -> None:
        self.fields.append(field)
        if self._width is not None and len(self.fields) > self._width:
            raise _CsvError(f"more fields than the header's {self._width}")


def csv_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a CSV file whose first record names the columns; a quoted field may span lines.

    After a broken record the reading goes on at the line after the one on which that record started, so that an
    unclosed quote costs one row and not the rest of the file.
    """
    lines = _Rewindable(read_lines(path))
    header: list[str] | None = None
    while (line := lines.next()) is not None:
        if line.text is not None and not line.text.strip(_BLANKS):
            continue
        try:
            fields = _csv_record(line, lines, width=len(header) if header else None)
            if header is None:
                header = _csv_header(fields)
            elif len(fields) < len(header):
                raise _CsvError(f"{len(fields)} fields, the header has {len(header)}")
            else:
                yield checked(line.number, dict(zip(header, fields, strict=True)))
        except _CsvError as error:
            if header is None:
                yield RawRow(row=line.number, problem=f"the header cannot be read: {error}")
                return
            yield RawRow(row=line.number, problem=str(error))


class _Rewindable:
    """Lines that can be given back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._returned: deque[Line] = deque()

    def next(self) -> Line | None:
        return self._returned.popleft() if self._returned else next(self._lines, None)

    def give_back(self, lines: list[Line]) -> None:
        self._returned.extendleft(reversed(lines))


def _csv_record(first: Line, lines: _Rewindable, *, width: int | None) -> list[str]:
    """The fields of the record that starts on ``first``. Raises _CsvError, with the lines after it given back."""
    record = _Record(width)
    line, used, size, problem = first, [first], 0, first.problem
    try:
        while True:
            if line.text is None:
                raise _CsvError(line.problem)
            if record.feed(line.text, line.end):
                break
            size += len(line.text)
            following = lines.next()
            if following is None:
                raise _CsvError("a quote is never closed")
            line = following
            used.append(line)
            if size > LINE_LIMIT:
                raise _CsvError(f"a quote is not closed within {LINE_LIMIT:,} characters")
            problem = problem or line.problem
    except _CsvError as error:
        lines.give_back(used[1:])
        raise _CsvError(problem or str(error)) from error
    if problem is not None:
        raise _CsvError(problem)
    return record.fields


def _csv_header(fields: list[str]) -> list[str]:
    names = [name.strip() for name in fields]
    if "" in names or len(set(names)) < len(names):
        raise _CsvError(f"column names must be distinct and not empty, got {names}")
    return names


def parquet_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet file. Where its pages are damaged, the remaining rows become problems.

    Raises OSError when the disk fails.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    index, total = 0, 0
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        total = file.metadata.num_rows
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            for row in arrow_rows(batch, index):
                yield row
                index += 1
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        for row_index in range(index, max(total, 1)):
            yield RawRow(row=row_index, problem=f"the Parquet file is damaged: {error}")


def arrow_rows(batch: Any, first: int) -> Iterator[RawRow]:
    """The rows of an Arrow batch or table, numbered from ``first``."""
    for offset in range(batch.num_rows):
        try:
            fields = batch.slice(offset, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield RawRow(row=first + offset, problem="text that is not UTF-8")
        else:
            yield checked(first + offset, {name: _without_absent(value) for name, value in fields.items()})


def _without_absent(value: Any) -> Any:
    """A value without the keys that Arrow adds with None to each struct that lacks one which another row's has.

    In the arguments of a tool call a template would print them, and a student learn them.
    """
    if isinstance(value, dict):
        return {key: _without_absent(part) for key, part in value.items() if part is not None}
    return [_without_absent(part) for part in value] if isinstance(value, list) else value
