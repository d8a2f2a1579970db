"""From rows of text to a trained student by the command line, with the cache in an object store all the while."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.__main__ import app


def command(*arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result: dict[str, object] = json.loads(done.stdout)
    return result


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve rows."""
    rows = [{"instruction": f"Say river {i}.", "output": f"river {i}, river {i}!"} for i in range(12)]
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_cache_teacher_then_train(url: str, data: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    fill = ("cache-teacher", "--teacher", tiny_teacher, "--data", f"general={data}", "--out", url, "--quiet")
    options = ("--engine", "transformers", "--dtype", "float32", "--hidden-bytes", 24, "--top-k", 16)
    settings = ("--set", "eval_fraction=0.2", "--set", "unit_rows=4")
    made = command(*fill, *options, *settings)
    assert (made["cache"], made["sealed"], made["units_written"]) == (url, True, 3)
    assert command(*fill, *options, *settings)["units_written"] == 0
    assert command("verify", url)["ok"] is True
    assert command("inspect", url)["num_committed"] == 3
    asked = command("sql", url, "select count(*) as num, min(num_tokens) > 2 as long from rows")
    assert asked["rows"] == [{"num": 12, "long": True}]
    assert command("report", url, "--out", tmp_path / "cache.html")
    stages = "stages={1: {max_steps: 2}}"
    run = ("--student", tiny_teacher, "--out", tmp_path / "run", "--set", stages, "--quiet")
    trained = command("train", "--stage", 1, "--cache", url, *run)
    assert "stages" in trained
    assert (tmp_path / "run" / "stage1" / "best").is_dir()
