"""A repair outdates the units that it names and the manifest, no others, and nothing is ever overwritten."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cache import generations
from distill.cache.plan import Plan
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError, DataError
from distill.records import Reject

Filler = Callable[[Path, int | None], CacheWriter]
BROKEN = {"00001": "its shard has rotted"}


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_without_repairs_everything_is_of_generation_1(cache: Path) -> None:
    current = generations.current(cache)
    assert (current.number, current.manifest_name) == (1, "manifest.json")
    assert (current.of("00001"), current.commit_name("00001")) == (1, "commits/00001.json")


def test_units_keep_the_generation_of_the_last_repair_that_names_them(cache: Path) -> None:
    assert generations.request(cache, after=1, units={"00001": "", "00002": ""})
    assert generations.request(cache, after=2, units={"00002": ""})
    current = generations.current(cache)
    assert [current.of(unit) for unit in ("00000", "00001", "00002")] == [1, 2, 3]
    assert (current.commit_name("00002"), current.manifest_name) == ("commits/00002.3.json", "manifest.3.json")


def test_the_first_of_two_repairs_wins(cache: Path) -> None:
    assert generations.request(cache, after=1, units=BROKEN)
    before = contents(cache)
    assert not generations.request(cache, after=1, units={"00003": ""})
    assert contents(cache) == before


def test_a_reader_never_sees_what_a_repair_asks_for(cache: Path) -> None:
    generations.request(cache, after=1, units=BROKEN)
    with pytest.raises(DataError, match=r"4 of 5 units are committed\. Run the same"):
        CacheReader.open(cache)
    reader = CacheReader.open(cache, allow_incomplete=True)
    assert [commit.unit for commit in reader.commits] == ["00000", "00002", "00003", "00004"]


def test_a_repair_of_the_manifest_alone_says_so(cache: Path) -> None:
    generations.request(cache, after=1, units={})
    with pytest.raises(DataError, match=r"5 of 5 units are committed but manifest\.2\.json is missing"):
        CacheReader.open(cache)


def test_a_rerun_fills_what_was_asked_for_and_nothing_else(cache: Path, filler: Filler) -> None:
    before, old = contents(cache), CacheReader.open(cache).commits
    generations.request(cache, after=1, units=BROKEN)
    writer = filler(cache, 0)
    assert [unit.unit for unit in writer.missing_units()] == ["00001"]
    assert writer.seal() is None
    filler(cache, None)
    after, new = contents(cache), CacheReader.open(cache).commits
    assert new[1].generation == 2
    assert new[1].shard == f"shards/00001.2-{new[1].nonce}.parquet"
    assert [commit for commit in new if commit.generation == 1] == [old[0], *old[2:]]
    assert after.keys() - before.keys() == {
        "repairs/2.json",
        "commits/00001.2.json",
        "manifest.2.json",
        new[1].shard,
    }
    assert before.keys() - after.keys() == {old[1].shard}
    assert [name for name in before.keys() & after.keys() if before[name] != after[name]] == []


def test_repairs_repeat(cache: Path, filler: Filler) -> None:
    for number in (1, 2, 3):
        generations.request(cache, after=number, units=BROKEN)
        filler(cache, None)
        assert [commit.generation for commit in CacheReader.open(cache).commits] == [1, number + 1, 1, 1, 1]


def test_rejects_are_numbered_like_the_shard(
    cache: Path, plan: Plan, teacher: Any, rows_of: Any, filler: Filler
) -> None:
    generations.request(cache, after=1, units=BROKEN)
    rows = rows_of(teacher, plan.units[1])
    reject = Reject(domain="general", source=rows[0].prompt.source, reason="empty")
    commit = filler(cache, 0).commit(plan.units[1], rows[1:], rejects=[reject], num_input_rows=4)
    assert commit.rejects == f"rejects/00001.2-{commit.nonce}.jsonl"


def test_a_seal_of_the_old_generation_spares_the_files_of_the_new_one(
    tmp_path: Path, filler: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer may have read the repairs, and stop for a while, before another one is asked for and answered."""
    late = filler(tmp_path, None)
    (tmp_path / "manifest.json").unlink()
    before = generations.current(tmp_path)
    generations.request(tmp_path, after=1, units=BROKEN)
    filler(tmp_path, None)
    repaired = contents(tmp_path)
    monkeypatch.setattr(generations, "current", lambda _root: before)
    assert late.seal() is not None
    monkeypatch.undo()
    assert repaired.items() <= contents(tmp_path).items()
    assert CacheReader.open(tmp_path).commits[1].generation == 2


def test_a_damaged_repair_is_refused(cache: Path, filler: Filler) -> None:
    generations.request(cache, after=1, units=BROKEN)
    path = cache / "repairs" / "2.json"
    original = path.read_bytes()
    path.write_bytes(original.replace(b"00001", b"00002"))
    for use in (lambda: CacheReader.open(cache), lambda: filler(cache, 0).missing_units()):
        with pytest.raises(CorruptionError, match=r"repairs/2\.json is damaged.*delete it"):
            use()
    path.write_bytes(original)
    shutil.copy(path, cache / "repairs" / "3.json")
    with pytest.raises(CorruptionError, match=r"repairs/3\.json is the repair of generation 2"):
        generations.current(cache)


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("00001-0123456789abcdef.parquet", 1),
        ("00001.2-0123456789abcdef.parquet", 2),
        (".00001.12-0123456789abcdef.jsonl.0123456789abcdef.partial", 12),
        (".00001-0123456789abcdef.parquet.0123456789abcdef.partial", 1),
        ("surprise", 1),
        ("a.²-b", 1),
    ],
)
def test_file_names_tell_their_generation(name: str, generation: int) -> None:
    assert generations.generation_of(name) == generation
    if generation > 1 and not name.startswith("."):
        assert generations.shard_stem("00001", generation, "0123456789abcdef") == name.removesuffix(".parquet")
