"""The notebook runs from top to bottom on a real cache, draws its charts, and is stored without outputs.

What it protects: examples/temperature_trap.ipynb, which people open before anything else.
"""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.caches import filled_cache

NOTEBOOK = Path(__file__).parents[2] / "examples" / "temperature_trap.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_without_outputs() -> None:
    for cell in read().cells:
        assert not cell.get("outputs"), cell.source
        assert cell.get("execution_count") is None


def test_it_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_cache(tmp_path / "cache")
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    notebook = read()
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("T=4: " in output.get("text", "") for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
