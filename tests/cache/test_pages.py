"""A shard that would unfold to more than its record declares is refused before a page is decompressed."""

import contextlib
import hashlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.cache import document, pages
from distill.cache.plan import Commit, Manifest
from distill.cache.reader import CacheReader
from distill.cache.schema import parquet_options
from distill.errors import CorruptionError


def forge(cache: Path, table: pa.Table, reader: CacheReader, **options: Any) -> CacheReader:
    """Replace the first shard by ``table`` with a record that vouches for it: right hash, sizes, and row counts."""
    commit = reader.commits[0]
    file = BytesIO()
    pq.write_table(table, file, row_group_size=3, **{**parquet_options(reader.layout), **options})
    content = file.getvalue()
    (cache / commit.shard).write_bytes(content)
    forged = replace(commit, sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
    path = cache / "manifest.json"
    manifest = document.parse(Manifest, path.read_bytes(), path=path, fix="")
    path.write_bytes(document.render(manifest.model_copy(update={"commits": (forged, *manifest.commits[1:])})))
    return CacheReader.open(cache)


def replaced(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))


def refusal(reader: CacheReader) -> str:
    before = pa.total_allocated_bytes()
    with pytest.raises(CorruptionError, match="is not the file that was committed") as caught:
        reader.read_unit(reader.commits[0])
    assert pa.total_allocated_bytes() - before < 2**20
    return str(caught.value)


@pytest.fixture
def opened(cache: Path) -> tuple[Path, CacheReader, pa.Table]:
    reader = CacheReader.open(cache)
    return cache, reader, reader.read_unit(reader.commits[0])


def test_a_faithful_copy_passes(opened: tuple[Path, CacheReader, pa.Table]) -> None:
    cache, reader, table = opened
    copy = forge(cache, table, reader)
    assert copy.read_unit(copy.commits[0]).equals(table)


def test_a_text_bomb(opened: tuple[Path, CacheReader, pa.Table]) -> None:
    cache, reader, table = opened
    bomb = forge(cache, replaced(table, "prompt", ["x" * 50_000_000, "", "", ""]), reader)
    assert (cache / bomb.commits[0].shard).stat().st_size < 100_000
    assert "it unfolds to 50" in refusal(bomb)


def test_a_dictionary_bomb(opened: tuple[Path, CacheReader, pa.Table]) -> None:
    cache, reader, table = opened
    assert "column prompt unfolds from a dictionary" in refusal(forge(cache, table, reader, use_dictionary=["prompt"]))


@pytest.mark.parametrize("name", ["input_ids", "topk_logprobs", "hidden_2", "loss_mask"])
def test_a_list_bomb(opened: tuple[Path, CacheReader, pa.Table], name: str) -> None:
    cache, reader, table = opened
    lists = table.column(name).to_pylist()
    lists[0] = lists[0] * 100
    assert f"column {name}.list.element has" in refusal(forge(cache, replaced(table, name, lists), reader))


def test_other_row_counts(opened: tuple[Path, CacheReader, pa.Table]) -> None:
    cache, reader, table = opened
    assert "it has 3 rows, its record 4" in refusal(forge(cache, table.slice(0, 3), reader))


def test_other_columns(opened: tuple[Path, CacheReader, pa.Table]) -> None:
    cache, reader, table = opened
    forged = forge(cache, table.drop_columns(["entropy"]), reader)
    assert "its columns are not those of this cache" in refusal(forged)


def test_page_kinds_that_no_cache_has(opened: tuple[Path, CacheReader, pa.Table]) -> None:
    cache, reader, table = opened
    assert "a page of an unknown kind" in refusal(forge(cache, table, reader, data_page_version="2.0"))


def test_sizes_of_a_known_file() -> None:
    table = pa.table({"x": np.arange(5000, dtype=np.int64), "name": ["a", "b"] * 2500})
    file = BytesIO()
    pq.write_table(table, file, row_group_size=2500, use_dictionary=["name"], write_page_checksum=True)
    metadata = pq.ParquetFile(BytesIO(file.getvalue())).metadata
    sizes = pages.column_sizes(memoryview(file.getvalue()), metadata)
    assert sizes["x"].num_values == sizes["name"].num_values == 5000
    assert 40_000 <= sizes["x"].num_bytes < 40_100
    assert (sizes["x"].has_dictionary, sizes["name"].has_dictionary) == (False, True)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damaged_headers_raise_one_error_only(data: st.DataObject) -> None:
    file = BytesIO()
    pq.write_table(pa.table({"x": np.arange(300), "y": ["some text"] * 300}), file, write_page_checksum=True)
    metadata = pq.ParquetFile(BytesIO(file.getvalue())).metadata
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(pages.MalformedError):
        pages.column_sizes(memoryview(bytes(content)), metadata)


def test_the_record_is_what_bounds_a_read(cache: Path) -> None:
    commit = CacheReader.open(cache).commits[0]
    assert isinstance(commit, Commit)
    assert commit.num_decoded_bytes < 20_000
