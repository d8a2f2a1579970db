"""Protects what the name of a student, a stage or a run stands for, in the commands that take one."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.commands.options import checkpoint
from distill.errors import UsageError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Stage 1 is finished, 2 was stopped before it had a best checkpoint, 3 before it had any."""
    for folder in ("stage1/best", "stage1/last", "stage2/last", "stage2/checkpoints/step-3", "stage3"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    return tmp_path / "run"


def test_a_stage_stands_for_its_best_checkpoint_and_a_model_for_itself(run: Path, tmp_path: Path) -> None:
    assert checkpoint(str(run / "stage1")) == str(run / "stage1" / "best")
    for name in ("config.json", "adapter_config.json", "state.json"):
        model = tmp_path / name.partition(".")[0] / "stage1"  # a name that proves nothing
        (model / "last").mkdir(parents=True)
        (model / name).write_text("{}")
        assert checkpoint(str(model)) == str(model)
    for named in (run / "stage2" / "last", tmp_path / "not-there"):
        assert checkpoint(str(named)) == str(named)
    assert checkpoint("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("", "{run} is a run. Name one of its stages, such as {run}/stage2/last."),
        ("stage2", "the stage {run}/stage2 has no best checkpoint yet. Name {run}/stage2/last, or train it on first."),
        ("stage3", "the stage {run}/stage3 has no checkpoint yet. Train it first, or name another student."),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--cache", "c", "--student"],
        ["export", "--out", "o"],
        ["train", "--stage", "1", "--cache", "c", "--student", "s", "--out", "o", "--from"],
    ],
)
def test_a_run_or_an_unfinished_stage_says_what_to_name(run: Path, command: list[str], named: str, says: str) -> None:
    done = CliRunner().invoke(app, [*command, str(run / named)])
    assert isinstance(done.exception, UsageError), done.exception
    assert str(done.exception) == says.format(run=run)


def test_a_run_without_any_checkpoint_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"is a run without a checkpoint\. Train it first"):
        checkpoint(str(tmp_path / "run"))
