"""The benchmark of many units, in small: it runs, its keys are there, and the shape of what it measures is right.

What it protects: the figures of docs/scale.md can be made again, a manifest is read in pieces without a difference, and
looking for units to do stays linear in their number.
"""

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks import scale
from distill.cache import document, manifest
from distill.cache.manifest import load_manifest
from distill.cache.plan import Manifest
from distill.cache.writer import CacheWriter
from distill.errors import CorruptionError
from distill.launch.worker import Worker
from distill.teacher import fill


@pytest.mark.parametrize("num_filled", [40, 8])
def test_all_is_measured(tmp_path: Path, num_filled: int) -> None:
    report = scale.measure_local(tmp_path, 40, 2, num_filled=num_filled)
    assert report["fill"]["units"] == num_filled
    for name in ("plan", "join", "status_unsealed", "seal", "open", "status", "start_training", "walk_epoch"):
        assert report[name]["seconds"] > 0
    assert report["manifest_mb"] > 0
    assert set(scale.growth_of(report, report, 1.0).values()) == {1.0}
    json.dumps(report)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    plan = scale.plan_of(30)
    scale.fill(tmp_path, plan, Worker())
    assert CacheWriter.open(tmp_path, plan).seal() is not None
    return tmp_path


@pytest.mark.parametrize("piece", [1, 700, 2**20])
def test_a_manifest_read_in_pieces_is_the_one_read_whole(
    sealed: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_PIECE", piece)
    whole = document.load(Manifest, sealed, "manifest.json", fix="")
    assert load_manifest(sealed, "manifest.json", fix="") == whole
    assert len(whole.commits) == 30


def test_a_record_of_a_manifest_that_is_none_is_refused(sealed: Path) -> None:
    whole = document.load(Manifest, sealed, "manifest.json", fix="")
    body = document.render(whole).rpartition(b',\n  "checksum"')[0].replace(b'"nonce"', b'"once"', 1)
    digest = hashlib.sha256(body).hexdigest().encode()
    (sealed / "manifest.json").write_bytes(body + b',\n  "checksum": "' + digest + b'"\n}\n')
    with pytest.raises(CorruptionError, match=r"manifest.json is not a .*nonce"):
        load_manifest(sealed, "manifest.json", fix="Mend it.")


def test_a_worker_asks_for_each_unit_a_few_times_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone among workers that never started, when looking at all of the others' units for each one would show."""
    asked = 0
    look = fill.still_missing

    def counting(writer: CacheWriter, units: object) -> object:
        nonlocal asked
        asked += len(units)  # type: ignore[arg-type]
        return look(writer, units)  # type: ignore[arg-type]

    monkeypatch.setattr(fill, "still_missing", counting)
    writer = CacheWriter.open(tmp_path, scale.plan_of(60))
    assert len(list(fill.units_to_do(writer, Worker(index=3, count=20)))) == 60
    assert asked == 60
