"""What a user can get wrong on the command line or in a configuration, before any file of theirs is opened.

What it protects: the class, hence the exit code, and the words that name the mistake and the way out.
"""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import DistillError, UsageError

CACHE = ["cache-teacher", "--teacher", "t", "--data", "d=x.jsonl", "--out", "o"]
TRAIN = ["train", "--cache", "c", "--student", "s", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*CACHE, "--ray", "--worker", "0/2"], "--ray and --worker are two ways to have several workers. Give one"),
        ([*CACHE, "--ray-workers", "2"], "--ray-workers says how many engines run on a Ray cluster. Give --ray"),
        ([*CACHE, "--temperatures", "4;2"], "--temperatures takes numbers separated by commas, got '4;2'"),
        ([*CACHE, "--data", "x.jsonl"], "--data takes KEY=PATH, where KEY is the domain's name, got 'x.jsonl'"),
        ([*CACHE, "--set", "targets={"], "--set: '{' is not a YAML value"),
        ([*CACHE, "--layers", "1", "--hidden-bytes", "0"], "beside the fitted projection: they need hidden_bytes"),
        ([*CACHE, "--layers", "1,1"], "layers and heads must name each layer and head once"),
        ([*CACHE, "--set", "generate={temperature: 0, num: 2}"], "at temperature 0 all answers to a prompt are the"),
        ([*TRAIN, "--stage", "4"], "--stage takes 1, 2, 3 or a range such as 1-3, got '4'"),
        ([*TRAIN, "--stage", "one"], "--stage takes 1, 2, 3 or a range such as 1-3, got 'one'"),
        ([*TRAIN, "--stage", "1", "--set", "stages={2: {weights: {k: 1}}}"], "stages.2: unknown key 'weights.k'"),
        (["export", "run/stage1/best", "--out", "o", "--dtype", "int8"], "--dtype takes auto, float32, bfloat16,"),
        (["eval", "--student", "s", "--lm-eval", " ,"], "--lm-eval ' ,' names no task. Name some with --lm-eval TASK,"),
        (["eval", "--student", "s", "--lm-eval", ",", "--limit", "2"], "--lm-eval ',' names no task"),
        (
            ["eval", "--student", "s", "--choices", "q.jsonl", "--group-by", "k"],
            "--group-by and --allow-incomplete say",
        ),
        (["eval", "--student", "s", "--choices", "q.jsonl", "--allow-incomplete"], "Name it with --cache"),
        (["eval", "--student", "s", "--set", "cache=null"], "'cache' is missing (option --cache)"),
        (["init", "--preset", "huge"], "there is no preset 'huge'. Give --preset one of qwen72b-to-7b"),
    ],
)
def test_wrong_options_are_named_with_the_way_out(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UsageError), done.exception
    assert says in str(done.exception)
    assert done.exception.exit_code == 2
    assert done.stdout == ""


def test_a_mistake_of_an_option_is_not_put_down_to_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("train: {cache: c, student: s, out: o, target_modules: x}")
    done = CliRunner().invoke(app, ["train", "--stage", "1", "--config", str(path)])
    assert str(done.exception).startswith(f"{path}: unknown key 'target_modules'")
    path.write_text("train: {cache: c, student: s, out: o}")
    for given in (["--set", "target_modules=x"], ["--precision", "fp8"]):
        done = CliRunner().invoke(app, ["train", "--stage", "1", "--config", str(path), *given])
        assert isinstance(done.exception, UsageError)
        assert str(done.exception).startswith(f"{path} and the options: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- cache", "must be a mapping with the keys 'cache' and 'train', not a list"),
        ("train: [1]", "'train' must be a mapping, not a list"),
        ("trian: {}", "unknown key 'trian' (did you mean 'train'?)"),
    ],
)
def test_wrong_files_are_named_with_the_way_out(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    done = CliRunner().invoke(app, ["train", "--stage", "1", "--config", str(path)])
    assert isinstance(done.exception, DistillError)
    assert f"{path}" in str(done.exception)
    assert says in str(done.exception)
