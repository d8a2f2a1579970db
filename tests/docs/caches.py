"""A small sealed cache for the pages of docs/ and the notebook to look at."""

from pathlib import Path

from distill.records import Reject
from tests.cache import conftest as cache_fixtures
from tests.report import conftest as report_fixtures


def filled_cache(root: Path) -> None:
    """Two domains, one reject, a tokenizer and fidelity positions."""
    teacher = cache_fixtures.make_teacher()
    plan = cache_fixtures.plan_of(teacher, rows={"general": 5, "medical": 3})
    assert teacher.projection is not None
    writer = cache_fixtures.CacheWriter.open(root, plan)
    writer.put_once("projection.safetensors", teacher.projection.to_bytes())
    writer.put_once("fidelity.safetensors", report_fixtures.fidelity_bytes(teacher))
    writer.put_once("teacher/tokenizer.json", report_fixtures.tokenizer_json(200))
    unit = plan.units[0]
    reject = Reject(domain=unit.domain, source="general.jsonl:0", reason="no answer")
    writer.commit(unit, cache_fixtures.rows_of(teacher, unit)[1:], rejects=[reject], num_input_rows=4)
    cache_fixtures.fill(root, teacher, plan)
