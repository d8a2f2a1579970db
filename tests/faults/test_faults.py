"""Protects the promises under force: kills of writers and trainers, races, flipped bits, wrong shards, a full disk.

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
KILLS, FLIPS = 40, 35  # flips in each of seven kinds of file
TRAIN_KILLS, STORE_KILLS, UNITS = 2, 2, 12


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("faults") / "faults.json"
    sizes = {"kills": KILLS, "flips": FLIPS, "mutations": 2, "train-kills": TRAIN_KILLS, "store-kills": STORE_KILLS}
    options = [f"--{name}={number}" for name, number in {**sizes, "race-units": UNITS}.items()]
    command = [sys.executable, "-m", "benchmarks.faults", *options]
    done = subprocess.run(
        [*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
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


@pytest.mark.parametrize("kind", ["shard", "commit", "manifest", "plan", "projection", "rejects", "checkpoint"])
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


def assert_nothing_wrong(part: dict[str, Any], output: str) -> None:
    wrong = {name: part[name] for name in ("lost", "doubled", "silent", "problems")}
    assert not any(wrong.values()), (wrong, output)


def test_of_eight_writers_one_wins_each_unit(figures: Any) -> None:
    race = figures["race"]
    assert (race["writers"], race["units"], race["winners"], race["failed"]) == (8, UNITS, UNITS, 0)
    assert race["contested"] > 0
    assert race["rows"] == 4 * UNITS
    assert_nothing_wrong(race, figures["output"])


def test_killed_training_ends_as_unkilled(figures: Any) -> None:
    training = figures["training"]
    assert training["kills"] == TRAIN_KILLS
    assert (training["failed"], training["different"]) == (0, 0), figures["output"]


def test_the_same_in_an_object_store(figures: Any) -> None:
    store = figures["store"]
    if "skipped" in store:
        pytest.skip(store["skipped"])
    assert (store["race"]["winners"], store["race"]["failed"]) == (UNITS, 0)
    assert store["kills"]["kills"] == STORE_KILLS
    assert store["requests"]["failed_requests"] > 20
    for part in store.values():
        assert_nothing_wrong(part, figures["output"])


def test_the_run_passes_only_if_all_of_that_holds(figures: Any) -> None:
    assert figures["exit_code"] == 0, figures["output"]
    assert failures(figures) == []
    lucky = {**figures, "naive": {**figures["naive"], "lost": 0, "torn": 0}}
    assert failures(lucky) == ["the control lost nothing, so the kills prove nothing"]
    missed = {**figures, "flips": {"plan": {"flips": 2, "caught": 1}}}
    assert failures(missed) == ["flips in plan"]
    twice = {**figures, "race": {**figures["race"], "winners": UNITS - 1}}
    assert failures(twice) == ["race"]
    other = {**figures, "training": {**figures["training"], "different": 1}}
    assert failures(other) == ["training"]


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
