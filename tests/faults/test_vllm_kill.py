"""A real vLLM teacher that is killed in the middle of a cache, or whose process stands still, costs no row.

What it protects: a kill -9 costs what was not committed yet, and nothing else; an engine that no longer answers is
given up and loaded again.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill.report.verify import verify
from tests.teacher.conftest import rows_by_source

FAULTY = Path(__file__).parents[1] / "teacher" / "faulty_cli.py"
NUM_ROWS, UNIT_ROWS, COMMITTED = 24, 2, 3
STALL_S = 30  # far longer than the first step takes, which compiles


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600, check=False)


def options_of(teacher: Path, data: Path, root: Path, **more: object) -> list[object]:
    """Of ``cache-teacher``; writes the data."""
    rows = [{"question": f"What is {i}?", "answer": f"{i} it is, {i} times."} for i in range(NUM_ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: list[object] = [*("--teacher", teacher, "--data", f"general={data}", "--out", root, "--engine", "vllm")]
    options += [*("--dtype", "float32", "--max-length", 64, "--top-k", 16, "--hidden-bytes", 16, "--quiet", "--json")]
    settings = {
        "unit_rows": UNIT_ROWS,
        "calibration_tokens": 64,
        "engine_options.max_num_seqs": 4,
        "engine_options.kv_cache_memory_bytes": 67108864,
        **more,
    }
    return [*options, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]


def assert_whole(root: Path) -> None:
    assert set(rows_by_source(root)) == {f"data.jsonl:{number}" for number in range(1, NUM_ROWS + 1)}
    assert verify(root).ok


def test_a_killed_engine(tiny_teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    root = tmp_path / "cache"
    options = options_of(tiny_teacher, tmp_path / "data.jsonl", root)
    killed = run(FAULTY, "SIGKILL", COMMITTED, "cache-teacher", *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path.name: path.read_bytes() for path in (root / "commits").glob("*.json")}
    assert COMMITTED <= len(before) < NUM_ROWS / UNIT_ROWS

    again = run("-m", "distill", "cache-teacher", *options)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["units_written"] == NUM_ROWS / UNIT_ROWS - len(before)
    assert {name: (root / "commits" / name).read_bytes() for name in before} == before
    assert_whole(root)


def test_an_engine_process_that_stands_still(tiny_teacher: Path, tmp_path: Path) -> None:
    """As on a GPU the engine has a process of its own here; it is stopped once two units are in."""
    pytest.importorskip("vllm", exc_type=ImportError)
    root = tmp_path / "cache"
    options = options_of(tiny_teacher, tmp_path / "data.jsonl", root, stall_seconds=STALL_S)
    running = subprocess.Popen(
        [sys.executable, "-m", "distill", "cache-teacher", *map(str, options)],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 300
        while len(list(root.glob("commits/*.json"))) < 2:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(timeout=0.01)
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
        for child in psutil.Process(running.pid).children(recursive=True):
            if "EngineCore" in " ".join(child.cmdline()):
                child.suspend()
        out, err = running.communicate(timeout=600)
    finally:
        for process in psutil.Process(running.pid).children(recursive=True) if running.poll() is None else ():
            process.kill()
        running.kill()
    assert running.returncode == 0, err
    assert f"The vllm engine hangs: no sign of life for {STALL_S} s" in err
    assert json.loads(out)["units_written"] == NUM_ROWS / UNIT_ROWS
    assert_whole(root)
