"""Files of a cache that are not what they should be, each by its own words.

What it protects: damage and refusals of the disk are told as such, with the exit code that scripts act on.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distill.cache import codec, document, storage, tensors
from distill.cache.frames import open_frame
from distill.cache.identity import model_files_hash
from distill.cache.manifest import load_manifest
from distill.cache.plan import Commit
from distill.cache.projection import widths_of
from distill.cache.reader import CacheReader
from distill.cache.schema import Layout
from distill.cache.shard import write_rows
from distill.errors import CorruptionError, DataError, DistillError, StorageError, UsageError
from distill.records import SequenceTargets


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "plan.json")
    storage.inside(folder, "plan.json")


def sparse(folder: Path) -> None:
    path = folder / "plan.json"
    with path.open("wb") as file:
        file.truncate(2**32 + 1)
    storage.read(path)


def folder_for_a_file(folder: Path) -> None:
    storage.read(folder)


def folder_for_weights(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    model_files_hash(folder)


def projection_without_widths(folder: Path) -> None:
    path = folder / "projection.safetensors"
    path.write_bytes(tensors.dump({"mean": np.zeros(3, np.float32)}, {}))
    widths_of(path)


@pytest.mark.parametrize(
    ("provoke", "error", "says"),
    [
        (lambda _: storage.root_of("s3://"), UsageError, r"s3:// names no bucket\. Write s3://bucket/prefix"),
        (pipe, CorruptionError, "plan.json is neither a file nor a folder. Delete it"),
        (sparse, CorruptionError, "plan.json is far larger than such a file ever is"),
        (folder_for_a_file, StorageError, "cannot read .*: Is a directory. Check the path and its rights"),
        (folder_for_weights, StorageError, "cannot read the weights in .* Check the folder and its rights"),
        (projection_without_widths, CorruptionError, "projection.safetensors does not state its widths"),
    ],
)
def test_what_cannot_be_read_is_told_by_its_name(
    tmp_path: Path, provoke: Callable[[Path], Any], error: type[DistillError], says: str
) -> None:
    with pytest.raises(error, match=says):
        provoke(tmp_path)


def test_a_bucket_without_s3fs_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)  # one that was found before
    with pytest.raises(UsageError, match=r"s3:// needs s3fs, which is not installed\. Run pip install"):
        storage.names(storage.root_of("s3://bucket/cache"), "commits")


@pytest.fixture
def drawn(teacher: Any) -> tuple[SequenceTargets, Layout]:
    """A row with four draws at each position."""
    row = teacher.sequence(0)
    num = row.prompt.num_targets
    counts = {"sampled_ids": np.zeros(num, np.int32), "sampled_counts": np.full(num, 4, np.int16)}
    layout = Layout(top_k=teacher.top_k, temperatures=(4.0, 2.0, 1.0), widths=teacher.projection.widths, num_samples=4)
    return replace(row, targets=replace(row.targets, **counts)), layout


def test_draws_that_do_not_add_up_are_refused(drawn: tuple[SequenceTargets, Layout]) -> None:
    row, layout = drawn
    table = codec.encode([row], layout)
    place = table.schema.get_field_index("sampled_counts")
    counts = table.column(place).to_pylist()[0]
    short = pa.array([[*counts[:-1], 3]], table.schema.field(place).type)
    with pytest.raises(CorruptionError, match="sampled_counts does not have the draws that the rows' tokens call for"):
        list(codec.decode(table.set_column(place, table.schema.field(place), short), layout))


def test_draws_cannot_be_split_without_their_counts(tmp_path: Path, drawn: tuple[SequenceTargets, Layout]) -> None:
    row, layout = drawn
    with (tmp_path / "shard.parquet").open("wb") as file:
        write_rows(file, [row], layout)
    with pytest.raises(DataError, match="sampled_ids cannot be split by position without sampled_counts"):
        open_frame(tmp_path / "shard.parquet", columns=["sampled_ids"])


def forged(root: Path, change: Callable[[Commit], Commit]) -> CacheReader:
    """A reader of the cache whose manifest has the first record changed, its checksum right."""
    path = root / "manifest.json"
    manifest = load_manifest(root, path.name, fix="")
    first, *others = manifest.commits
    path.write_bytes(document.render(manifest.model_copy(update={"commits": (change(first), *others)})))
    return CacheReader.open(root)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"unit": "00001"}, "two records name the same unit, so rows would come twice"),
        ({"num_decoded_bytes": 1}, "the record of unit 00000 claims .* which no shard can hold"),
    ],
)
def test_records_that_cannot_be_true(cache: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CorruptionError, match=says):
        forged(cache, lambda commit: replace(commit, **changes))


def test_rows_of_another_domain_than_their_record_says(cache: Path) -> None:
    reader = forged(cache, lambda commit: replace(commit, domain="medical"))
    with pytest.raises(CorruptionError, match=r"unit 00000: .*holds rows of another domain than its record"):
        reader.read_unit(reader.commits[0])


def test_a_missing_shard_is_found_before_anything_is_read(cache: Path) -> None:
    next((cache / "shards").glob("00001-*.parquet")).unlink()
    with pytest.raises(CorruptionError, match=r"unit 00001: .*\.parquet is missing\. Restore the file from a copy"):
        CacheReader.open(cache).require_shards()
