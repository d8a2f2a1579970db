"""Between a cache's users and a real object store, everything fails that may: nothing is lost, doubled or endless.

What a try met is decided by a proxy (see ``proxy.py``); the store behind it is real.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache import bucket as bucket_module
from distill.cache import storage
from distill.cache.bucket import Bucket
from distill.cache.plan import Plan
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import RetryError
from distill.report.verify import verify
from tests.cache.conftest import fill, rows_of
from tests.storage import proxy as faulty
from tests.storage.proxy import Proxy, proxy_of

TRANSIENT = ("busy", "reset", "silent", "truncated")


@pytest.fixture
def proxy(url: str, server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The way to the store; pauses between tries and the wait for an answer are short."""
    assert url
    monkeypatch.setattr(bucket_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(bucket_module, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(
        bucket_module, "_TIMEOUTS", {"connect_timeout": 5, "read_timeout": 2, "retries": {"max_attempts": 1}}
    )
    with proxy_of(server.url) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.url)
        yield running


def tables(url: str | Path) -> list[Any]:
    reader = CacheReader.open(url)
    assert reader.projection is not None
    _ = reader.teacher_dir
    return [reader.read_unit(commit) for commit in reader.commits]


def test_without_faults_the_proxy_is_not_seen(url: str, proxy: Proxy, teacher: Any, plan: Plan) -> None:
    fill(url, teacher, plan)
    assert verify(url).ok
    assert proxy.failed == []


@pytest.mark.parametrize("fault", ["busy", "reset", "truncated"])
def test_a_cache_is_filled_and_read_although_every_fourth_request_fails(
    url: str, proxy: Proxy, tmp_path: Path, teacher: Any, plan: Plan, fault: str
) -> None:
    proxy.plans.append(faulty.Plan(fault=fault, times=10**6, chance=0.25))
    fill(url, teacher, plan)
    met = len(proxy.failed)
    assert met > 5
    fill(tmp_path / "local", teacher, plan)
    ours, theirs = tables(url), tables(tmp_path / "local")
    assert len(proxy.failed) > met
    assert all(own.equals(other) for own, other in zip(ours, theirs, strict=True))
    proxy.plans.clear()
    assert verify(url).ok
    assert len(Bucket(url.removeprefix("s3://")).sizes("shards")) == len(plan.units)


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_store_that_does_not_answer_at_once_is_asked_again(
    url: str, proxy: Proxy, teacher: Any, plan: Plan, method: str
) -> None:
    proxy.plans.append(faulty.Plan(fault="silent", times=2, method=method))
    fill(url, teacher, plan)
    assert len(tables(url)) == len(plan.units)
    assert [(fault, used) for fault, used, _ in proxy.failed] == [("silent", method)] * 2


@pytest.mark.parametrize("fault", ["busy", "reset", "truncated"])
def test_what_never_ends_is_given_up(
    url: str, proxy: Proxy, teacher: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Exit code 75 after seven tries, with pauses between them that grow and differ."""
    fill(url, teacher, plan)
    pauses: list[float] = []
    monkeypatch.setattr(bucket_module, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(bucket_module, "LONGEST_PAUSE_S", 8.0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", pauses.append)
        proxy.plans.append(faulty.Plan(fault=fault, times=10**6, part="shards/"))
        reader = CacheReader.open(url)
        with pytest.raises(
            RetryError, match=r"does not answer for s3://.*7 tries.*run the same command again"
        ) as caught:
            reader.read_unit(reader.commits[0])
    assert caught.value.exit_code == 75
    assert "\n" not in str(caught.value)
    assert 7 <= len(proxy.failed) <= 4 * 7  # the client itself repeats one on a connection that it had kept
    bounds = [min(0.5 * 2**number, 8.0) for number in range(6)]
    assert len(pauses) == len(bounds)
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=True)}) == len(bounds)
    proxy.plans.clear()
    assert verify(url).ok


@pytest.mark.usefixtures("quick")
def test_commands_exit_with_75(url: str, proxy: Proxy, teacher: Any, plan: Plan) -> None:
    fill(url, teacher, plan)
    for fault in ("busy", "truncated"):
        proxy.plans[:] = [faulty.Plan(fault=fault, times=10**6)]
        for command in (["verify", url], ["inspect", url], ["status", url]):
            done = CliRunner().invoke(app, command)
            assert isinstance(done.exception, RetryError), (fault, command, repr(done.exception))


def test_a_record_whose_answer_got_lost_is_recognised(url: str, proxy: Proxy, teacher: Any, plan: Plan) -> None:
    """The store has the record, the answer was 503: the next try meets our own nonce and the unit is ours."""
    writer = CacheWriter.open(url, plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    proxy.plans.append(faulty.Plan(fault="forgetful", times=100, method="PUT", part="commits/", chance=0.7))
    commits = [
        writer.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
        for unit in plan.units
    ]
    assert len(proxy.failed) >= 2
    shards = Bucket(url.removeprefix("s3://")).sizes("shards")
    assert list(shards) == sorted(commit.shard for commit in commits), "no winner deleted its own shard"
    assert writer.seal() is not None
    assert CacheReader.open(url).commits == tuple(commits)
    assert verify(url).ok


def test_somebody_elses_record_is_not_taken_for_our_own(url: str, proxy: Proxy, teacher: Any, plan: Plan) -> None:
    unit = plan.units[0]
    first, second = CacheWriter.open(url, plan), CacheWriter.open(url, plan)
    first.put_once("projection.safetensors", teacher.projection.to_bytes())
    theirs = first.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
    proxy.plans.append(faulty.Plan(fault="forgetful", times=1, method="PUT", part="commits/"))
    got = second.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
    assert got == theirs
    assert list(Bucket(url.removeprefix("s3://")).sizes("shards")) == [theirs.shard]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_half_an_object_is_no_object(url: str, proxy: Proxy, fault: str) -> None:
    bucket = Bucket(url.removeprefix("s3://"))
    content = bytes(range(256)) * 64
    assert bucket.create_once("teacher/config.json", content)
    proxy.plans.append(faulty.Plan(fault=fault, times=2, method="GET", part="config.json"))
    assert storage.read(storage.inside(Bucket(url.removeprefix("s3://")), "teacher/config.json")) == content
    assert len(proxy.failed) == 2


def test_training_meets_the_same_losses_although_requests_fail(
    url: str, proxy: Proxy, tmp_path: Path, tiny_teacher: Path
) -> None:
    rows = [{"instruction": f"Say river {i}.", "output": f"river {i}, river {i}!"} for i in range(12)]
    data = tmp_path / "general.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*arguments: object) -> None:
        done = CliRunner().invoke(app, [*map(str, arguments), "--quiet", "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output

    make = ("cache-teacher", "--teacher", tiny_teacher, "--data", f"general={data}", "--out", url)
    options = ("--engine", "transformers", "--dtype", "float32", "--hidden-bytes", 24, "--top-k", 16)
    run(*make, *options, *("--set", "eval_fraction=0.2", "--set", "unit_rows=4", "--set", "samples.num=0"))
    train = ("train", "--stage", 1, "--cache", url, "--student", tiny_teacher)
    settings = ("--set", "stages={1: {max_steps: 4, eval_every: 2}}", "--set", "samples=0")
    run(*train, "--out", tmp_path / "calm", *settings)
    assert proxy.failed == []
    proxy.plans.append(faulty.Plan(fault="reset", times=10**6, chance=0.3))
    # In a process of its own, which has none of the objects yet.
    fresh = [sys.executable, "-m", "distill", *map(str, (*train, "--out", tmp_path / "stormy", *settings))]
    subprocess.run(fresh, check=True)
    assert proxy.failed
    calm, stormy = (
        [json.loads(line) for line in (tmp_path / name / "stage1" / "metrics.jsonl").read_text().splitlines()]
        for name in ("calm", "stormy")
    )
    losses = [[row["losses"] for row in rows if row["kind"] == "train"] for rows in (calm, stormy)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
