"""verify finds everything that can be wrong with a cache, names unit and file, and goes on."""

import json
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
from distill.errors import DataError, UsageError
from distill.records import Reject
from distill.report.verify import verify


def problems(cache: Path) -> list[tuple[str | None, str]]:
    report = verify(cache)
    assert report.ok == (not report.problems)
    return [(problem.unit, problem.file) for problem in report.problems]


def shard_of(cache: Path, index: int) -> str:
    return CacheReader.open(cache).commits[index].shard


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def alter_commit(cache: Path, unit: str, **changes: Any) -> None:
    path = cache / "commits" / f"{unit}.json"
    commit = document.parse(Commit, path.read_bytes(), path=path, fix="")
    path.write_bytes(document.render(replace(commit, **changes)))


def test_a_good_cache_has_no_problems(cache: Path) -> None:
    report = verify(cache)
    assert report.ok
    assert report.problems == ()
    assert (report.sealed, report.num_units, report.num_committed, report.num_rows) == (True, 5, 5, 16)
    as_dict = json.loads(json.dumps(report.as_dict()))
    assert as_dict["ok"] is True
    assert as_dict["problems"] == []


def test_an_incomplete_cache_is_good_as_far_as_it_goes(tmp_path: Path, filler: Callable[..., Any]) -> None:
    filler(tmp_path, 2)
    report = verify(tmp_path)
    assert report.ok
    assert (report.sealed, report.num_committed, report.num_units) == (False, 2, 5)


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no cache at"):
        verify(tmp_path)
    with pytest.raises(UsageError):
        verify("gs://bucket/cache")


def test_every_damaged_unit_is_listed(cache: Path) -> None:
    shards = [shard_of(cache, index) for index in range(5)]
    flip(cache / shards[0], 200)
    (cache / shards[2]).unlink()
    (cache / shards[4]).write_bytes((cache / shards[3]).read_bytes())
    assert problems(cache) == [("00000", shards[0]), ("00002", shards[2]), ("00004", shards[4])]


def test_damaged_records_are_listed(cache: Path) -> None:
    flip(cache / "commits" / "00001.json", 40)
    (cache / "commits" / "00003.json").unlink()
    assert problems(cache) == [
        ("00001", "commits/00001.json"),
        ("00003", "commits/00003.json"),
        (None, "manifest.json"),
    ]


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "projection.safetensors", "teacher/tokenizer.json"])
def test_damaged_files_of_the_whole_cache_are_listed(cache: Path, name: str) -> None:
    flip(cache / name, (cache / name).stat().st_size // 2)
    assert (None, name) in problems(cache)


def test_a_missing_file_of_the_whole_cache_is_listed(cache: Path) -> None:
    (cache / "fidelity.safetensors").unlink()
    assert problems(cache) == [(None, "fidelity.safetensors")]
    assert "is missing" in verify(cache).problems[0].text


def test_counts_that_do_not_add_up_are_listed(cache: Path) -> None:
    good = CacheReader.open(cache).commits[0]
    alter_commit(cache, "00000", num_input_rows=5)
    assert ("00000", "commits/00000.json") in problems(cache)
    alter_commit(cache, "00000", num_input_rows=4, num_trained=replace(good.num_trained, train=1))
    found = verify(cache).problems
    assert any("train num_trained, not 1" in problem.text for problem in found)


def test_a_manifest_that_disagrees_is_listed(cache: Path) -> None:
    path = cache / "manifest.json"
    manifest = document.parse(Manifest, path.read_bytes(), path=path, fix="")
    totals = manifest.totals.model_copy(update={"num_rejects": 3})
    path.write_bytes(document.render(manifest.model_copy(update={"totals": totals, "eval_fraction": 0.5})))
    texts = [problem.text for problem in verify(cache).problems]
    assert any("another eval_fraction" in text for text in texts)
    assert any("totals" in text for text in texts)


def test_insane_numbers_under_a_right_hash_are_listed(
    tmp_path: Path, filler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.cache.writer.problem", lambda *_row, **_rest: None)
    monkeypatch.setattr("distill.cache.codec.rounded", lambda values, _bits: np.ones(len(values), np.float32))
    filler(tmp_path, None)
    monkeypatch.undo()
    found = verify(tmp_path).problems
    assert [problem.unit for problem in found] == ["00000", "00001", "00002", "00003", "00004"]
    assert "row 0 (general.jsonl:0) holds topk_logprobs above 0" in found[0].text


def test_rejects_are_checked(tmp_path: Path, filler: Callable[..., Any], plan: Any) -> None:
    writer = filler(tmp_path, 0)
    rejects = [Reject(domain="general", source=f"general.jsonl:{number}", reason="empty") for number in range(4)]
    commit = writer.commit(plan.units[0], [], rejects=rejects, num_input_rows=4)
    assert verify(tmp_path).ok
    assert commit.rejects is not None
    flip(tmp_path / commit.rejects, 30)
    assert problems(tmp_path) == [("00000", commit.rejects)]
    (tmp_path / commit.rejects).unlink()
    assert problems(tmp_path) == [("00000", commit.rejects)]


@pytest.mark.parametrize(
    "changes",
    [
        {"overlong": "split"},
        {"generation": {"temperature": 1, "top_p": 1, "num": 2, "max_tokens": 8, "thinking": False, "seed": 1}},
    ],
)
def test_an_input_row_may_give_several_sequences(
    tmp_path: Path, teacher: Any, plan_of: Callable[..., Any], changes: dict[str, Any]
) -> None:
    plan = plan_of(teacher, rows={"general": 2}, **changes)
    writer = CacheWriter.open(tmp_path, plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    rows = [teacher.sequence(number, source=f"general.jsonl:{number // 2}#{number % 2}") for number in range(4)]
    writer.commit(plan.units[0], rows, rejects=[], num_input_rows=2)
    writer.seal()
    assert problems(tmp_path) == []


def test_an_input_row_stored_twice_is_listed(
    tmp_path: Path, filler: Callable[..., Any], plan: Any, teacher: Any
) -> None:
    writer = filler(tmp_path, 0)
    rows = [teacher.sequence(1), teacher.sequence(1), teacher.sequence(2), teacher.sequence(3)]
    commit = writer.commit(plan.units[0], rows, rejects=[], num_input_rows=4)
    assert problems(tmp_path) == [("00000", commit.shard)]
    assert verify(tmp_path).problems[0].text == "holds an input row twice"
