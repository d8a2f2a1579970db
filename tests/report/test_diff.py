"""diff names every field in which two caches differ, and its exit code says whether they are of one identity."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distill.__main__ import app
from distill.errors import DataError
from distill.report.diff import diff, render_diff


@pytest.fixture
def make(tmp_path: Path, teacher: Any, plan_of: Any, fill: Any) -> Callable[..., Path]:
    """A sealed cache of six general and some medical rows; keywords change its identity."""

    def make(name: str, *, medical: int = 4, filled_by: Any = teacher, **changes: Any) -> Path:
        fill(tmp_path / name, filled_by, plan_of(filled_by, rows={"general": 6, "medical": medical}, **changes))
        return tmp_path / name

    return make


def found(one: Path, two: Path) -> dict[tuple[str, str], tuple[str, str]]:
    return {(item.section, item.field): (item.one, item.two) for item in diff(one, two).differences}


def test_a_cache_and_itself(make: Callable[..., Path]) -> None:
    report = diff(make("a"), make("a"))
    assert report.same_identity
    assert report.differences == ()


def test_other_data_of_the_same_identity(make: Callable[..., Path]) -> None:
    one, two = make("a"), make("b", medical=3)
    report = diff(one, two)
    assert report.same_identity
    assert {item.section for item in report.differences} == {"sources", "counts"}
    differences = found(one, two)
    assert "4 rows" in differences[("sources", "medical: medical.jsonl")][0]
    assert "3 rows" in differences[("sources", "medical: medical.jsonl")][1]
    assert differences[("counts", "medical eval sequences")] == ("1", "0")


def test_another_identity_field_by_field(make: Callable[..., Path], make_teacher: Any) -> None:
    one = make("a")
    two = make("b", filled_by=make_teacher(top_k=4, hidden_bytes=4), max_length=32, quantisation="awq", hidden_bytes=4)
    report = diff(one, two)
    assert not report.same_identity
    differences = found(one, two)
    assert differences[("identity", "top_k")] == ("8", "4")
    assert differences[("identity", "max_length")] == ("64", "32")
    assert differences[("identity", "quantisation")] == ("–", "awq")
    assert {("projection", "sha256"), ("projection", "widths")} <= set(differences)
    assert ("identity", "vocab_size") not in differences


def test_a_cache_without_hidden_states(make: Callable[..., Path], make_teacher: Any) -> None:
    differences = found(make("a"), make("b", filled_by=make_teacher(hidden_bytes=0)))
    assert differences[("identity", "hidden_bytes")] == ("8", "0")
    assert differences[("projection", "widths")][1] == "–"


def test_an_incomplete_cache(tmp_path: Path, filler: Callable[..., Any]) -> None:
    filler(tmp_path / "a", 5)
    filler(tmp_path / "b", 2)
    differences = found(tmp_path / "a", tmp_path / "b")
    assert differences[("counts", "sealed")] == ("True", "False")
    assert differences[("counts", "units committed")] == ("5", "2")


def test_the_command(make: Callable[..., Path], tmp_path: Path) -> None:
    one, two, other = make("a"), make("b", medical=3), make("c", dtype="bfloat16")
    same = CliRunner().invoke(app, ["diff", str(one), str(two), "--json"])
    assert same.exit_code == 0
    assert json.loads(same.stdout)["same_identity"]
    differing = CliRunner().invoke(app, ["diff", str(one), str(other)])
    assert differing.exit_code == 4
    assert "The identities differ" in differing.stdout
    file = io.StringIO()
    render_diff(diff(one, two), console=Console(file=file, width=300))
    assert "a student can train on both" in file.getvalue()
    with pytest.raises(DataError, match="no cache"):
        diff(one, tmp_path / "nothing")
