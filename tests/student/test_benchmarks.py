"""Protects lm-eval: a local task gives the figures that our own likelihoods give, adapter included, with no network."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import UsageError
from distill.student.benchmarks import run_tasks
from distill.student.choices import read_questions, score_choices
from distill.student.evaluate import Subject
from distill.student.trainer import train_stage


@pytest.fixture
def tasks(tmp_path):
    """A folder with the task ``tiny``, and its questions."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 298, (24, 7), generator=generator).tolist()
    lines = [
        {"question": f"w{a} w{b}", "choices": [f"w{c}", f"w{d} w{e}", f"w{f}"], "answer": g % 3}
        for a, b, c, d, e, f, g in numbers
    ]
    questions = tmp_path / "tiny.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}, "cache_dir": str(tmp_path / "datasets")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(task))
    return folder, questions


@pytest.fixture
def student(world, tmp_path):
    """The tiny student with an end-of-text token, without which lm-eval cannot begin an empty context."""
    folder = Path(shutil.copytree(world.student, tmp_path / "student"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_task_of_ones_own_agrees_with_choices(configured, student, tasks):
    folder, questions = tasks
    config = configured(student=str(student), tune="lora", stage={"max_steps": 4, "learning_rate": 1e-1})
    best = train_stage(config, 1, quiet=True).best
    for model in (None, best):
        subject = Subject.load(config, model, reader=None)
        asked = read_questions(questions)
        own = score_choices(subject.student, subject.tokenizer, asked, token_budget=999, head_chunk=99)
        (figures,) = run_tasks(subject.student, subject.tokenizer, ["tiny"], folder=folder)
        assert figures.task == "tiny"
        assert figures.values == {
            "acc": pytest.approx(own.plain.accuracy),
            "acc_norm": pytest.approx(own.normalised.accuracy),
        }
        assert figures.errors["acc"] > 0


def test_the_command(student, tasks):
    arguments = ["eval", "--student", str(student), "--set", "device=cpu", "--lm-eval", "tiny"]
    arguments += ["--lm-eval-tasks", str(tasks[0]), "--limit", "4"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "acc_norm" in done.stdout


def test_an_unknown_task_is_refused(configured, tasks):
    subject = Subject.load(configured(), reader=None)
    with pytest.raises(UsageError, match="knows no task tinny"):
        run_tasks(subject.student, subject.tokenizer, ["tiny", "tinny"], folder=tasks[0])


def test_without_lm_eval(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["eval", "--student", str(world.student), "--lm-eval", "tiny"])
    assert isinstance(done.exception, UsageError)
    assert "distill[lm-eval]" in str(done.exception)


def test_options_of_lm_eval_alone_are_refused(world):
    done = CliRunner().invoke(app, ["eval", "--student", str(world.student), "--limit", "4"])
    assert isinstance(done.exception, UsageError)
