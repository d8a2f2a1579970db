"""verify --repair asks for exactly the broken units, a rerun makes them, and everything else stays as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache import generations, storage
from distill.cache.identity import file_hash
from distill.cache.plan import Plan
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError, RetryError
from distill.report.repair import repair
from distill.report.verify import verify
from tests.cache.conftest import fill, rows_of


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 4
    path.write_bytes(content)


def rerun(root: Path, plan: Plan, teacher: Any) -> list[str]:
    """What the same cache-teacher command does: the missing units, then the manifest. Returns the units."""
    writer = CacheWriter.open(root, plan)
    missing = writer.missing_units()
    for unit in missing:
        writer.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
    assert writer.seal() is not None
    return [unit.unit for unit in missing]


def command(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return done.exit_code, done.stdout


def test_from_a_flipped_bit_to_a_clean_cache_by_the_command_line(cache: Path, plan: Plan, teacher: Any) -> None:
    before, broken = contents(cache), CacheReader.open(cache).commits[2]
    flip(cache / broken.shard, 200)
    damaged = contents(cache)
    code, output = command(cache)
    assert code == 5
    assert "00002" in output
    assert contents(cache) == damaged  # without --repair it only tells
    code, output = command(cache, "--repair")
    assert code == 0
    assert "1 units (00002). Run the same `distill cache-teacher` command" in output
    assert contents(cache).keys() - damaged.keys() == {"repairs/2.json"}
    code, output = command(cache, "--json")
    assert (code, json.loads(output)["num_committed"], json.loads(output)["sealed"]) == (0, 4, False)
    assert rerun(cache, plan, teacher) == ["00002"]
    code, output = command(cache, "--json")
    told = json.loads(output)
    assert (code, told["ok"], told["sealed"], told["generation"], told["num_rows"]) == (0, True, True, 2, 16)
    after = contents(cache)
    assert {name: before[name] for name in before if name != broken.shard}.items() <= after.items()


def test_nothing_to_repair(cache: Path) -> None:
    before = contents(cache)
    code, output = command(cache, "--repair", "--json")
    assert (code, json.loads(output)["requeued"]) == (0, [])
    assert contents(cache) == before


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=st.dictionaries(st.integers(0, 4), st.sampled_from(["shard", "record", "gone", "no record"]), min_size=1))
def test_any_damage_to_units_is_repaired(cache: Path, plan: Plan, teacher: Any, damage: dict[int, str]) -> None:
    root = cache.with_name("damaged")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(cache, root)
    for index, kind in damage.items():
        commit = CacheReader.open(cache).commits[index]
        path = root / (commit.shard if kind in ("shard", "gone") else f"commits/{commit.unit}.json")
        if kind in ("shard", "record"):
            flip(path, 150 + index)
        else:
            path.unlink()
    wanted = [f"{index:05d}" for index in sorted(damage)]
    assert sorted(repair(verify(root))) == wanted
    assert rerun(root, plan, teacher) == wanted
    report = verify(root)
    assert (report.ok, report.sealed, report.num_rows) == (True, True, 16)


def test_repairs_repeat(cache: Path, plan: Plan, teacher: Any) -> None:
    for generation in (2, 3):
        flip(cache / CacheReader.open(cache).commits[1].shard, 99)
        assert repair(verify(cache)) == ("00001",)
        rerun(cache, plan, teacher)
        assert CacheReader.open(cache).commits[1].generation == generation
        assert verify(cache).ok


@pytest.mark.parametrize("damage", ["flipped", "other"])
def test_a_broken_manifest_is_sealed_anew(cache: Path, plan: Plan, teacher: Any, damage: str) -> None:
    if damage == "flipped":
        flip(cache / "manifest.json", 300)
    else:
        other = cache.with_name("other")
        fill(other, teacher, plan)
        shutil.copy(other / "manifest.json", cache / "manifest.json")
    code, output = command(cache, "--repair")
    assert code == 0
    assert "To be made again: the manifest." in output
    assert rerun(cache, plan, teacher) == []
    report = verify(cache)
    assert (report.ok, report.generation) == (True, 2)


@pytest.mark.parametrize("name", ["plan.json", "projection.safetensors", "teacher/tokenizer.json", "repairs/2.json"])
def test_what_only_a_copy_can_restore_is_refused(cache: Path, name: str) -> None:
    if name.startswith("repairs"):
        generations.request(cache, after=1, units={})
    flip(cache / name, (cache / name).stat().st_size // 2)
    flip(min((cache / "shards").iterdir()), 200)
    before = contents(cache)
    with pytest.raises(CorruptionError, match=rf"is not repaired: .*{name.partition('/')[0]}.*from a copy"):
        repair(verify(cache))
    assert contents(cache) == before


def test_a_unit_that_the_disk_does_not_hand_over_is_not_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = CacheReader.open(cache).commits[3].shard

    def refuses(path: Path) -> str:
        if path == cache / shard:
            raise PermissionError(13, "Permission denied")
        return file_hash(path)

    monkeypatch.setattr("distill.cache.reader.file_hash", refuses)
    report = verify(cache)
    assert [(item.unit, item.file) for item in report.problems] == [(None, shard)]
    with pytest.raises(CorruptionError, match="is not repaired"):
        repair(report)


def test_two_repairs_of_one_report(cache: Path) -> None:
    flip(cache / CacheReader.open(cache).commits[0].shard, 200)
    report = verify(cache)
    assert repair(report) == ("00000",)
    with pytest.raises(RetryError, match="repaired by somebody else"):
        repair(report)


def test_an_incomplete_cache_is_repaired_as_far_as_it_goes(
    tmp_path: Path, filler: Callable[..., Any], plan: Plan, teacher: Any
) -> None:
    filler(tmp_path, 3)
    flip(tmp_path / CacheReader.open(tmp_path, allow_incomplete=True).commits[1].shard, 200)
    assert repair(verify(tmp_path)) == ("00001",)
    assert rerun(tmp_path, plan, teacher) == ["00001", "00003", "00004"]
    assert verify(tmp_path).ok


def test_a_record_of_another_generation_is_listed(cache: Path) -> None:
    generations.request(cache, after=1, units={"00001": ""})
    content = storage.read(cache / "commits" / "00001.json")
    (cache / "commits" / "00001.2.json").write_bytes(content)
    assert [(item.unit, item.text) for item in verify(cache).problems] == [("00001", "is a record of generation 1")]
