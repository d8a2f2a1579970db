"""Real captures by the actors of a Ray cluster, one of which is killed in the middle of its work.

What it protects: actors share a cache as workers do, and one that dies costs no row.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.teacher.conftest import rows_by_source, write_sums

NUM_ROWS, UNIT_ROWS = 48, 2
NUM_UNITS = NUM_ROWS // UNIT_ROWS
_LONGEST_S = 400


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "data.jsonl", NUM_ROWS)


@contextlib.contextmanager
def started(teacher: Path, data: Path, out: Path, *more: object) -> Iterator[subprocess.Popen[str]]:
    """``cache-teacher --ray`` on a cluster of its own; whatever is left of both at the end is killed."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'distill[test]'")
    settings = {"engine": "transformers", "engine_options": {"batch_tokens": 128}, "unit_rows": UNIT_ROWS}
    values: dict[str, Any] = {
        **settings,
        "teacher": str(teacher),
        "data": {"general": [str(data)]},
        "out": str(out),
        "dtype": "float32",
        "targets": {"top_k": 16, "hidden_bytes": 16},
        "calibration_tokens": 64,
    }
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps({"cache": values}))
    command = [
        sys.executable,
        "-m",
        "distill",
        "cache-teacher",
        "--config",
        config,
        "--json",
        "--quiet",
        "--ray",
        *more,
    ]
    running = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, "RAY_ADDRESS": "local"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield running
    finally:
        if running.poll() is None:
            for process in [*psutil.Process(running.pid).children(recursive=True), running]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            running.communicate()


def wait_for_commits(out: Path, process: subprocess.Popen[str], num: int) -> None:
    """Returns as soon as ``num`` units are committed."""
    deadline = time.monotonic() + _LONGEST_S
    while len(list(out.glob("commits/*.json"))) < num:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline


def actors_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes that hold a place. Ray names them after what they do."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.cmdline() and child.cmdline()[0].startswith("ray::_Holder")
    ]


def test_a_killed_actor_costs_no_row(tiny_teacher: Path, data: Path, tmp_path: Path) -> None:
    with started(tiny_teacher, data, tmp_path / "cache", "--ray-workers", 2) as running:
        wait_for_commits(tmp_path / "cache", running, 2)
        actors = actors_of(running)
        assert len(actors) == 2
        actors[0].kill()
        out, err = running.communicate(timeout=_LONGEST_S)
    assert running.returncode == 0, err
    assert "its process died" in err
    assert "It is started again" in err
    result = json.loads(out)
    assert (result["sealed"], result["units_written"]) == (True, NUM_UNITS)
    assert len(rows_by_source(tmp_path / "cache")) == NUM_ROWS
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == NUM_UNITS
