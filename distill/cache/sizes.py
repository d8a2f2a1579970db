"""Shards and sequences flow in, what takes space in them flows out: bytes of columns, positions that do not repeat."""

from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

_PAGE = 1 << 20  # bytes of a page before compression, which sees no further
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers stay so


def column_bytes(footer: pq.FileMetaData) -> dict[str, int]:
    """Column -> bytes of its pages, in the order of the schema. What a file has beyond them is its footer."""
    sizes: dict[str, int] = {}
    groups = (footer.row_group(index) for index in range(footer.num_row_groups))
    for chunk in (group.column(index) for group in groups for index in range(footer.num_columns)):
        name = chunk.path_in_schema.split(".")[0]
        sizes[name] = sizes.get(name, 0) + chunk.total_compressed_size
    return sizes


def num_distinct(sequences: Sequence[NDArray[np.int32]], *, top_k: int) -> int:
    """Targets of a row group's ``input_ids`` whose tokens so far differ from those of earlier targets of their page.

    A causal teacher leaves the same numbers for the same beginning (system prompts, templates), and the compression of
    a page of ``topk_ids`` makes nearly nothing of the second time.
    """
    hashes = np.concatenate([_beginnings(ids[:-1]) for ids in sequences])
    window = max(1, _PAGE // (4 * top_k))
    return sum(len(np.unique(hashes[start : start + window])) for start in range(0, len(hashes), window))


def _beginnings(ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """A hash of every beginning ``ids[: t + 1]``: the polynomial of its ids modulo 2^64, [L]."""
    powers = np.cumprod(np.full(len(ids), _STEP))
    hashes: NDArray[np.uint64] = np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * powers)
    return hashes
