"""A shard that is missing or cut is found before training begins, not hours later when its turn comes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.cache.join import open_caches
from distill.cache.reader import CacheReader
from distill.errors import CorruptionError
from tests.cache import conftest as cache_fixtures

teacher = cache_fixtures.teacher
plan = cache_fixtures.plan
cache = cache_fixtures.cache


def missing(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [missing, cut, longer])
def test_training_refuses_before_a_model_loads(cache: Path, tmp_path: Path, damage: Any) -> None:
    damage(cache / CacheReader.open(cache).commits[-1].shard)
    arguments = [
        "train",
        "--stage",
        "1",
        "--cache",
        str(cache),
        "--student",
        "not/loaded",
        "--out",
        str(tmp_path / "run"),
    ]
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, CorruptionError), repr(error)
    assert "unit 00004: " in str(error)
    assert not (tmp_path / "run").exists()


def test_one_of_several_caches(cache: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    missing(other / CacheReader.open(other).commits[0].shard)
    with pytest.raises(CorruptionError, match=f"unit 00000: {other}/shards/.* is missing"):
        open_caches([cache, other])
