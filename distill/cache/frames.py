"""A cache folder, or one shard of it, flows in; a DataFrame that a person can look at flows out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distill.cache import storage
from distill.cache.codec import SAMPLED, sampled_starts
from distill.cache.reader import CacheReader
from distill.cache.schema import Layout, layout_of, values_per_row
from distill.cache.shard import open_shard
from distill.errors import CorruptionError, DataError

if TYPE_CHECKING:
    import pandas as pd


def open_frame(path: str | Path, *, columns: list[str] | None = None) -> "pd.DataFrame":
    """One row for each sequence, of a whole cache or of one shard; sealed or not.

    ``topk_ids`` and ``topk_logprobs`` are arrays of [L-1, k], ``log_z`` and ``log_tail`` of [L-1, n_T],
    ``hidden_<bits>`` of [L-1, r_bits]; ``input_ids`` [L], ``loss_mask`` and ``entropy`` [L-1]. Target t describes
    ``input_ids[t + 1]``; ``sampled_ids`` and ``sampled_counts`` are lists with an array for each target,
    ``layer<i>_…`` arrays of [L-1, width]. ``columns`` reads a few of them only, which is quicker.

    Raises DataError when there is no cache, CorruptionError when a shard is not what was committed, UsageError for a
    URL that is not S3's, StorageError or RetryError when S3 refuses.
    """
    root = storage.root_of(path)
    if isinstance(root, Path) and root.is_file():
        tables = [_read_shard(root, columns)]
    else:
        reader = CacheReader.open(path, allow_incomplete=True)
        tables = [reader.read_unit(commit, columns=columns) for commit in reader.commits]
        if not tables:
            raise DataError(f"{path} has no committed unit yet. Run `distill cache-teacher` first.")
    return _frame(tables)


def _read_shard(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        with open_shard(path) as file:
            return file.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise CorruptionError(f"{path} cannot be read: {error}. Restore it from a copy.") from error


def _frame(tables: list[pa.Table]) -> "pd.DataFrame":
    import pandas as pd

    table = pa.concat_tables(tables)
    layout = layout_of(table.schema)
    if layout is None:
        raise DataError("this Parquet file is no shard of a cache. Name a cache's folder or one of its shards.")
    widths = {name: per_target for name, (per_target, _) in values_per_row(layout).items()}
    flat = ("input_ids", "loss_mask", "entropy")
    data: dict[str, Any] = {}
    for name in table.column_names:
        column = table.column(name)
        if name == "metadata":
            data[name] = [dict(pairs) for pairs in column.to_pylist()]
        elif name in SAMPLED:
            data[name] = _by_position(table, name, layout)
        elif name in widths:
            arrays = _arrays(column)
            data[name] = arrays if name in flat else [array.reshape(-1, widths[name]) for array in arrays]
        else:
            data[name] = column.to_pandas()
    return pd.DataFrame(data)


def _by_position(table: pa.Table, name: str, layout: Layout) -> list[list[NDArray[Any]]]:
    """For each row one array for each position. Needs the counts, whichever of the two columns was asked for."""
    if "sampled_counts" not in table.column_names:
        raise DataError("sampled_ids cannot be split by position without sampled_counts: read both columns.")
    starts = [sampled_starts(counts, layout.num_samples) for counts in _arrays(table.column("sampled_counts"))]
    return [np.split(values, start[1:]) for values, start in zip(_arrays(table.column(name)), starts, strict=True)]


def _arrays(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    return [row.values.to_numpy(zero_copy_only=False) for chunk in column.chunks for row in chunk]
