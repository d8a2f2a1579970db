"""A Parquet file flows in, the sizes that its page headers declare flow out, with nothing decompressed.

A small file can unfold to any size while its footer claims little. What Arrow allocates is what the page headers say,
so they are added up and held against the commit record before the first page is read. The headers are Thrift structs
in the compact protocol (Parquet format specification, "Page headers"); only what they use is understood here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_TYPE, _UNCOMPRESSED, _COMPRESSED = 1, 2, 3  # fields of PageHeader
_HEADER_OF = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7}  # its field with the header of that kind
_NUM_VALUES = 1
_DEEPEST = 8


class MalformedError(ValueError):
    """The bytes are no page headers of the kinds that a cache has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSize:
    """Sums over the pages of one leaf column."""

    num_values: int
    num_bytes: int  # uncompressed
    has_dictionary: bool


def column_sizes(data: memoryview, metadata: pq.FileMetaData) -> dict[str, ColumnSize]:
    """Leaf column ("topk_ids.list.element") -> what its page headers declare over all row groups.

    Raises MalformedError when the headers do not fill the column chunks exactly.
    """
    sizes: dict[str, ColumnSize] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            known = sizes.get(chunk.path_in_schema, ColumnSize(num_values=0, num_bytes=0, has_dictionary=False))
            num_values, num_bytes, has_dictionary = known.num_values, known.num_bytes, known.has_dictionary
            for kind, count, page_bytes in _pages(data, chunk):  # no list: a file may be all pages
                num_values += count if kind == _DATA_PAGE else 0
                num_bytes += page_bytes
                has_dictionary |= kind == _DICTIONARY_PAGE
            sizes[chunk.path_in_schema] = ColumnSize(
                num_values=num_values, num_bytes=num_bytes, has_dictionary=has_dictionary
            )
    return sizes


def _pages(data: memoryview, chunk: Any) -> Iterator[tuple[int, int, int]]:
    """(kind, number of values, uncompressed bytes) of each page of a column chunk."""
    position = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        position = min(position, chunk.dictionary_page_offset)
    end = position + chunk.total_compressed_size
    if not 0 <= position <= end <= len(data):
        raise MalformedError(f"column {chunk.path_in_schema} lies outside the file")
    while position < end:
        try:
            header, position = _struct(data, position, depth=0)
            kind = header[_TYPE]
            count, num_bytes = header[_HEADER_OF[kind]][_NUM_VALUES], header[_UNCOMPRESSED]
            position += header[_COMPRESSED]
            negative = min(count, num_bytes, header[_COMPRESSED]) < 0  # a TypeError where one is no number
        except (KeyError, IndexError, TypeError) as error:
            raise MalformedError(f"column {chunk.path_in_schema} has a page of an unknown kind") from error
        if negative:
            raise MalformedError(f"column {chunk.path_in_schema} has a page of negative size")
        yield kind, count, num_bytes
    if position != end:
        raise MalformedError(f"the pages of column {chunk.path_in_schema} do not fill it")


def _struct(data: memoryview, position: int, *, depth: int) -> tuple[dict[int, Any], int]:
    """Field number -> integer or nested struct; None for what is only skipped."""
    if depth > _DEEPEST:
        raise MalformedError("page header nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while (lead := data[position]) != 0:
        position += 1
        if lead >> 4:
            number += lead >> 4
        else:
            number, position = _integer(data, position)
        fields[number], position = _value(data, position, lead & 0x0F, depth=depth)
    return fields, position + 1


def _value(data: memoryview, position: int, kind: int, *, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return None, position
    if kind == 3:  # one byte
        return None, position + 1
    if kind in (4, 5, 6):  # integers of 16, 32, 64 bits
        return _integer(data, position)
    if kind == 8:  # bytes
        length, position = _unsigned(data, position)
        return None, position + length
    if kind == 12:
        return _struct(data, position, depth=depth + 1)
    raise MalformedError(f"page header with a value of kind {kind}")


def _integer(data: memoryview, position: int) -> tuple[int, int]:
    raw, position = _unsigned(data, position)
    return (raw >> 1) ^ -(raw & 1), position


def _unsigned(data: memoryview, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return result, position
        if shift > 63:
            raise MalformedError("page header with an overlong number")
