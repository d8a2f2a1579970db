"""Several real workers on one cache, and what a scheduler does to them: run together, never start, be stopped.

What it protects: workers never lose or double a row, a missing one blocks nobody, and a stopped one says how far it
came, exits with 75 and leaves whole units only.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distill.config import CacheConfig
from distill.launch.worker import find_worker
from distill.teacher.job import cache_teacher
from tests.teacher.conftest import rows_by_source, write_sums

NUM_ROWS, UNIT_ROWS = 24, 2
NUM_UNITS = NUM_ROWS // UNIT_ROWS
FAULTY = Path(__file__).with_name("faulty_cli.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sums(tmp_path_factory.mktemp("data") / "data.jsonl", NUM_ROWS)


@pytest.fixture
def config(tiny_teacher: Path, data: Path, tmp_path: Path) -> Path:
    """A configuration file as workers share it; the cache goes into ``cache`` beside it."""
    content = {
        "teacher": str(tiny_teacher),
        "data": {"general": [str(data)]},
        "out": str(tmp_path / "cache"),
        "engine": "transformers",
        "engine_options": {"batch_tokens": 128},
        "dtype": "float32",
        "targets": {"top_k": 16, "hidden_bytes": 16},
        "unit_rows": UNIT_ROWS,
        "calibration_tokens": 64,
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"cache": content}))
    return path


def settings(config: Path, **more: object) -> CacheConfig:
    return CacheConfig.model_validate({**json.loads(config.read_text())["cache"], **more})


def start(config: Path, *, prefix: tuple[object, ...] = ("-m", "distill"), **environment: str) -> subprocess.Popen[str]:
    """``cache-teacher`` in a process of its own, under a scheduler's variables."""
    command = [sys.executable, *map(str, prefix), "cache-teacher", "--config", str(config), "--json", "--quiet"]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_same_rows(root: Path, other: Path) -> None:
    ours, theirs = rows_by_source(root), rows_by_source(other)
    assert ours.keys() == theirs.keys()
    for source, row in ours.items():
        assert row.prompt.sequence_id == theirs[source].prompt.sequence_id
        # A sequence's neighbours in a batch are others, so the last bits differ.
        assert np.abs(row.targets.topk_logprobs - theirs[source].targets.topk_logprobs).max() <= 4e-3
        assert np.abs(row.targets.log_z - theirs[source].targets.log_z).max() <= 2e-4


def test_two_workers_at_once_leave_what_one_leaves(config: Path, tmp_path: Path) -> None:
    """Both under a scheduler of their own: they only share the folder."""
    workers = [
        start(config, SLURM_ARRAY_TASK_ID="4", SLURM_ARRAY_TASK_MIN="4", SLURM_ARRAY_TASK_COUNT="2"),
        start(config, JOB_COMPLETION_INDEX="1", JOB_COMPLETIONS="2"),
    ]
    results = []
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err
        results.append(json.loads(out))
    assert all(result["sealed"] for result in results)
    assert sum(result["units_written"] for result in results) == NUM_UNITS
    shards = list((tmp_path / "cache" / "shards").iterdir())
    assert len(shards) == NUM_UNITS
    alone = cache_teacher(settings(config, out=str(tmp_path / "alone")), quiet=True)
    assert alone.num_units_written == NUM_UNITS
    assert_same_rows(tmp_path / "cache", alone.root)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "2"},
        {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"},
        {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "2"},
    ],
    ids=["slurm", "kubernetes", "skypilot"],
)
def test_a_worker_that_never_starts_blocks_nobody(config: Path, environment: dict[str, str]) -> None:
    worker = find_worker(None, environment)
    assert str(worker) == "0/2"
    result = cache_teacher(settings(config), worker=worker, quiet=True)
    assert result.manifest is not None
    assert result.num_units_written == NUM_UNITS
    assert len(rows_by_source(result.root)) == NUM_ROWS


def test_a_stopped_worker_exits_75_and_the_next_run_finishes(config: Path) -> None:
    stopped = start(config, prefix=(FAULTY, "SIGTERM", 3))
    _, err = stopped.communicate(timeout=300)
    assert stopped.returncode == 75, err
    assert err.count("\n") == 1
    root = config.parent / "cache"
    before = {path: path.stat().st_mtime_ns for path in (root / "commits").iterdir()}
    assert 3 <= len(before) < NUM_UNITS
    assert f"stopped by SIGTERM: {len(before)} of {NUM_UNITS} units are committed" in err
    assert not list(root.rglob("*.partial"))
    again = cache_teacher(settings(config), quiet=True)
    assert again.num_units_written == NUM_UNITS - len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(rows_by_source(root)) == NUM_ROWS


def test_a_full_disk_stops_a_worker_with_exit_6(config: Path) -> None:
    stopped = start(config, prefix=(FAULTY, "full", 2))
    _, err = stopped.communicate(timeout=300)
    assert stopped.returncode == 6, err
    assert "the disk is full" in err
    assert len(list((config.parent / "cache" / "commits").iterdir())) == 2
    assert cache_teacher(settings(config), quiet=True).num_units_written == NUM_UNITS - 2


def test_a_wrong_worker_is_refused_before_anything_is_read(config: Path) -> None:
    for arguments, environment, says in (
        (("--worker", "2/2"), {}, "no worker 2 of 2"),
        ((), {"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETIONS is not set"),
    ):
        command = [sys.executable, "-m", "distill", "cache-teacher", "--config", str(config), *arguments]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
    assert not (config.parent / "cache").exists()
