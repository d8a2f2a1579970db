"""Protects what a run goes on from and what it writes down: other settings, older runs, moved bases, its own record."""

import json
import math
import shutil

import pytest
import torch
import yaml

from distill.errors import DataError, RetryError, UsageError
from distill.student import checkpoint, trainer
from distill.student.origin import origin_of
from distill.student.precision import resolve_precision
from distill.student.trainer import check_stages, train_stage
from tests.student.conftest import logged, stop_at


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_the_folder_says_what_was_done(configured, run, capsys):
    train_stage(configured(), 1)
    config = yaml.safe_load((run / "stage1" / "config.yaml").read_text())
    assert config["stage"]["temperature"] == 4.0
    assert config["stage"]["steps"] == 8
    assert config["cache_identity"]["top_k"] == 16
    assert config["versions"]["torch"] == torch.__version__
    assert config["train"]["micro_batch_tokens"] == 100
    assert (config["train"]["device"], config["train"]["precision"]) == ("cpu", "fp32")  # which "auto" came to
    assert config["earlier_versions"] == []
    train = logged(run, "train")
    assert [line["step"] for line in train] == list(range(1, 9))
    assert all(math.isfinite(line["grad_norm"]) and line["tokens_per_second"] > 0 for line in train)
    assert all(0 <= line["waiting"] < 1 for line in train)
    assert capsys.readouterr().out == ""  # standard output belongs to results


def test_the_folder_says_what_an_adapter_was_made_with(configured, run):
    """A stage that goes on with an adapter trains that one, whatever the configuration would make."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["up_proj", "q_proj"]}
    train_stage(configured(stage={"max_steps": 2}, tune="lora", lora=lora), 1, quiet=True)
    train_stage(configured(tune="lora"), 2, start=run / "stage1" / "best", quiet=True)
    written = yaml.safe_load((run / "stage2" / "config.yaml").read_text())["train"]["lora"]
    assert written == {**lora, "target_modules": ["q_proj", "up_proj"]}


def test_another_precision_is_another_run_and_other_versions_are_written_down(configured, run, monkeypatch):
    stop_at(monkeypatch, step=3)
    with pytest.raises(RetryError):
        train_stage(configured(), 1, quiet=True)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "resolve_precision", lambda device, _: resolve_precision(device, "bf16"))
    with pytest.raises(UsageError, match='precision is "fp32" there and "bf16" now'):  # what "auto" comes to elsewhere
        train_stage(configured(), 1, quiet=True)
    monkeypatch.undo()
    path = run / "stage1" / "config.yaml"
    path.write_text(path.read_text().replace(f"torch: {torch.__version__}", "torch: 1.0.0"))
    train_stage(configured(), 1, quiet=True)
    config = yaml.safe_load(path.read_text())
    assert [versions["torch"] for versions in config["earlier_versions"]] == ["1.0.0"]
    assert config["versions"]["torch"] == torch.__version__


def test_a_run_of_before_goes_on(configured, run, monkeypatch):
    """Settings that it does not name were as they are by default now."""
    stop_at(monkeypatch, step=3)
    with pytest.raises(RetryError):
        train_stage(configured(), 1, quiet=True)
    monkeypatch.undo()
    path = next((run / "stage1" / "checkpoints").glob("*/state.json"))
    state = json.loads(path.read_text())
    del state["settings"]["stage.contrastive_negatives"]
    state["settings"] |= {"precision": "auto", "student": f"./{state['settings']['student']}"}
    monkeypatch.setattr(checkpoint, "newest_checkpoint", _with_settings(state["settings"]))
    train_stage(configured(student=state["settings"]["student"]), 1, quiet=True)
    assert [line["step"] for line in logged(run, "train")] == list(range(1, 9))


def _with_settings(settings):
    newest = checkpoint.newest_checkpoint

    def found(folder):
        path, state, notes = newest(folder)
        return path, state.model_copy(update={"settings": settings}), notes

    return found


def test_a_moved_run_still_finds_its_base(configured, run, tmp_path):
    config = configured(tune="lora", student_layers=2)
    train_stage(config, 1, quiet=True)
    run.rename(tmp_path / "moved")
    result = train_stage(config.model_copy(update={"out": str(tmp_path / "moved")}), 2, quiet=True)
    assert result.num_steps == 8


def test_a_base_outside_the_run_is_found_from_any_folder(configured, run, world, tmp_path, monkeypatch):
    shutil.copytree(world.student, tmp_path / "models" / "small")
    monkeypatch.chdir(tmp_path)
    train_stage(configured(student="./models/small", tune="lora", stage={"max_steps": 2}), 1, quiet=True)
    monkeypatch.chdir("/")
    assert origin_of(run / "stage1" / "best").base == str(tmp_path / "models" / "small")
    (tmp_path / "models").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"is an adapter for the model in .*small, which is not there\. Put it back"):
        origin_of(run / "stage1" / "best")


def test_a_later_stage_that_cannot_be_is_refused_before_the_first(configured):
    config = configured(stages={1: {"max_steps": 2}, 2: {"shares": {"legal": 1}}, 3: {"max_steps": 2}})
    check_stages(config, [1])
    with pytest.raises(DataError, match=r"legal"):
        check_stages(config, [1, 2])
