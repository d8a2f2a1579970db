"""What a person sees: help, tables and the last words of a command, on narrow and on simple terminals.

What it protects: names and numbers that are whole at 80 columns, and no traceback where a character is unknown.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill import __main__
from distill.commands import eval as evaluate
from distill.commands.options import checkpoint
from distill.report.table import plain_table
from tests.student.conftest import World


def drawn(table: Any, width: int) -> list[str]:
    """The lines of a table on a terminal."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_commands_are_grouped_and_options_are_whole() -> None:
    text = CliRunner().invoke(__main__.app, ["--help"], env={"COLUMNS": "80"}).stdout
    places = [text.index(f"─ {group} ─") for group in ("Prepare", "Distill", "Look in", "Keep in order")]
    assert places == sorted(places)
    text = CliRunner().invoke(__main__.app, ["eval", "--help"], env={"COLUMNS": "80"}).stdout
    assert "--allow-incomplete" in text
    assert re.search(r"--student +VALUE +Stage of a run", text)
    assert re.search(r"--json +Print the result", text)


def test_held_out_figures_fit_80_columns() -> None:
    figures = {"kl": {4.0: 0.31, 2.0: 1.2, 1.0: 15.09}, "ce": 14.75, "perplexity": 2.5e6, "num_tokens": 1234}
    figures |= {"top1_agreement": 0.1523, "top5_agreement": 0.5, "ece": 0.0145}
    evaluation = {"tail": "low_rank", "overall": figures, "groups": {}, "domains": {"medical": figures}}
    lines = drawn(evaluate._held_out_table("run/stage3/best", evaluation, None), 80)
    (row,) = [line.split() for line in lines if "medical" in line]
    assert row == ["medical", "0.310", "1.200", "15.090", "14.750", "2.5e+06", "15.2%", "50.0%", "1.5%", "1,234"]


def test_numbers_stand_at_the_right_and_texts_at_the_left() -> None:
    lines = drawn(plain_table("", ("name", "size"), [("a", "1,000"), ("bcd", "9.5"), ("ef", "")]), 80)
    assert lines[-4:-1] == [" a     1,000 ", " bcd     9.5 ", " ef          "]
    assert drawn(plain_table("", ("only",), []), 80)  # no rows


def test_a_stages_folder_stands_for_its_best_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "stage1" / "best").mkdir(parents=True)
    assert checkpoint(str(tmp_path / "stage1")) == str(tmp_path / "stage1" / "best")
    for name in (str(tmp_path / "stage1" / "best"), "Qwen/Qwen2.5-7B-Instruct"):
        assert checkpoint(name) == name


def test_a_terminal_that_knows_only_ascii(world: World) -> None:
    simple = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "distill", "inspect", str(world.cache)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | simple, check=False)
    assert done.returncode == 0, done.stderr
    assert "what the teacher expected there" in done.stdout


def test_ctrl_c_says_what_the_same_command_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.report.status.status", interrupted)
    monkeypatch.setattr(sys, "argv", ["distill", "status", "cache"])
    with pytest.raises(SystemExit) as done:
        __main__.main()
    assert done.value.code == 130
    assert "The same command goes on" in capsys.readouterr().err
