"""The README of a cache: everything that it tells people to run does run, and licences are never guessed."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distill.cache.card import NOT_STATED, stated_license
from distill.cache.writer import CacheWriter
from tests.cache.conftest import fill


def card_of(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def head_of(card: str) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return head


@pytest.mark.parametrize("library", ["distill", "pandas", "duckdb", "polars", "datasets"])
def test_every_snippet_runs_in_the_folder(cache: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    snippets = [code for code in re.findall(r"```python\n(.*?)```", card_of(cache), re.S) if library in code]
    assert len(snippets) == 1
    monkeypatch.chdir(cache)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippets[0], library, "exec"), {})
    expected = {"datasets": "topk_ids", "distill": "Question"}.get(library, "medical")
    assert expected in printed.getvalue()


def test_every_column_of_a_shard_is_described(cache: Path) -> None:
    import pyarrow.parquet as pq

    described = set(re.findall(r"`([a-z_0-9]+)`", card_of(cache).partition("## Columns")[2].partition("## ")[0]))
    assert set(pq.read_schema(next((cache / "shards").iterdir())).names) <= described


def test_what_nobody_stated_is_not_stated(cache: Path) -> None:
    card = card_of(cache)
    assert "license" not in head_of(card)
    assert card.count(NOT_STATED) == 3
    assert head_of(card)["size_categories"] == ["n<1K"]


def test_stated_licences_and_notes_are_told(tmp_path: Path, teacher: Any, plan: Any) -> None:
    told = {"license": "cc-by-4.0", "teacher_license": "apache-2.0", "data_license": "mit | ours", "notes": "Mind it."}
    recorded = plan.recorded.model_copy(update={"card": told})
    fill(tmp_path, teacher, plan.model_copy(update={"recorded": recorded}))
    card = card_of(tmp_path)
    assert head_of(card)["license"] == "cc-by-4.0"
    for text in ("| this cache | cc-by-4.0 |", "| the teacher, tiny | apache-2.0 |", "mit \\| ours", "\nMind it.\n"):
        assert text in card
    assert CacheWriter.open(tmp_path, plan).seal() is not None  # card and provenance are no part of the identity


@pytest.mark.parametrize(
    ("readme", "found"),
    [
        ("---\nlicense: apache-2.0\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "qwen"),
        ("---\ntags: [x]\n---\n", None),
        ("# No head\n", None),
        ("---\n- a list\n---\n", None),
        ("---\n{not yaml\n---\n", None),
        (None, None),
    ],
)
def test_a_teachers_licence_is_read_from_its_readme(tmp_path: Path, readme: str | None, found: str | None) -> None:
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert stated_license(tmp_path) == found
