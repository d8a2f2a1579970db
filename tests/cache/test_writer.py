"""Units become visible whole, once, under one identity; what cannot be stored is a reject or stops the job."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.cache import generations, storage
from distill.cache.plan import Plan
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError, IdentityError, StorageError, UsageError
from distill.records import Reject, SequenceTargets

Filler = Callable[[Path, int | None], CacheWriter]


def spoiled(row: SequenceTargets) -> SequenceTargets:
    return dataclasses.replace(
        row, targets=dataclasses.replace(row.targets, entropy=np.full_like(row.targets.entropy, np.nan))
    )


def test_a_filled_cache_reads_back(cache: Path, teacher: Any, plan: Plan, rows_of: Any) -> None:
    reader = CacheReader.open(cache)
    for commit, unit in zip(reader.commits, plan.units, strict=True):
        written = rows_of(teacher, unit)
        for split in ("train", "eval"):
            read = reader.sequences(commit, split)
            expected = [row for row in written if row.prompt.split == split]
            assert [row.prompt.sequence_id for row in read] == [row.prompt.sequence_id for row in expected]
            assert commit.num_rows[split] == len(expected)
            assert commit.num_targets[split] == sum(row.prompt.num_targets for row in expected)
            assert commit.num_trained[split] == sum(int(row.prompt.loss_mask.sum()) for row in expected)


def test_a_rerun_does_what_is_missing(tmp_path: Path, filler: Filler) -> None:
    writer = filler(tmp_path, 2)
    assert [unit.unit for unit in writer.missing_units()] == ["00002", "00003", "00004"]
    assert writer.seal() is None
    before = {path.name: path.read_bytes() for path in (tmp_path / "commits").iterdir()}
    assert filler(tmp_path, None).missing_units() == []
    assert before.items() <= {path.name: path.read_bytes() for path in (tmp_path / "commits").iterdir()}.items()
    assert (tmp_path / "manifest.json").exists()


def test_sealing_again_changes_nothing(cache: Path, filler: Filler) -> None:
    before = (cache / "manifest.json").read_bytes()
    filler(cache, None)
    assert (cache / "manifest.json").read_bytes() == before


def test_the_card_tells_what_the_cache_is(cache: Path) -> None:
    card = (cache / "README.md").read_text()
    for text in (
        "Teacher targets of tiny",
        "top 8 log-probabilities",
        "4, 2, 1",
        "| medical | 5 | 1 |",
        "distill.open(",
    ):
        assert text in card


def test_another_identity_is_refused_field_by_field(cache: Path, teacher: Any, plan_of: Any) -> None:
    other = plan_of(teacher, rows={"general": 10, "medical": 6}, top_k=4, dtype="bfloat16")
    with pytest.raises(
        IdentityError, match="another identity: dtype: cache float32, asked bfloat16; top_k: cache 8, asked 4"
    ):
        CacheWriter.open(cache, other)


def test_other_data_is_refused(cache: Path, teacher: Any, plan_of: Any) -> None:
    with pytest.raises(
        IdentityError, match=r"the data changed: num_rows of general\.jsonl: cache 10, asked 11.*another"
    ):
        CacheWriter.open(cache, plan_of(teacher, rows={"general": 11, "medical": 6}))


def test_other_columns_of_the_same_data_are_refused(cache: Path, plan: Plan) -> None:
    """Else the rest of the cache would be answers from another column."""
    sources = tuple(source.model_copy(update={"columns": {"response": "short"}}) for source in plan.sources)
    with pytest.raises(IdentityError, match=r"columns of general\.jsonl: cache as found, asked response=short"):
        CacheWriter.open(cache, plan.model_copy(update={"sources": sources}))


def test_another_machine_and_command_go_on_with_the_same_cache(cache: Path, plan: Plan) -> None:
    recorded = plan.recorded.model_copy(update={"machine": "elsewhere", "command": "distill …"})
    writer = CacheWriter.open(cache, plan.model_copy(update={"recorded": recorded}))
    assert writer.plan == plan


def test_a_damaged_plan_is_corruption(cache: Path, plan: Plan) -> None:
    (cache / "plan.json").write_bytes((cache / "plan.json").read_bytes().replace(b'"top_k": 8', b'"top_k": 9'))
    with pytest.raises(CorruptionError, match=r"plan\.json is damaged"):
        CacheWriter.open(cache, plan)


def test_a_file_in_place_of_the_folder(tmp_path: Path, plan: Plan) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match="a file stands where a folder should be"):
        CacheWriter.open(tmp_path / "cache", plan)


def test_a_folder_that_became_read_only(cache: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root may write anywhere
    with pytest.raises(StorageError, match="read-only"):
        CacheWriter.open(cache, plan)


def test_a_url_is_refused(plan: Plan) -> None:
    with pytest.raises(UsageError, match="of a kind that caches do not lie at"):
        CacheWriter.open("gs://bucket/cache", plan)


def test_the_first_projection_wins(tmp_path: Path, plan: Plan) -> None:
    writer = CacheWriter.open(tmp_path, plan)
    assert writer.put_once("projection.safetensors", b"first") == b"first"
    assert writer.put_once("projection.safetensors", b"second") == b"first"
    assert writer.put_once("teacher/config.json", b"{}") == b"{}"
    with pytest.raises(CorruptionError, match="outside its folder"):
        writer.put_once("../x", b"")


def test_a_unit_needs_its_projection(tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any) -> None:
    writer = CacheWriter.open(tmp_path, plan)
    with pytest.raises(UsageError, match=r"projection\.safetensors is missing, and hidden_bytes is 8"):
        writer.commit(plan.units[0], rows_of(teacher, plan.units[0]), rejects=[], num_input_rows=4)


def test_a_cache_without_hidden_states_needs_none(tmp_path: Path, make_teacher: Any, plan_of: Any, fill: Any) -> None:
    teacher = make_teacher(hidden_bytes=0)
    fill(tmp_path, teacher, plan_of(teacher, rows={"general": 3}))
    reader = CacheReader.open(tmp_path)
    assert reader.projection is None
    assert reader.sequences(reader.commits[0], "train")[0].targets.hidden == {}


def test_rejects_are_kept_and_counted(tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler) -> None:
    writer = filler(tmp_path, 0)
    unit = plan.units[0]
    reject = Reject(domain="general", source="general.jsonl:2", reason="no answer 无")
    commit = writer.commit(unit, rows_of(teacher, unit)[:3], rejects=[reject], num_input_rows=4)
    assert (commit.num_rows.total, commit.num_rejects, commit.num_input_rows) == (3, 1, 4)
    assert commit.rejects is not None
    lines = (tmp_path / commit.rejects).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"domain": "general", "source": "general.jsonl:2", "reason": "no answer 无"}
    ]


def test_a_unit_may_be_all_rejects(tmp_path: Path, plan: Plan, filler: Filler) -> None:
    writer = filler(tmp_path, 0)
    rejects = [Reject(domain="general", source=str(i), reason="empty") for i in range(4)]
    commit = writer.commit(plan.units[0], [], rejects=rejects, num_input_rows=4)
    reader = CacheReader.open(tmp_path, allow_incomplete=True)
    assert reader.read_unit(commit).num_rows == 0
    assert reader.sequences(commit, "train") == []


def test_one_insane_row_becomes_a_reject(
    tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler
) -> None:
    writer = filler(tmp_path, 0)
    rows = rows_of(teacher, plan.units[0])
    commit = writer.commit(plan.units[0], [spoiled(rows[0]), *rows[1:]], rejects=[], num_input_rows=4)
    assert (commit.num_rows.total, commit.num_rejects) == (3, 1)
    assert commit.rejects is not None
    assert "NaN or infinity in entropy" in (tmp_path / commit.rejects).read_text()


def test_two_insane_rows_stop_the_job(tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler) -> None:
    writer = filler(tmp_path, 0)
    rows = rows_of(teacher, plan.units[0])
    with pytest.raises(CorruptionError, match=r"unit 00000: 2 of 4 rows .* general\.jsonl:0: the teacher left NaN"):
        writer.commit(plan.units[0], [*map(spoiled, rows[:2]), *rows[2:]], rejects=[], num_input_rows=4)
    assert len(writer.missing_units()) == 5
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(("num_rows", "num_input_rows"), [(3, 4), (4, 3), (4, 5)])
def test_lost_or_added_input_rows_are_noticed(
    tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler, num_rows: int, num_input_rows: int
) -> None:
    writer = filler(tmp_path, 0)
    rows = rows_of(teacher, plan.units[0])[:num_rows]
    with pytest.raises(CorruptionError, match="is planned with 4 input rows"):
        writer.commit(plan.units[0], rows, rejects=[], num_input_rows=num_input_rows)


def test_splitting_makes_more_sequences_than_input_rows(
    tmp_path: Path, teacher: Any, plan_of: Any, rows_of: Any
) -> None:
    plan = plan_of(teacher, rows={"general": 2}, overlong="split")
    writer = CacheWriter.open(tmp_path, plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    rows = [*rows_of(teacher, plan.units[0]), teacher.sequence(7)]
    assert writer.commit(plan.units[0], rows, rejects=[], num_input_rows=2).num_rows.total == 3


def test_other_bytes_on_the_disk_are_noticed(
    tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = filler(tmp_path, 0)
    write = storage.write

    def lying_disk(path: Path, fill: Any, *, need: int) -> str:
        sent = write(path, fill, need=need)
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
        return sent

    monkeypatch.setattr(storage, "write", lying_disk)
    with pytest.raises(CorruptionError, match="does not read back as it was written"):
        writer.commit(plan.units[0], rows_of(teacher, plan.units[0]), rejects=[], num_input_rows=4)
    assert len(writer.missing_units()) == 5


def test_the_loser_of_a_race_returns_the_winners_record(
    tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler
) -> None:
    first, second = filler(tmp_path, 0), filler(tmp_path, 0)
    unit = plan.units[0]
    won = first.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=4)
    lost = second.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=4)
    assert lost == won
    assert first.is_own(won)
    assert not second.is_own(lost)
    assert os.listdir(tmp_path / "shards") == [Path(won.shard).name]


def test_a_late_loser_survives_the_sweep(
    tmp_path: Path, teacher: Any, plan: Plan, rows_of: Any, filler: Filler, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = filler(tmp_path, None)
    unit = plan.units[0]
    write = storage.write

    def swept_away(path: Path, fill: Any, *, need: int) -> str:
        sent = write(path, fill, need=need)
        path.unlink()
        return sent

    monkeypatch.setattr(storage, "write", swept_away)
    commit = writer.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=4)
    assert commit == CacheReader.open(tmp_path).commits[0]


def test_sealing_sweeps_what_no_commit_names(tmp_path: Path, filler: Filler) -> None:
    filler(tmp_path, 4)
    orphan = tmp_path / "shards" / "00004-0123456789abcdef.parquet"
    orphan.write_bytes(b"of a killed writer")
    (tmp_path / "shards" / ".x.partial").write_bytes(b"")
    filler(tmp_path, None)
    named = {commit.shard for commit in CacheReader.open(tmp_path).commits}
    assert {f"shards/{name}" for name in os.listdir(tmp_path / "shards")} == named


def test_a_manifest_that_units_have_outlived_is_refused(cache: Path, filler: Filler) -> None:
    (cache / "commits" / "00001.json").unlink()
    with pytest.raises(
        CorruptionError, match=r"manifest\.json does not agree with the commit records.*verify --repair"
    ):
        filler(cache, None)
    assert generations.request(cache, after=1, units={})
    filler(cache, None)
    assert CacheReader.open(cache).num_rows() == 16


def run_workers(mode: str, root: Path) -> list[Any]:
    """Processes that really race or die; see workers.py."""
    script = Path(__file__).with_name("workers.py")
    done = subprocess.run([sys.executable, str(script), mode, str(root)], check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_eight_processes_on_the_same_units_leave_one_winner_each(tmp_path: Path) -> None:
    results = run_workers("race", tmp_path)
    assert len(results) == 8
    assert all(result == results[0] for result in results)  # every process saw the same winners
    reader = CacheReader.open(tmp_path / "cache")
    assert [commit.nonce for commit in reader.commits] == results[0]
    assert len(os.listdir(tmp_path / "cache" / "shards")) == len(reader.commits)
    sources = [row.prompt.source for commit in reader.commits for row in reader.sequences(commit, "train")]
    assert len(set(sources)) == len(sources)


def test_a_writer_killed_at_any_step_leaves_no_visible_unit(tmp_path: Path) -> None:
    results = run_workers("crash", tmp_path)
    assert len(results) >= 12  # each fsync, rename, link and unlink, before and after
    linked = [result["visible"] for result in results]
    assert linked == sorted(linked)  # never visible until the record is linked, always after
    assert not linked[0]
    assert linked[-1]
    for result in results:
        assert result["killed"]
        assert result["rows_after_rerun"] == 4
        assert result["files_after_rerun"] == 1


def test_a_folder_of_other_things_is_left_alone(tmp_path, plan):
    """Its README.md would be replaced by the card of the cache."""
    (tmp_path / "README.md").write_text("my model")
    with pytest.raises(UsageError, match=r"is no cache and not empty: it holds README\.md"):
        CacheWriter.open(tmp_path, plan)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "README.md").unlink()
    (tmp_path / ".plan.json.x.partial").write_text("left by a worker that died")
    CacheWriter.open(tmp_path, plan)
