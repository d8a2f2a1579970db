"""Protects ``distill eval``: whatever names a cache has its held-out rows measured, and nothing asked for is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import UsageError
from tests.student.conftest import World


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "w3", "choices": ["w4", "w5 w6"], "answer": "A"}))
    return path


@pytest.fixture
def job(world: World, tmp_path: Path) -> Path:
    """A file as training has it."""
    path = tmp_path / "job.yaml"
    section = {"cache": str(world.cache), "student": str(world.student), "out": "run", "device": "cpu"}
    path.write_text(json.dumps({"train": section}))
    return path


def said(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_cache_of_the_file_is_measured_beside_choices(job: Path, questions: Path, world: World) -> None:
    both = said("--config", job, "--choices", questions, "--group-by", "department")
    assert (both["cache"], both["group_by"]) == (str(world.cache), "department")
    assert both["overall"]["num_tokens"] > 0
    assert both["choices"][str(questions)]["plain"]["num_questions"] == 1


def test_a_cache_of_set_is_measured_and_null_leaves_the_files_away(job: Path, questions: Path, world: World) -> None:
    common = ["--choices", questions, "--set", "device=cpu"]
    other = said(*common, "--student", world.student, "--set", f"cache={world.cache}")
    assert other["overall"]["num_tokens"] > 0
    assert set(said(*common, "--config", job, "--set", "cache=null")) == {"student", "choices"}


def test_a_student_of_the_file_may_be_a_stage(job: Path, questions: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "stage1" / "last").mkdir(parents=True)
    arguments = ["eval", "--config", str(job), "--choices", str(questions), "--set", f"student={tmp_path}/run"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UsageError)
    assert "run is a run. Name one of its stages" in str(done.exception)
