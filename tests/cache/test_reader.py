"""A reader gives what was committed or refuses, naming unit and file; it never gives anything else."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache import document
from distill.cache.plan import Commit, Manifest
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError, DataError, IdentityError, UsageError

Filler = Callable[[Path, int | None], CacheWriter]


def read_all(root: Path) -> None:
    reader = CacheReader.open(root)
    for commit in reader.commits:
        reader.sequences(commit, "train")
        reader.sequences(commit, "eval")


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_what_a_reader_tells(cache: Path, teacher: Any, plan: Any) -> None:
    reader = CacheReader.open(cache)
    assert reader.sealed
    assert reader.identity == plan.identity
    assert (reader.top_k, reader.temperatures, reader.hidden_bytes) == (8, (4.0, 2.0, 1.0), 8)
    assert reader.domains == ("general", "medical")
    assert [commit.unit for commit in reader.units("medical")] == ["00003", "00004"]
    assert len(reader.units()) == reader.num_units == 5
    assert (reader.num_rows(), reader.num_rows("medical"), reader.num_rows("medical", "eval")) == (16, 6, 1)
    assert reader.num_rows(split="train") == 13
    assert reader.teacher_dir == cache / "teacher"
    assert reader.projection is not None
    assert reader.projection.sha256 == teacher.projection.sha256
    assert reader.projection is reader.projection


def test_temperatures_that_are_not_held_are_refused(cache: Path) -> None:
    reader = CacheReader.open(cache)
    assert [reader.temperature_index(T) for T in (4.0, 2, 1.0)] == [0, 1, 2]
    with pytest.raises(IdentityError, match="holds targets for the temperatures 4, 2, 1, not 3") as caught:
        reader.temperature_index(3.0)
    assert caught.value.exit_code == 4


def test_columns_can_be_chosen(cache: Path) -> None:
    reader = CacheReader.open(cache)
    table = reader.read_unit(reader.commits[0], columns=["prompt", "log_z"])
    assert table.column_names == ["prompt", "log_z"]
    assert table.num_rows == 4


def test_incomplete_caches_are_refused_with_a_count(tmp_path: Path, filler: Filler) -> None:
    filler(tmp_path, 3)
    with pytest.raises(DataError, match=r"incomplete: 3 of 5 units are committed\. Run the same .* again") as caught:
        CacheReader.open(tmp_path)
    assert caught.value.exit_code == 3
    reader = CacheReader.open(tmp_path, allow_incomplete=True)
    assert not reader.sealed
    assert (len(reader.commits), reader.num_units, reader.num_rows()) == (3, 5, 10)


def test_a_cache_that_was_not_sealed_says_so(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"5 of 5 units are committed but manifest\.json is missing"):
        CacheReader.open(cache)


def test_no_cache(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="no cache at"):
            CacheReader.open(path)
    with pytest.raises(UsageError, match="URL"):
        CacheReader.open("gs://bucket/cache")


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "commits/00002.json"])
def test_flipped_bits_in_records_are_caught(cache: Path, name: str) -> None:
    path = cache / name
    rng = np.random.default_rng(0)
    original = path.read_bytes()
    if name != "manifest.json":
        (cache / "manifest.json").unlink()
    for _ in range(100):
        flip(path, int(rng.integers(len(original))), int(rng.integers(8)))
        with pytest.raises(CorruptionError, match=path.name):
            CacheReader.open(cache, allow_incomplete=True)
        path.write_bytes(original)


def test_flipped_bits_in_shards_are_caught(cache: Path) -> None:
    reader = CacheReader.open(cache)
    path = cache / reader.commits[1].shard
    original = path.read_bytes()
    rng = np.random.default_rng(0)
    footer = len(original) - int.from_bytes(original[-8:-4], "little") - 8
    positions = [*rng.integers(0, footer, 50), *rng.integers(footer, len(original), 50)]
    for position in positions:
        flip(path, int(position), int(rng.integers(8)))
        with pytest.raises(CorruptionError, match=f"unit 00001: .*{path.name}"):
            read_all(cache)
        path.write_bytes(original)


def test_pages_that_rot_after_the_first_read_are_caught(cache: Path) -> None:
    reader = CacheReader.open(cache)
    commit = reader.commits[0]
    reader.sequences(commit, "train")
    footer = reader.read_unit(commit)
    assert footer.num_rows == 4
    path = cache / commit.shard
    original = path.read_bytes()
    end = len(original) - int.from_bytes(original[-8:-4], "little") - 8
    caught = 0
    for position in range(4, end, 97):
        flip(path, position, 2)
        try:
            unchanged = reader.read_unit(commit).equals(footer)
        except CorruptionError as error:
            caught += "unit 00000" in str(error)
        else:
            assert unchanged  # a byte that nobody uses
        path.write_bytes(original)
    assert caught > 0.5 * len(range(4, end, 97))


def test_the_footer_of_the_first_read_is_kept(cache: Path) -> None:
    reader = CacheReader.open(cache)
    commit = reader.commits[0]
    first = reader.read_unit(commit)
    path = cache / commit.shard
    flip(path, path.stat().st_size - 20, 0)
    assert reader.read_unit(commit).equals(first)


@pytest.mark.parametrize("damage", ["missing", "truncated", "extended", "swapped", "empty"])
def test_damaged_shards_are_refused(cache: Path, damage: str) -> None:
    commits = CacheReader.open(cache).commits
    path, other = cache / commits[0].shard, cache / commits[1].shard
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "extended":
        path.write_bytes(content + b"\0")
    elif damage == "swapped":
        shutil.copy(other, path)
    else:
        path.write_bytes(b"")
    with pytest.raises(CorruptionError, match=f"unit 00000: .*{path.name}") as caught:
        read_all(cache)
    assert caught.value.exit_code == 5


def test_another_projection_is_refused(cache: Path, make_teacher: Any) -> None:
    (cache / "projection.safetensors").write_bytes(make_teacher(top_k=4, hidden_bytes=7).projection.to_bytes())
    with pytest.raises(CorruptionError, match="not the projection that the units were made with"):
        _ = CacheReader.open(cache).projection
    (cache / "projection.safetensors").unlink()
    with pytest.raises(CorruptionError, match=r"projection\.safetensors"):
        _ = CacheReader.open(cache).projection
    with pytest.raises(CorruptionError, match=r"projection\.safetensors"):
        read_all(cache)


@pytest.mark.parametrize("shard", ["../outside.parquet", "/etc/passwd", "https://example.org/x.parquet"])
def test_records_that_point_out_of_the_cache_are_refused(cache: Path, shard: str) -> None:
    path = cache / "manifest.json"
    manifest = document.parse(Manifest, path.read_bytes(), path=path, fix="")
    forged = replace(manifest.commits[0], shard=shard)
    path.write_bytes(document.render(manifest.model_copy(update={"commits": (forged, *manifest.commits[1:])})))
    with pytest.raises(CorruptionError, match="may lie outside its folder"):
        read_all(cache)


@pytest.mark.parametrize("name", ["manifest.json", "projection.safetensors", "shard"])
def test_a_link_in_place_of_a_file_is_refused(cache: Path, name: str) -> None:
    path = cache / (CacheReader.open(cache).commits[0].shard if name == "shard" else name)
    moved = cache / "moved.parquet"
    path.rename(moved)
    path.symlink_to(moved)
    with pytest.raises(CorruptionError, match="symbolic link"):
        read_all(cache)


def test_readers_travel_to_worker_processes(cache: Path) -> None:
    reader = CacheReader.open(cache)
    reader.sequences(reader.commits[0], "train")
    copy = pickle.loads(pickle.dumps(reader))
    path = cache / reader.commits[0].shard
    flip(path, path.stat().st_size - 20, 0)
    with pytest.raises(CorruptionError):  # the copy checks the whole shard anew
        copy.sequences(copy.commits[0], "train")


def test_a_commit_of_another_kind_is_refused(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    path = cache / "commits" / "00000.json"
    commit = document.parse(Commit, path.read_bytes(), path=path, fix="")
    path.write_bytes(document.render(commit).replace(b'"generation": 1', b'"generation": 2'))
    with pytest.raises(CorruptionError, match="damaged"):
        CacheReader.open(cache, allow_incomplete=True)


def test_a_run_is_told_from_a_cache(tmp_path):
    (tmp_path / "stage1").mkdir()
    with pytest.raises(DataError, match="is a run of `distill train`, no cache"):
        CacheReader.open(tmp_path)
