"""Protects a stage's lines of JSON: what a resumed run keeps of them, and a disk that refuses one."""

import json

import pytest

from distill.errors import StorageError
from distill.student.metrics import Metrics
from tests.student.conftest import room_for


def test_lines_after_the_step_and_torn_ones_are_dropped(configured, tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = [json.dumps({"kind": kind, "step": step}) for step in (1, 2, 3) for kind in ("train", "eval")]
    path.write_text("\n".join(written) + '\n{"kind": "train", "st')
    with Metrics(tmp_path, step=2, config=configured(), number=1) as metrics:
        metrics.log("train", 3, {"losses": {"total": 1.0}})
    assert path.read_text().splitlines()[:4] == written[:4]
    assert json.loads(path.read_text().splitlines()[4]) == {"kind": "train", "step": 3, "losses": {"total": 1.0}}
    with Metrics(tmp_path, step=0, config=configured(), number=1):
        pass
    assert path.read_text() == ""


def test_a_full_disk_is_said_with_the_way_out(configured, tmp_path):
    refused = pytest.raises(StorageError, match=r"cannot write .*metrics\.jsonl: .* run the same command again")
    with refused, Metrics(tmp_path, step=0, config=configured(), number=1) as metrics, room_for(8):
        metrics.log("train", 1, {"losses": {"total": 1.0}})
