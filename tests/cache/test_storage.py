"""Files appear whole and once, refusals become readable errors, and no name leads out of the cache."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distill.cache import storage
from distill.errors import CorruptionError, StorageError, UsageError


def test_create_once_keeps_the_first(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "x.json"
    assert storage.create_once(path, b"first")
    assert not storage.create_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["x.json"]


def test_of_many_writers_one_wins(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for round_number in range(50):
            path = tmp_path / str(round_number)
            won = list(pool.map(lambda number, path=path: storage.create_once(path, b"%d" % number), range(8)))
            assert sum(won) == 1
            assert path.read_bytes() == b"%d" % won.index(True)


def test_a_link_whose_answer_was_lost_is_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client tries again when it hears nothing, and then meets the link that its first try made."""
    link = os.link

    def answer_lost(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", answer_lost)
    assert storage.create_once(tmp_path / "x.json", b"ours")
    assert not storage.create_once(tmp_path / "x.json", b"ours")
    assert os.listdir(tmp_path) == ["x.json"]


def test_nothing_is_visible_when_the_write_fails(tmp_path: Path) -> None:
    def fill(file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"the disk is full: .*x\.parquet needs 3 MB, .* are free"):
        storage.write(tmp_path / "x.parquet", fill, need=3_000_000)
    assert os.listdir(tmp_path) == []


def test_write_replaces_and_tells_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "x"
    storage.write(path, lambda file: file.write(b"old"), need=3)
    sent = storage.write(path, lambda file: file.write(b"abc"), need=3)
    assert path.read_bytes() == b"abc"
    assert sent == "06b05ab6733a618578af5f94892f3950"  # XXH3 of 128 bits


def test_a_failed_sync_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        storage.create_once(tmp_path / "commit.json", b"{}")
    assert not (tmp_path / "commit.json").exists()


@pytest.mark.parametrize(
    ("number", "text"),
    [(errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied"), (errno.EDQUOT, "the disk is full")],
)
def test_refusals_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, text: str) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=text):
        storage.create_once(tmp_path / "x", b"")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(StorageError, match="a file stands where a folder should be"):
        storage.create_once(tmp_path / "cache" / "plan.json", b"{}")


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.require_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root may write anywhere
    with pytest.raises(StorageError, match="read-only for you"):
        storage.require_writable(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc/passwd", "a//b", "s3://b/x", ".hidden", "a/.x", "", "a\\b", "~/x"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorruptionError, match="may lie outside its folder"):
        storage.inside(tmp_path, name)


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard.parquet").symlink_to(tmp_path / "secret")
    (tmp_path / "cache" / "shards").symlink_to(tmp_path)
    for name in ("shard.parquet", "shards/secret"):
        with pytest.raises(CorruptionError, match="symbolic link"):
            storage.inside(tmp_path / "cache", name)
    assert storage.inside(tmp_path / "cache", "a/b-1.x") == tmp_path / "cache" / "a" / "b-1.x"


@pytest.mark.parametrize("url", ["gs://b", "gs:/b", "https://example.org/x", "file:///x"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="of a kind that caches do not lie at"):
        storage.root_of(url)


@pytest.mark.parametrize("url", ["s3://bucket/a/cache", Path("s3://bucket/a/cache"), "S3://bucket/a/cache/"])
def test_urls_of_s3_are_buckets(url: str | Path) -> None:
    assert str(storage.root_of(url)) == "s3://bucket/a/cache"
    with pytest.raises(UsageError, match="a local folder is needed here"):
        storage.local_root(url)


@pytest.mark.parametrize("path", ["cache", "/a/b", "./s3", "a:b", "C:/cache"])
def test_everything_else_is_a_folder(path: str) -> None:
    assert storage.root_of(path) == Path(path)
