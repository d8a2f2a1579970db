"""Rows flow into a Parquet file, train rows first; tables flow out of it, checked page by page.

A row group never mixes splits, so that the rows of one split are read without touching the other.
"""

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

from distill.cache import pages
from distill.cache.codec import SAMPLED, encode
from distill.cache.plan import Commit
from distill.cache.schema import Layout, parquet_options, row_schema, values_per_row
from distill.records import SequenceTargets, Split

GROUP_TARGETS = 2**15  # targets in a row group: bounds the memory of one read and of one write
_SLACK = 2**16  # bytes by which a small shard's pages may exceed its columns


def write_rows(file: BinaryIO, rows: Sequence[SequenceTargets], layout: Layout) -> int:
    """Write rows as a Parquet file; returns the bytes of its columns in memory. Train rows must precede eval rows."""
    num_bytes = 0
    with pq.ParquetWriter(file, row_schema(layout), **parquet_options(layout)) as writer:
        for group in row_groups(rows):
            table = encode(group, layout)
            num_bytes += table.nbytes
            writer.write_table(table, row_group_size=len(group))
    return num_bytes


def row_groups(rows: Sequence[SequenceTargets]) -> Iterator[list[SequenceTargets]]:
    """Consecutive rows of one split with about GROUP_TARGETS targets."""
    group: list[SequenceTargets] = []
    num_targets = 0
    for row in rows:
        if group and (num_targets >= GROUP_TARGETS or row.prompt.split != group[0].prompt.split):
            yield group
            group, num_targets = [], 0
        group.append(row)
        num_targets += row.prompt.num_targets
    if group:
        yield group


def open_shard(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A Parquet file whose pages are checked as they are read. ``metadata``: a footer that was verified before."""
    return pq.ParquetFile(path, metadata=metadata, page_checksum_verification=True)


def groups_of(metadata: pq.FileMetaData, *, num_train: int, split: Split | None) -> list[int]:
    """Row groups of one split, or all: the first ones hold the ``num_train`` train rows."""
    chosen = []
    start = 0
    for group in range(metadata.num_row_groups):
        if split is None or (split == "train") == (start < num_train):
            chosen.append(group)
        start += metadata.row_group(group).num_rows
    return chosen


def bounds_problem(path: Path, metadata: pq.FileMetaData, commit: Commit, layout: Layout) -> str | None:
    """How a shard would take more memory than its commit record declares, or None when it keeps to it.

    Nothing is decompressed: page headers are added up, since the footer may lie.
    """
    if metadata.num_rows != commit.num_rows.total:
        return f"it has {metadata.num_rows} rows, its record {commit.num_rows.total}"
    try:
        sizes = _column_sizes(path, metadata)
    except pages.MalformedError as error:
        return str(error)
    num_bytes = sum(size.num_bytes for size in sizes.values())
    if num_bytes > 2 * commit.num_decoded_bytes + _SLACK:
        return f"it unfolds to {num_bytes} bytes, its record says {commit.num_decoded_bytes}"
    problems = (_column_problem(name, size, commit, layout) for name, size in sizes.items())
    return next((problem for problem in problems if problem), None)


def _column_sizes(path: Path, metadata: pq.FileMetaData) -> dict[str, pages.ColumnSize]:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        return pages.column_sizes(view, metadata)


def _column_problem(leaf: str, size: pages.ColumnSize, commit: Commit, layout: Layout) -> str | None:
    if size.has_dictionary and leaf not in parquet_options(layout)["use_dictionary"]:
        return f"column {leaf} unfolds from a dictionary"
    name, num_targets = leaf.removesuffix(".list.element"), commit.num_targets.total
    if name in SAMPLED and not num_targets <= size.num_values <= layout.num_samples * num_targets:
        return f"column {leaf} has {size.num_values} values, more or less than its record can have"
    per_target, extra_per_row = values_per_row(layout).get(name, (0, 0))
    wanted = per_target * num_targets + extra_per_row * commit.num_rows.total
    if per_target and size.num_values != wanted:
        return f"column {leaf} has {size.num_values} values, its record {wanted}"
    return None
