"""Every snippet of docs/inspecting-with-pandas.md runs as it stands, on a real cache."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.docs.caches import filled_cache

TEXT = (Path(__file__).parents[2] / "docs" / "inspecting-with-pandas.md").read_text(encoding="utf-8")


def test_the_snippets_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled_cache(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippets) == 9
    namespace: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"snippet {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "T=4" in printed
    assert "no answer" in printed
    assert namespace["counts"]["sequences"].sum() == namespace["by_domain"]["sequences"].sum() == 7
    assert namespace["logits"].shape[1] == 200
