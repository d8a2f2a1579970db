"""Protects the cache's promises under force: kill -9 of two writers, flipped bits, cut and swapped shards, a full disk.

A short run of ``benchmarks.faults`` in a process of its own, since it forks; ``make torture`` is the long one.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import failures
from tests.faults.filler import Account, Job, fingerprint

ROOT = Path(__file__).parents[2]
KILLS, FLIPS = 40, 35  # flips in each of six kinds of file


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--kills", str(KILLS), "--flips", str(FLIPS)]
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert path.exists(), done.stdout + done.stderr
    return {**json.loads(path.read_text()), "output": done.stdout + done.stderr, "exit_code": done.returncode}


def test_killed_writers_lose_and_double_nothing(figures: Any) -> None:
    kills = figures["kills"]
    assert kills["kills"] >= KILLS
    assert kills["writers"] == 2 * kills["caches"] + kills["kills"]
    assert kills["rows"] == 96 * kills["caches"]
    wrong = {name: kills[name] for name in ("failed", "lost", "doubled", "silent", "torn", "problems")}
    assert not any(wrong.values()), (wrong, figures["output"])
    assert kills["survived"]


def test_the_same_kills_ruin_a_naive_writer(figures: Any) -> None:
    naive = figures["naive"]
    assert naive["kills"] >= KILLS
    assert naive["lost"] > 0
    assert naive["torn"] > 0
    assert not naive["survived"]


@pytest.mark.parametrize("kind", ["shard", "commit", "manifest", "plan", "projection", "rejects"])
def test_every_flipped_bit_is_named(figures: Any, kind: str) -> None:
    assert figures["flips"][kind] == {"flips": FLIPS, "caught": FLIPS}


@pytest.mark.parametrize("kind", ["truncated", "swapped"])
def test_a_shard_that_was_not_committed_is_refused(figures: Any, kind: str) -> None:
    shards = figures["shards"][kind]
    assert shards["caught"] == shards["shards"] == 10


def test_a_full_disk_ends_the_run_and_more_room_finishes_it(figures: Any) -> None:
    disk = figures["disk_full"]
    if "skipped" in disk:
        pytest.skip(disk["skipped"])
    assert disk["exit_code"] == 6
    assert disk["seconds"] < 10
    assert 0 < disk["units_before"] < disk["units"]
    wrong = {name: disk[name] for name in ("torn", "rerun_exit_code", "problems_after", "lost", "doubled", "silent")}
    assert not any(wrong.values()), (wrong, figures["output"])


def test_the_run_passes_only_if_all_of_that_holds(figures: Any) -> None:
    assert figures["exit_code"] == 0, figures["output"]
    assert failures(figures) == []
    lucky = {**figures, "naive": {**figures["naive"], "lost": 0, "torn": 0}}
    assert failures(lucky) == ["the control lost nothing, so the kills prove nothing"]
    missed = {**figures, "flips": {"plan": {"flips": 2, "caught": 1}}}
    assert failures(missed) == ["flips in plan"]


def test_the_account_sees_lost_doubled_and_changed_rows() -> None:
    truth = {"a": b"1", "b": b"2", "c": b"3"}
    account = Account.of([("a", b"1"), ("a", b"1"), ("b", b"other")], truth)
    assert (account.rows, account.lost, account.doubled, account.silent) == (3, 1, 1, 1)


def test_a_fingerprint_sees_one_bit() -> None:
    job = Job.make(num_rows=8)
    row = job.row(job.plan.units[0], 0)
    before = fingerprint(row)
    assert fingerprint(job.row(job.plan.units[0], 0)) == before
    row.targets.log_z.view("int32")[0, 0] ^= 1
    assert fingerprint(row) != before
