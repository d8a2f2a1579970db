"""The recipes of docs/many-machines.md: valid YAML, commands that exist, and variables that a worker understands."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from distill.__main__ import app
from distill.launch.worker import find_worker

PAGE = (Path(__file__).parents[2] / "docs" / "many-machines.md").read_text(encoding="utf-8")
COMMANDS: Any = typer.main.get_command(app)


@pytest.fixture(scope="module")
def recipes() -> list[dict[str, Any]]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


def parse(line: str) -> dict[str, Any]:
    """The options of a ``distill …`` line, by the command's own parser, without running it."""
    name, *arguments = shlex.split(line, comments=True)[1:]
    command = COMMANDS.commands[name]
    context: Any = command.make_context(name, arguments)
    parameters: dict[str, Any] = context.params
    return parameters


def test_every_command_on_the_page_exists() -> None:
    lines = [line.strip().partition(" > ")[0] for line in PAGE.splitlines() if line.strip().startswith("distill ")]
    assert len(lines) >= 8
    for line in lines:
        assert parse(line.replace("…", ""))


def test_the_kubernetes_job(recipes: list[dict[str, Any]]) -> None:
    spec = recipes[0]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    worker = find_worker(None, {**environment, "JOB_COMPLETION_INDEX": str(spec["completions"] - 1)})
    assert (worker.index, worker.count) == (spec["completions"] - 1, spec["completions"])
    assert spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # a pod failure policy asks for it
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert parse(shlex.join([*container["command"], *container["args"]]))["worker"] is None
    (rule,) = [rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert rule["containerName"] == container["name"]
    assert not {0, 6, 75} & set(rule["values"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_skypilot_task(recipes: list[dict[str, Any]]) -> None:
    task = recipes[1]
    worker = find_worker(None, {"SKYPILOT_NODE_RANK": "3", "SKYPILOT_NUM_NODES": str(task["num_nodes"])})
    assert (worker.index, worker.count) == (3, 4)
    commands = [parse(line) for line in task["run"].strip().splitlines()]
    assert commands[0]["out"] == commands[1]["out"]
    assert str(commands[1]["config"]) in task["file_mounts"]
    assert any(commands[1]["out"].startswith(mount) for mount in task["volumes"])
