"""``--json`` of every command: one object on standard output and nothing else, as schemas/commands/ says.

What it protects: programs that read what the commands print. To write the schemas anew after a change of a report:
``python -m tests.commands.test_json``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import IdentityError
from tests.commands.outputs import OUTPUTS, schema_of
from tests.student.conftest import World

SCHEMAS = Path(__file__).parents[2] / "schemas" / "commands"
STAGE = "stages={1: {max_steps: 2, batch_size: 4, eval_every: 2}}"


def said(*arguments: object, exit_code: int = 0) -> Any:
    """What the command printed."""
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == exit_code, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outputs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What every command says about a tiny cache and run, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("commands")
    data, cache, run = folder / "data.jsonl", folder / "cache", folder / "run"
    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w7" for i in range(24)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "q.jsonl").write_text('{"question": "w3", "choices": ["w4", "w5 w6"], "answer": "A"}\n')
    # The teacher's weights are the student's too: its tokenizer is the one, and reading is what is looked at.
    job = ["--teacher", world.teacher, "--data", f"general={data}", "--engine", "transformers", "--top-k", 8]
    job += ["--hidden-bytes", 8, "--set", "eval_fraction=0.3", "--set", "unit_rows=12", "--max-length", 64]
    training = ["--student", world.student, "--precision", "fp32", "--set", "device=cpu"]
    found = {
        "init": [said("init", "--preset", "tiny-cpu", "--out", folder / "job.yaml")],
        "plan": [said("plan", *job)],
        "cache-teacher": [said("cache-teacher", *job, "--out", cache), said("cache-teacher", *job, "--out", cache)],
    }
    found["train"] = [
        said("train", "--stage", 1, "--cache", cache, "--out", run, *training, "--set", STAGE, "--set", "samples=0")
        for _ in range(2)
    ]
    best = run / "stage1" / "best"  # what the stage's folder stands for
    found["eval"] = [
        said("eval", "--cache", cache, "--student", best, "--set", "device=cpu", "--choices", folder / "q.jsonl"),
        said("eval", "--student", world.student, "--set", "device=cpu", "--choices", folder / "q.jsonl"),
    ]
    found["export"] = [said("export", run / "stage1", "--out", folder / "exported")]
    found["report"] = [said("report", cache, "--out", folder / "cache.html")]
    found |= {name: [said(name, cache)] for name in ("inspect", "verify", "status", "gc")}
    broken = shutil.copytree(cache, folder / "broken")
    next((broken / "shards").glob("*.parquet")).unlink()
    (cache / "shards" / "00001-aaaaaaaaaaaaaaaa.parquet").write_bytes(b"killed")
    found["verify"] += [said("verify", broken, exit_code=5), said("verify", broken, "--repair")]
    found["status"] += [said("status", broken)]
    found["gc"] += [said("gc", cache)]
    found["diff"] = [said("diff", cache, cache), said("diff", cache, world.cache, exit_code=IdentityError.exit_code)]
    found["sql"] = [said("sql", cache, "select * from tokens limit 2")]
    doctor = CliRunner().invoke(app, ["doctor", "--out", str(cache), "--json"], catch_exceptions=False)
    found["doctor"] = [json.loads(doctor.stdout)]  # this machine may be fit or not
    found["launch"] = [said("launch", "--slurm", "--config", folder / "job.yaml")]
    return found


def test_every_command_has_a_schema_and_says_json() -> None:
    group: Any = typer.main.get_command(app)
    assert set(group.commands) == set(OUTPUTS) == {path.stem for path in SCHEMAS.glob("*.json")}
    for name, command in group.commands.items():
        assert "--json" in {option for parameter in command.params for option in parameter.opts}, name


@pytest.mark.parametrize("name", OUTPUTS)
def test_schemas_are_those_of_the_reports(name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    assert schema == schema_of(name), "run `python -m tests.commands.test_json`"


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_as_their_schemas_say(name: str, outputs: dict[str, list[Any]]) -> None:
    schema = schema_of(name)
    for output in outputs[name]:
        jsonschema.validate(output, schema)
        assert not jsonschema.Draft202012Validator(schema).is_valid({**output, "surprise": 1})


def test_an_error_leaves_standard_output_empty(tmp_path: Path, world: World) -> None:
    for arguments in (
        ["status", tmp_path],
        ["verify", tmp_path],
        ["report", tmp_path],
        ["diff", tmp_path, world.cache],
    ):
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert (done.stdout, type(done.exception).__name__) == ("", "DataError"), arguments


if __name__ == "__main__":
    for name in OUTPUTS:
        (SCHEMAS / f"{name}.json").write_text(json.dumps(schema_of(name), indent=2) + "\n", encoding="utf-8")
