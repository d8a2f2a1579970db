"""A kill -9 of a real vLLM teacher in the middle of a cache costs what was not committed yet, and nothing else."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill.cache.reader import CacheReader
from distill.report.verify import verify

FAULTY = Path(__file__).parents[1] / "teacher" / "faulty_cli.py"
NUM_ROWS, UNIT_ROWS, COMMITTED = 24, 2, 3


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600, check=False)


def test_a_killed_engine(tiny_teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", exc_type=ImportError)
    data, root = tmp_path / "data.jsonl", tmp_path / "cache"
    rows = [{"question": f"What is {i}?", "answer": f"{i} it is, {i} times."} for i in range(NUM_ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*("--teacher", tiny_teacher, "--data", f"general={data}", "--out", root, "--engine", "vllm")]
    options += [*("--dtype", "float32", "--max-length", 64, "--top-k", 16, "--hidden-bytes", 16, "--quiet", "--json")]
    settings = {
        "unit_rows": UNIT_ROWS,
        "calibration_tokens": 64,
        "engine_options.max_num_seqs": 4,
        "engine_options.kv_cache_memory_bytes": 67108864,
    }
    options += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    killed = run(FAULTY, "SIGKILL", COMMITTED, "cache-teacher", *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path.name: path.read_bytes() for path in (root / "commits").glob("*.json")}
    assert COMMITTED <= len(before) < NUM_ROWS / UNIT_ROWS

    again = run("-m", "distill", "cache-teacher", *options)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["units_written"] == NUM_ROWS / UNIT_ROWS - len(before)
    assert {name: (root / "commits" / name).read_bytes() for name in before} == before
    reader = CacheReader.open(root)
    sources = [
        row.prompt.source
        for commit in reader.commits
        for split in ("train", "eval")
        for row in reader.sequences(commit, split)
    ]
    assert sorted(sources) == sorted(f"data.jsonl:{number}" for number in range(1, NUM_ROWS + 1))
    assert verify(root).ok
