"""A cache in a real object store keeps the promises of one on a disk: whole, once, readable, whatever fails."""

import http.server
import importlib
import json
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import distill
from distill.__main__ import app
from distill.cache import storage
from distill.cache.bucket import Bucket
from distill.cache.plan import Commit, Plan
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError, DataError, IdentityError, RetryError, StorageError, UsageError
from distill.report.repair import repair
from distill.report.verify import verify
from tests.cache.conftest import fill, rows_of


def begin(url: str, teacher: Any, plan: Plan) -> CacheWriter:
    writer = CacheWriter.open(url, plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    return writer


def commit_all(writer: CacheWriter, teacher: Any) -> list[Commit]:
    return [
        writer.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
        for unit in writer.plan.units
    ]


def bucket_of(url: str) -> Bucket:
    root = storage.root_of(url)
    assert isinstance(root, Bucket)
    return root


def test_what_is_filled_reads_back(url: str, tmp_path: Path, teacher: Any, plan: Plan) -> None:
    fill(url, teacher, plan)
    fill(tmp_path / "local", teacher, plan)
    remote, local = CacheReader.open(url), CacheReader.open(tmp_path / "local")
    assert str(remote.root) == url
    assert remote.sealed
    assert [commit.sha256 for commit in remote.commits] == [commit.sha256 for commit in local.commits]
    for ours, theirs in zip(remote.commits, local.commits, strict=True):
        assert remote.read_unit(ours).equals(local.read_unit(theirs))
    assert remote.projection is not None
    assert local.projection is not None
    assert remote.projection.sha256 == local.projection.sha256
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.sequences(copy.commits[0], "train")[0].prompt.source == "general.jsonl:0"
    names = list(bucket_of(url).sizes("shards"))
    assert names == sorted(commit.shard for commit in remote.commits)


def test_commands_and_frames(url: str, teacher: Any, plan: Plan) -> None:
    fill(url, teacher, plan)
    for arguments in (["verify", url, "--json"], ["inspect", url, "--json"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["path"] == url
    assert len(distill.open(url)) == 16


def test_another_identity_and_no_cache(url: str, teacher: Any, plan: Plan) -> None:
    with pytest.raises(DataError, match=f"no cache at {url}"):
        CacheReader.open(url)
    with pytest.raises(DataError, match=f"no cache at {url}"):
        verify(url)
    fill(url, teacher, plan, num_units=2)
    with pytest.raises(DataError, match="2 of 5 units"):
        CacheReader.open(url)
    other = plan.identity.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(IdentityError, match="dtype: cache float32"):
        CacheWriter.open(url, plan.model_copy(update={"identity": other}))


def test_four_writers_on_the_same_units_leave_one_winner_each(url: str, teacher: Any, plan: Plan) -> None:
    together = threading.Barrier(4)

    def work(_number: int) -> list[str]:
        writer = begin(url, teacher, plan)
        together.wait(60)
        commits = commit_all(writer, teacher)
        assert writer.seal() is not None
        return [commit.nonce for commit in commits]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert all(result == results[0] for result in results)
    reader = CacheReader.open(url)
    assert [commit.nonce for commit in reader.commits] == results[0]
    assert len(bucket_of(url).sizes("shards")) == len(reader.commits)
    assert verify(url).ok


@pytest.mark.usefixtures("quick")
def test_a_lost_answer_is_no_lost_race(url: str) -> None:
    """The store keeps the record and its answer gets lost: the second try meets our own record."""
    bucket = bucket_of(url)
    store = bucket._store()
    honest, tries = store.pipe_file, []

    def forgetful(*arguments: Any, **options: Any) -> None:
        tries.append(arguments)
        honest(*arguments, **options)
        if len(tries) == 1:
            raise ConnectionResetError("connection reset by peer")

    store.pipe_file = forgetful
    assert bucket.create_once("commits/00000.json", b"nonce 1")
    assert len(tries) == 2
    assert not bucket.create_once("commits/00000.json", b"nonce 2")
    assert bucket.fetch("commits/00000.json").read_bytes() == b"nonce 1"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("uploaded", [False, True])
def test_a_store_that_dies_during_a_fill(
    url: str, server: Any, teacher: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch, uploaded: bool
) -> None:
    writer = begin(url, teacher, plan)
    unit = plan.units[2]
    before = [
        writer.commit(other, rows_of(teacher, other), rejects=[], num_input_rows=other.num_input_rows)
        for other in plan.units[:2]
    ]
    upload = Bucket.upload

    def dies(bucket: Bucket, name: str, path: Path) -> None:
        if uploaded:
            upload(bucket, name, path)
        server.kill()
        if not uploaded:
            upload(bucket, name, path)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload", dies)
        with pytest.raises(RetryError, match=r"does not answer.*run the same command again") as caught:
            writer.commit(unit, rows_of(teacher, unit), rejects=[], num_input_rows=unit.num_input_rows)
    assert caught.value.exit_code == 75
    server.start()
    again = begin(url, teacher, plan)
    assert [missing.unit for missing in again.missing_units()] == ["00002", "00003", "00004"]
    fill(url, teacher, plan)
    assert list(CacheReader.open(url).commits[:2]) == before
    assert verify(url).ok
    assert len(bucket_of(url).sizes("shards")) == 5


def test_a_short_outage_is_waited_out(url: str, server: Any, teacher: Any, plan: Plan) -> None:
    writer = begin(url, teacher, plan)
    server.kill()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(server.start)
        commit_all(writer, teacher)
        started.result()
    assert writer.seal() is not None
    assert verify(url).ok


def test_a_wrong_secret(url: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for use in (lambda: CacheReader.open(url), lambda: CacheWriter.open(url, plan), lambda: verify(url)):
        with pytest.raises(StorageError, match=r"refuses access to s3://bucket/.*AWS_SECRET_ACCESS_KEY") as caught:
            use()
        assert caught.value.exit_code == 6


def test_no_credentials(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"Unable to locate credentials.*AWS_ACCESS_KEY_ID"):
        CacheReader.open(url)


def test_a_profile_names_key_and_endpoint(
    url: str, server: Any, tmp_path: Path, teacher: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["[profile lab]", "region = us-east-1", "services = lab", "aws_access_key_id = a-key"]
    lines += ["aws_secret_access_key = a-secret", "[services lab]", "s3 =", f"  endpoint_url = {server.url}"]
    (tmp_path / "config").write_text("\n".join(lines))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    fill(url, teacher, plan)
    assert CacheReader.open(url).num_rows() == 16


def test_without_s3fs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UsageError, match=r"pip install 'distill\[s3\]'"):
        CacheReader.open("s3://bucket/cache")


class _Busy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(503)

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def busy(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store that answers 503, always."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as answering:
        thread = threading.Thread(target=answering.serve_forever)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{answering.server_port}")
        yield url
        answering.shutdown()
        thread.join()


@pytest.mark.usefixtures("quick")
def test_a_store_that_is_always_busy(busy: str, plan: Plan) -> None:
    for use in (lambda: CacheReader.open(busy), lambda: CacheWriter.open(busy, plan)):
        with pytest.raises(RetryError, match=r"does not answer for s3://bucket/.*3 tries"):
            use()


def test_large_shards_go_up_in_parts(url: str, tmp_path: Path) -> None:
    content = bytes(range(256)) * (440 * 1024)  # 110 MiB; s3fs cuts at 50 MiB
    (tmp_path / "large").write_bytes(content)
    bucket = bucket_of(url)
    bucket.upload("shards/00000-large.parquet", tmp_path / "large")
    with bucket.read_back("shards/00000-large.parquet") as path:
        assert path.read_bytes() == content
    assert not path.exists()
    bucket.remove("shards/00000-large.parquet")
    bucket.remove("shards/00000-large.parquet")
    assert bucket.sizes("shards") == {}
    with pytest.raises(FileNotFoundError), bucket.read_back("shards/00000-large.parquet"):
        pass


def test_a_folder_is_no_file(url: str, teacher: Any, plan: Plan) -> None:
    fill(url, teacher, plan)
    reader = CacheReader.open(url)
    assert not (reader.root / "shards").is_file()
    assert reader.read_unit(reader.commits[0]).num_rows == 4


def test_fetched_shards_make_room(url: str, teacher: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(url, teacher, plan)
    reader = CacheReader.open(url)
    monkeypatch.setattr("distill.cache.bucket.KEPT_BYTES", 2 * max(commit.num_bytes for commit in reader.commits))
    for _round in range(2):
        for commit in reader.commits:
            assert reader.read_unit(commit).num_rows == commit.num_rows.total
            folder = storage.inside(reader.root, commit.shard).parent
            assert 1 <= len(list(folder.iterdir())) <= 2


def test_other_bytes_in_the_store_are_found_and_repaired(url: str, tmp_path: Path, teacher: Any, plan: Plan) -> None:
    fill(url, teacher, plan)
    bucket, broken = bucket_of(url), CacheReader.open(url).commits[1]
    content = bytearray(bucket.fetch(broken.shard).read_bytes())
    content[200] ^= 4
    (tmp_path / "rotten").write_bytes(content)
    bucket.upload(broken.shard, tmp_path / "rotten")
    with pytest.raises(CorruptionError, match=f"unit 00001: {url}/shards/00001"):
        CacheReader.open(url).read_unit(broken)
    report = verify(url)
    assert repair(report) == ("00001",)
    fill(url, teacher, plan)
    after = verify(url)
    assert (after.ok, after.generation, after.num_rows) == (True, 2, 16)
    assert broken.shard not in bucket_of(url).sizes("shards")


def test_a_shard_that_is_gone_or_another_is_found_by_a_listing(
    url: str, tmp_path: Path, teacher: Any, plan: Plan
) -> None:
    fill(url, teacher, plan)
    reader = CacheReader.open(url)
    reader.require_shards()
    (tmp_path / "short").write_bytes(b"PAR1")
    bucket_of(url).upload(reader.commits[1].shard, tmp_path / "short")
    with pytest.raises(CorruptionError, match=f"unit 00001: {url}/shards/.* has 4 bytes, its record says"):
        CacheReader.open(url).require_shards()
    bucket_of(url).remove(reader.commits[1].shard)
    with pytest.raises(CorruptionError, match=f"unit 00001: {url}/shards/.* is missing"):
        CacheReader.open(url).require_shards()
