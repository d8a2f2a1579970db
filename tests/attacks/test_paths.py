"""No name in a cache or a checkpoint leads out of its folder, whoever vouches for it: nothing else is touched."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cache import storage
from distill.cache.bucket import Bucket
from distill.cache.reader import CacheReader
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError
from distill.student.checkpoint import read_checkpoint
from tests.attacks.forging import refused, rewrite, rewrite_commit, vouch

NAMES = [
    "../outside",
    "shards/../../outside",
    "/etc/passwd",
    "~/.netrc",
    "s3://bucket/key",
    "https://example.org/x.parquet",
    "file:///etc/passwd",
    "shards\\..\\outside",
    "C:\\outside",
    "shards/\x1b[31mred\nError: all is well",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_in_records(cache: Path, name: str) -> None:
    rewrite_commit(cache, 0, shard=name)
    for command in (["inspect", cache], ["sql", cache, "select count(*) from rows"]):
        assert "may lie outside its folder" in refused(*command)
    rewrite_commit(cache, 0, shard="shards/x", rejects=name, rejects_sha256="a" * 64, num_rejects=1)
    with pytest.raises(CorruptionError, match="may lie outside"):
        storage.inside(cache, CacheReader.open(cache).commits[0].rejects or "")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_only_verify_looks_at(cache: Path, name: str) -> None:
    from distill.report.verify import verify

    commit = {"rejects": name, "rejects_sha256": "a" * 64, "num_rejects": 1}
    rewrite_commit(cache, 0, **commit)
    rewrite(cache / "manifest.json", lambda manifest: manifest["files"].update({name: "a" * 64}))
    texts = [item.text for item in verify(cache).problems if item.file == name]
    assert len(texts) == 2
    assert all("may lie outside its folder" in text for text in texts)


def linked(path: Path, outside: Path) -> None:
    """Move a file or folder of a cache elsewhere and leave a symbolic link to it."""
    shutil.move(path, outside)
    path.symlink_to(outside, target_is_directory=outside.is_dir())


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "shards", "shards/*.parquet", "projection.safetensors", "teacher", "teacher/tokenizer.json"],
)
def test_symbolic_links(cache: Path, tmp_path: Path, name: str) -> None:
    (cache / "teacher").mkdir()
    (cache / "teacher" / "tokenizer.json").write_text("{}")
    path = next(cache.glob(name))
    linked(path, tmp_path / "outside")
    assert "symbolic link" in refused("inspect", cache)
    with pytest.raises(CorruptionError, match="symbolic link"):
        storage.inside(cache, path.relative_to(cache).as_posix())


@pytest.mark.parametrize("name", ["teacher", "teacher/tokenizer.json", "teacher/deep/config.json"])
def test_symbolic_links_in_the_teachers_folder(cache: Path, tmp_path: Path, name: str) -> None:
    path = cache / name
    (cache / "teacher" / "deep").mkdir(parents=True)
    if path.suffix:
        path.write_text("{}")
    linked(path, tmp_path / "outside")
    with pytest.raises(CorruptionError, match="symbolic link"):
        _ = CacheReader.open(cache).teacher_dir


def test_sealing_deletes_nothing_through_a_link(cache: Path, tmp_path: Path, plan: Any) -> None:
    """What no commit names is swept when a cache is sealed. A link in place of the folder must not widen the broom."""
    (cache / "manifest.json").unlink()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.parquet").write_bytes(b"years of work")
    (cache / "rejects").symlink_to(mine)
    with pytest.raises(CorruptionError, match="symbolic link"):
        CacheWriter.open(cache, plan).seal()
    with pytest.raises(CorruptionError, match="symbolic link"):
        storage.delete(cache, "rejects/thesis.parquet")
    assert (mine / "thesis.parquet").read_bytes() == b"years of work"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["manifest.json", "shards/*.parquet", "projection.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(cache: Path, name: str) -> None:
    path = next(cache.glob(name))
    path.unlink()
    os.mkfifo(path)
    assert "neither a file nor a folder" in refused("inspect", cache)


@pytest.mark.parametrize("key", ["teacher/../../../escaped", "teacher//etc/cron.d/x", "teacher/.bashrc"])
def test_keys_of_a_bucket_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Object stores take any key. Fetched by that name it would be a file anywhere on this machine."""

    class Store:
        def find(self, _key: str, *, detail: bool) -> dict[str, dict[str, int]]:
            assert detail
            return {f"bucket/cache/{key}": {"size": 4}}

        def get_file(self, _key: str, path: str) -> None:
            Path(path).write_bytes(b"evil")

    bucket = Bucket("bucket/cache")
    monkeypatch.setattr(bucket, "_opened", Store())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(CorruptionError, match="may lie outside its folder"):
        storage.folder(bucket, "teacher")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["model", "model/config.json", "state.json", "trainer.safetensors"])
def test_links_in_a_checkpoint(checkpoint: Callable[[str], Path], tmp_path: Path, world: Any, name: str) -> None:
    folder = checkpoint("full")
    path = folder / name
    if not path.exists():  # it has no optimizer
        path.write_bytes(b"x")
    linked(path, tmp_path / "outside")
    assert "symbolic link" in refused("eval", "--cache", world.cache, "--student", folder)


def test_a_checkpoint_names_no_file_outside(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("full")
    record = {"sha256": "a" * 64, "num_bytes": 1}
    rewrite(folder / "state.json", lambda state: state["files"].update({"../../etc/passwd\n\x1b[0m": record}))
    with pytest.raises(CorruptionError, match="should not have, or lacks") as caught:
        read_checkpoint(folder)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("base", ["run:../../elsewhere", "run:/etc", "run:base/../../x"])
def test_the_base_of_an_adapter_lies_in_its_run(checkpoint: Callable[[str], Path], base: str) -> None:
    folder = checkpoint("lora")
    rewrite(folder / "state.json", lambda state: state.update(base=base))
    vouch(folder)
    with pytest.raises(CorruptionError, match=r"'base'.*leads out of the run"):
        read_checkpoint(folder)
