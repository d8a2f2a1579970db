"""The DataFrame that people look at: shapes, values, and the same from a folder and from one shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill.cache.frames import open_frame
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError, DataError, UsageError


def test_one_row_per_sequence_with_shaped_arrays(cache: Path, teacher: Any) -> None:
    frame = open_frame(cache)
    assert len(frame) == 16
    row = frame.iloc[0]
    num = len(row["input_ids"]) - 1
    assert row["topk_ids"].shape == row["topk_logprobs"].shape == (num, 8)
    assert row["log_z"].shape == row["log_tail"].shape == (num, 3)
    assert row["entropy"].shape == row["loss_mask"].shape == (num,)
    assert row["hidden_4"].shape == (num, dict(teacher.projection.widths)[4])
    assert frame["metadata"][1] == {"department": "cardiology"}
    assert set(frame["domain"]) == {"general", "medical"}


def test_values_are_those_of_the_reader(cache: Path) -> None:
    reader = CacheReader.open(cache)
    rows = [row for commit in reader.commits for split in ("train", "eval") for row in reader.sequences(commit, split)]
    frame = open_frame(cache)
    for index, row in enumerate(rows):
        assert frame["sequence_id"][index] == row.prompt.sequence_id
        np.testing.assert_array_equal(frame["topk_logprobs"][index], row.targets.topk_logprobs)
        np.testing.assert_array_equal(frame["loss_mask"][index], row.prompt.loss_mask)


def test_columns_one_shard_and_incomplete_caches(tmp_path: Path, filler: Callable[..., Any]) -> None:
    filler(tmp_path, 1)
    whole = open_frame(tmp_path, columns=["prompt", "topk_ids"])
    assert list(whole.columns) == ["prompt", "topk_ids"]
    shard = CacheReader.open(tmp_path, allow_incomplete=True).commits[0].shard
    assert list(open_frame(tmp_path / shard)["prompt"]) == list(whole["prompt"])


def test_what_is_no_cache(tmp_path: Path, filler: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="no cache at"):
        open_frame(tmp_path)
    filler(tmp_path / "empty", 0)
    with pytest.raises(DataError, match="no committed unit yet"):
        open_frame(tmp_path / "empty")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CorruptionError, match="cannot be read"):
        open_frame(tmp_path / "x.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match="no shard of a cache"):
        open_frame(tmp_path / "y.parquet")
    with pytest.raises(UsageError):
        open_frame("gs://bucket/x")
