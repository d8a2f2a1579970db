"""A small sealed cache for the pages of docs/ to look at."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from distill.records import Reject

ROOT = Path(__file__).parents[2]


def load(name: str, path: Path) -> Any:
    """A module of the tests by its path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def filled_cache(root: Path) -> None:
    """Two domains, one reject, a tokenizer and fidelity positions."""
    fixtures = load("cache_fixtures_of_pages", ROOT / "tests" / "cache" / "conftest.py")
    report_fixtures = load("report_fixtures_of_pages", ROOT / "tests" / "report" / "conftest.py")
    teacher = fixtures.make_teacher()
    plan = fixtures.plan_of(teacher, rows={"general": 5, "medical": 3})
    writer = fixtures.CacheWriter.open(root, plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    writer.put_once("fidelity.safetensors", report_fixtures.fidelity_bytes(teacher))
    writer.put_once("teacher/tokenizer.json", report_fixtures.tokenizer_json(200))
    unit = plan.units[0]
    reject = Reject(domain=unit.domain, source="general.jsonl:0", reason="no answer")
    writer.commit(unit, fixtures.rows_of(teacher, unit)[1:], rejects=[reject], num_input_rows=4)
    fixtures.fill(root, teacher, plan)
