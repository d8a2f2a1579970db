"""The commands of the README and the quickstart, in order, as a reader types them; only names of models differ.

What it protects: a newcomer's path from two files of data to an evaluated student.
"""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from distill.__main__ import app
from tests.docs.test_pages import ROOT, commands

# A 72B teacher and eight GPUs are not here: another teacher, and nothing of what only they can do.
LEFT_OUT = ("--set", "engine_options.tensor_parallel_size=8")


def config(teacher: Path) -> str:
    """What a reader's ``job.yaml`` says after the preset was edited."""
    stage = {"max_steps": 2, "batch_size": 4, "eval_every": 2}
    cache = {
        "teacher": str(teacher),
        "data": {"general": ["general.jsonl"], "medical": ["medical.jsonl"]},
        "out": "cache",
        "engine": "transformers",
        "dtype": "float32",
        "eval_fraction": 0.2,
        "max_length": 64,
        "targets": {"top_k": 16, "hidden_bytes": 24},
        "samples": {"num": 1, "max_tokens": 4},
    }
    train = {
        "cache": "cache",
        "student": str(teacher),
        "out": "run",
        "samples": 1,
        "sample_tokens": 4,
        "stages": {1: stage, 2: stage, 3: stage},
    }
    return yaml.safe_dump({"cache": cache, "train": train})


@pytest.fixture
def desk(tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    for name in ("general", "medical", "data/general", "data/medical"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rows = [{"prompt": f"What is {name} {i}?", "response": f"It is {name} number {i}."} for i in range(24)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "job.yaml").write_text(config(tiny_teacher), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments: list[str]) -> None:
    """One command, as it is typed."""
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, f"distill {' '.join(arguments)}: {done.output}"


def test_the_quickstart_from_data_to_an_evaluated_student(desk: Path) -> None:
    for arguments in commands(ROOT / "docs" / "quickstart.md"):
        if arguments[0] == "init":
            (desk / "job.yaml").rename(desk / "edited.yaml")
        run(arguments)
        if arguments[0] == "init":
            (desk / "edited.yaml").replace(desk / "job.yaml")
    assert (desk / "cache.html").is_file()
    assert (desk / "run.html").is_file()
    assert all((desk / "run" / f"stage{number}" / "best").is_dir() for number in (1, 2, 3))
    assert (desk / "run-b" / "stage1" / "best").is_dir()
    assert (desk / "student" / "model.safetensors").is_file()


def test_the_readme_from_a_cache_to_a_student(desk: Path, tiny_teacher: Path) -> None:
    (desk / "caches").mkdir()
    for path in (desk / "data").glob("*.jsonl"):
        path.unlink()
        with pa.output_stream(str(path) + ".zst", compression="zstd") as file:
            file.write((desk / f"{path.stem}.jsonl").read_bytes())
    made = commands(ROOT / "README.md")
    assert [arguments[0] for arguments in made] == ["cache-teacher", "verify", "inspect", "train"]
    for arguments in made:
        typed = [str(tiny_teacher) if word.startswith("Qwen/") else word for word in arguments]
        if arguments[0] == "cache-teacher":
            start = typed.index(LEFT_OUT[1]) - 1
            assert tuple(typed[start : start + 2]) == LEFT_OUT
            del typed[start : start + 2]
        if arguments[0] in ("cache-teacher", "train"):
            typed += ["--config", "job.yaml"]
        run(typed)
    assert (desk / "runs" / "qwen7b" / "stage3" / "best").is_dir()
