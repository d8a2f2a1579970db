"""Every snippet of docs/inspecting-with-pandas.md runs as it stands, on a real cache."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.records import Reject

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "inspecting-with-pandas.md").read_text(encoding="utf-8")


def load_cache_fixtures() -> Any:
    """The functions that fill the caches of the cache's own tests."""
    path = ROOT / "tests" / "cache" / "conftest.py"
    spec = importlib.util.spec_from_file_location("cache_fixtures_of_docs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a sealed cache of two domains and one reject."""
    fixtures = load_cache_fixtures()
    teacher = fixtures.make_teacher()
    plan = fixtures.plan_of(teacher, rows={"general": 5, "medical": 3})
    writer = fixtures.CacheWriter.open(tmp_path / "cache", plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    unit = plan.units[0]
    reject = Reject(domain=unit.domain, source="general.jsonl:0", reason="no answer")
    writer.commit(unit, fixtures.rows_of(teacher, unit)[1:], rejects=[reject], num_input_rows=4)
    fixtures.fill(tmp_path / "cache", teacher, plan)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run_in_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippets) == 9
    namespace: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"snippet {number}", "exec"), namespace)
    assert (folder / "cache").is_dir()
    printed = capsys.readouterr().out
    assert "T=4" in printed
    assert "no answer" in printed
    assert namespace["counts"]["sequences"].sum() == namespace["by_domain"]["sequences"].sum() == 7
    assert namespace["logits"].shape[1] == 200
