"""Help and completion of every command.

What it protects: examples that work when they are copied, and completion that offers what exists.
"""

import re
import shlex
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from distill.__main__ import app

GROUP: Any = typer.main.get_command(app)


def examples(name: str) -> list[str]:
    """The examples of a command's help, each up to the end of its sentence."""
    help_text = " ".join((GROUP.commands[name].help or "").split())
    return re.findall(r"Example: distill (.*?)(?:\. (?=[A-Z])|$)", help_text)


@pytest.mark.parametrize("name", GROUP.commands)
def test_help_shows_an_example_that_the_command_takes(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "400"})
    assert done.exit_code == 0
    assert f"Example: distill {name}" in " ".join(done.stdout.split())
    (example,) = examples(name)
    command, *arguments = shlex.split(example.partition(" > ")[0])
    assert command == name
    GROUP.commands[name].make_context(name, arguments)  # raises where an option or an argument is unknown


@pytest.mark.parametrize("name", ["plan", "cache-teacher", "train"])
def test_what_shows_progress_can_be_quiet(name: str) -> None:
    assert "--quiet" in {option for parameter in GROUP.commands[name].params for option in parameter.opts}


@pytest.mark.parametrize(
    ("words", "number", "offered"),
    [("distill cache", 1, "cache-teacher"), ("distill verify --re", 2, "--repair"), ("distill --inst", 1, "--install")],
)
def test_the_shell_completes_commands_and_options(words: str, number: int, offered: str) -> None:
    environment = {"_DISTILL_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    done = CliRunner().invoke(app, [], prog_name="distill", env=environment)
    assert any(line.startswith(offered) for line in done.stdout.splitlines()), done.output
